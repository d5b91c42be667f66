"""The earlier name of `sdrt.runtime.text.tokenizer`; it goes with the next release."""

from .text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
