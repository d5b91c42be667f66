"""A complete sampling run as one call of an engine: the program and its result.

Knows numpy and the engine protocol; not samplers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from .protocol import Engine, Feeds


@dataclass(frozen=True, slots=True)
class TextInput:
    """Text that the text encoder reads in the same call, in place of the UNet's input `context`.

    Attributes:
        ids: [B, 2 or 1, chunks, tokens] int32.
        weights: Every token's weight, of the shape of `ids`, float32.
        clip_skip: How many of the encoder's last layers are skipped.
    """

    ids: np.ndarray
    weights: np.ndarray
    clip_skip: int


@dataclass(frozen=True, slots=True)
class SamplingResult:
    """The result of a program.

    Attributes:
        latents: [B, C, H/8, W/8] float32.
        pixels: [B, H, W, 3] uint8, where the decoder took part.
        finite: For every image, whether all values of the decoder's output were finite.
    """

    latents: np.ndarray
    pixels: np.ndarray | None = None
    finite: Sequence[bool] = ()


@dataclass(frozen=True, slots=True)
class SamplingProgram:
    """A sampling run of B images in N evaluations in which every number is known in advance, so
    that nothing is decided between evaluations. Rows of the UNet's batch are ordered by image.

    Attributes:
        history: [B, columns, C, H/8, W/8] float32; holds the initial noise and all other inputs.
        coefficients: [N + 1, B, columns] float32; how each evaluation's input, and the result, is
            mixed from the history.
        timesteps: [N, B] float32.
        rows_per_image: For every evaluation, 2 where it is guided and else 1.
        columns_per_output: Columns of one evaluation's output; the last is the prompt's.
        output_columns: [N], where outputs are stored.
        state_columns: [N + 1], where mixtures are stored.
        conditioning: [B, 2 or 1, ...] of every other input; the last row is the prompt's.
        extra_channels: [B, E, H/8, W/8], concatenated to the latents.
        text: What the text encoder reads first, if it takes part.
    """

    history: np.ndarray
    coefficients: np.ndarray
    timesteps: np.ndarray
    rows_per_image: tuple[int, ...]
    columns_per_output: int
    output_columns: tuple[int, ...]
    state_columns: tuple[int, ...]
    conditioning: Feeds
    extra_channels: np.ndarray
    text: TextInput | None = None

    @property
    def layout(self) -> tuple[object, ...]:
        """Equal for programs that can share one CUDA graph."""
        shapes = tuple(value.shape for value in self.conditioning.values())
        columns = self.columns_per_output, self.output_columns, self.state_columns
        text = self.text and (self.text.ids.shape, self.text.clip_skip)
        arrays = self.history.shape, self.coefficients.shape, self.extra_channels.shape
        return *arrays, shapes, self.rows_per_image, *columns, text


@runtime_checkable
class ProgramEngine(Protocol):
    """A UNet's engine that also runs complete programs. Test for it with `isinstance`."""

    def run_program(
        self, program: SamplingProgram, encoder: Engine | None, decoder: Engine | None
    ) -> SamplingResult:
        """Run a program: first the text encoder where the program has text, last the decoder where
        one is passed. Both are engines of the same backend.
        """
        ...
