"""Prompt to picture: tokenizer, noise, samplers, guidance, pipeline. Knows numpy and engines."""

from .noise import randn
from .pipeline import Output, Pipeline, Step, load_pipeline
from .samplers.table import SamplerTable, sampler_table
from .tokenizer import Tokenizer

__all__ = [
    "Output",
    "Pipeline",
    "SamplerTable",
    "Step",
    "Tokenizer",
    "load_pipeline",
    "randn",
    "sampler_table",
]
