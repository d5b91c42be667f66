"""The earlier name of `sdrt.runtime.batching.engine`; it goes with the next release."""

from .batching.engine import InFlight

__all__ = ["InFlight"]
