"""From a prompt to images: tokenizer, noise, samplers, guidance, pipeline.

Knows numpy and engines.
"""

from .arguments import GenerationKwargs
from .denoising import Step
from .loading import load_pipeline
from .lora.tags import LoraWeight
from .noise import CpuNoise, CudaNoise, noise_from_seed, randn
from .options import GenerationOptions
from .output import ArrayOutput, Output
from .pipeline import Pipeline
from .preview import Preview
from .samplers.table import sample, sampler_table
from .samplers.table_data import SamplerTable
from .text.tokenizer import Tokenizer

__all__ = [
    "ArrayOutput",
    "CpuNoise",
    "CudaNoise",
    "GenerationKwargs",
    "GenerationOptions",
    "LoraWeight",
    "Output",
    "Pipeline",
    "Preview",
    "SamplerTable",
    "Step",
    "Tokenizer",
    "load_pipeline",
    "noise_from_seed",
    "randn",
    "sample",
    "sampler_table",
]
