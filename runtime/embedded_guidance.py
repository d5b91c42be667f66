"""Models that are fed the guidance scale: distilled from guided ones, they have no unguided row.

Knows the embedding and which options have no meaning then; the UNet's inputs say which models.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdrt.bundle.manifest import Manifest
from sdrt.errors import UsageError

from .options import GenerationOptions
from .text.conditioning import Conditioning

log = logging.getLogger(__name__)
GUIDANCE = "timestep_cond"  # the UNet's input


def guidance_embedding_width(manifest: Manifest) -> int:
    """Width of the guidance scale's embedding; 0 where guidance is a second row."""
    inputs = manifest.components["unet"].inputs
    return next((int(spec.shape[1]) for spec in inputs if spec.name == GUIDANCE), 0)


def guidance_embedding(scale: float, width: int) -> np.ndarray:
    """The embedding [width] float32 of a guidance scale: sinusoids of a thousand times what it has
    above 1, as the reference pipelines make them in single precision.
    """
    half = width // 2
    step = np.log(np.float32(10000.0)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32(scale - 1.0) * np.float32(1000.0) * frequencies
    embedding = np.concatenate([np.sin(angles), np.cos(angles)])
    return np.pad(embedding, (0, width % 2)).astype(np.float32)


def without_guidance(options: GenerationOptions) -> GenerationOptions:
    """The options without guidance by a second row."""
    return replace(options, guidance_scale=1.0)


def add_guidance_embedding(
    told: Sequence[Conditioning], options: GenerationOptions, width: int
) -> list[Conditioning]:
    """What the UNet is told of every image, and the guidance scale [1, width].

    Warns of a negative prompt: it has no effect, as in the reference pipelines.
    """
    if any(options.negative_prompt) or options.negative_prompt_embeds is not None:
        log.warning("this model is guided without a negative prompt; the one given is ignored")
    embedding = guidance_embedding(options.guidance_scale, width)[None]
    return [{**each, GUIDANCE: embedding} for each in told]


def check_guidance(options: GenerationOptions) -> None:
    """Raise UsageError for what such a model cannot do."""
    if tuple(options.guidance_interval) != (0.0, 1.0):
        raise UsageError("guidance_interval: this model has one guidance scale for the whole run")
    if options.guidance_rescale:
        raise UsageError("guidance_rescale: this model has no unguided output to rescale from")
