"""A sampling run as a table of numbers, known before any picture is made.

Every solver is linear in the starting noise and the model's outputs. Handing it basis vectors
instead of latents makes it write, for every model evaluation and for the result, the row of
numbers that combines them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sdrt.errors import UsageError

from . import solvers
from .schedule import Schedule, schedule_from_config

MOST_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Sampler:
    """A solver under its class name, the name users' tools know, and its class's own defaults."""

    solve: Callable[[Schedule, int, Any], Any]
    title: str
    defaults: Mapping[str, Any]


SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": Sampler(solvers.ddim, "DDIM", {"set_alpha_to_one": True, "clip_sample": True}),
    "PNDMScheduler": Sampler(solvers.pndm, "PLMS", {"skip_prk_steps": False}),
    "EulerDiscreteScheduler": Sampler(solvers.euler, "Euler", {"timestep_spacing": "linspace"}),
    "DPMSolverMultistepScheduler": Sampler(
        solvers.dpmpp_2m, "DPM++ 2M", {"timestep_spacing": "linspace"}
    ),
}


@dataclass(frozen=True, slots=True)
class SamplerTable:
    """A sampling run.

    timesteps: [N] float64, as the model is fed, one per evaluation
    matrix: [N + 1, 1 + N + M] float64; row k < N is the model input of evaluation k, the last the
        result; columns are the starting noise of unit variance, the N outputs, M fresh noises
    """

    timesteps: np.ndarray
    matrix: np.ndarray

    @property
    def evaluations(self) -> int:
        return len(self.timesteps)

    def guided(self, guidance_scale: float) -> np.ndarray:
        """The matrix over both outputs of every evaluation, [N + 1, 1 + 2 N + M] float32.

        Output k becomes two columns, unguided first: `(1 - g) * unguided + g * guided`
        (Ho and Salimans 2022, arXiv:2207.12598, in the field's convention).
        """
        count = self.evaluations
        start, outputs, noises = np.split(self.matrix, [1, 1 + count], axis=1)
        pair = np.array([1.0 - guidance_scale, guidance_scale])
        both = (outputs[:, :, None] * pair).reshape(count + 1, 2 * count)
        return np.concatenate([start, both, noises], axis=1).astype(np.float32)


class Recorder:
    """The run that writes the table: latents are vectors over the columns."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.start = self._basis(0)
        self.rows: list[np.ndarray] = []
        self.timesteps: list[float] = []

    def _basis(self, column: int) -> np.ndarray:
        vector = np.zeros(self.room)
        vector[column] = 1.0
        return vector

    def output(self, x: np.ndarray, timestep: float) -> np.ndarray:
        self.rows.append(x)
        self.timesteps.append(timestep)
        return self._basis(len(self.rows))


def sampler_name(config: Mapping[str, Any]) -> str:
    """The class name a configuration asks for; raises UsageError with the known ones."""
    name = str(config.get("_class_name"))
    if name not in SAMPLERS:
        raise UsageError(f"scheduler {name!r} is not known; one of: {', '.join(SAMPLERS)}")
    return name


def sampler_table(config: Mapping[str, Any], num_inference_steps: int) -> SamplerTable:
    """The table of a `scheduler_config.json` for a number of steps.

    Raises UsageError for an unknown scheduler, an option that is not linear or not carried, and
    steps outside 1 to the number of training steps.
    """
    return _table(json.dumps(dict(config), sort_keys=True), num_inference_steps)


@lru_cache(maxsize=32)
def _table(config_json: str, steps: int) -> SamplerTable:
    config = json.loads(config_json)
    sampler = SAMPLERS[sampler_name(config)]
    schedule = schedule_from_config(config, sampler.defaults)
    most = min(MOST_STEPS, schedule.num_train_timesteps)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise UsageError(f"{steps!r} steps; expected a whole number from 1 to {most}")
    if sampler.solve is solvers.pndm and not schedule.skip_prk_steps:
        raise UsageError("PNDMScheduler with skip_prk_steps=false is not supported; set it to true")
    run = Recorder(room=2 * steps + 2)
    result = sampler.solve(schedule, steps, run)
    matrix = np.array([*run.rows, result])[:, : 1 + len(run.rows)]
    matrix.setflags(write=False)
    return SamplerTable(np.array(run.timesteps), matrix)
