"""A whole sampling run as one call of a backend: what it is given and what becomes of it.

Knows numpy and the engine protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .protocol import Engine, Feeds


@dataclass(frozen=True, slots=True)
class TextInput:
    """Text that a text encoder reads in the same run, in place of the UNet's input `context`.

    ids: [B, 2 or 1, stretches, tokens] int32; weights: alike, float32, of every token
    skip: layers left out at the end
    """

    ids: np.ndarray
    weights: np.ndarray
    skip: int


@dataclass(frozen=True, slots=True)
class SamplingResult:
    """What becomes of a schedule.

    latents: [B, C, H/8, W/8] float32
    pixels: [B, H, W, 3] uint8, where it was decoded too
    good: of each, whether all of the decoder's numbers were finite
    """

    latents: np.ndarray
    pixels: np.ndarray | None = None
    good: Sequence[bool] = ()


@dataclass(frozen=True, slots=True)
class SamplingProgram:
    """A whole run of B pictures in N evaluations, all numbers known: what a backend that decides
    nothing in between needs. Rows of the model are laid out picture by picture.

    columns: [B, places, C, H/8, W/8] float32, with the starting noise and whatever is given
    rows: [N + 1, B, places] float32, how every input and the result are mixed
    timesteps: [N, B] float32
    used: rows of a picture in every evaluation, 2 where it is guided
    per: places of one evaluation's output; the last is the prompt's
    output_places [N], state_places [N + 1]: where outputs and mixtures are kept
    told: [B, 2 or 1, ..] of every other input; the last row is the prompt's
    beside: [B, E, H/8, W/8] channels beside the latents
    read: what the text encoder reads first, if it does
    """

    columns: np.ndarray
    rows: np.ndarray
    timesteps: np.ndarray
    used: tuple[int, ...]
    per: int
    output_places: tuple[int, ...]
    state_places: tuple[int, ...]
    told: Feeds
    beside: np.ndarray
    read: TextInput | None = None

    @property
    def layout(self) -> tuple[object, ...]:
        """What two schedules share that one CUDA graph serves."""
        shapes = tuple(value.shape for value in self.told.values())
        places = self.used, self.per, self.output_places, self.state_places
        read = self.read and (self.read.ids.shape, self.read.skip)
        return self.columns.shape, self.rows.shape, self.beside.shape, shapes, places, read


class ProgramEngine(Protocol):
    """A UNet's engine that also runs a whole schedule."""

    def run_program(
        self, schedule: SamplingProgram, encoder: Engine | None, decoder: Engine | None
    ) -> SamplingResult:
        """Run it, after the text encoder where the schedule has text, before the decoder where one
        is given; both are engines of the same backend.
        """
        ...
