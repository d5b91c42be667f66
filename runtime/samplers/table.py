"""A sampling run as a table of numbers, known before any image is generated.

Every solver is linear in the initial noise, the model outputs and the added noise. Run with basis
vectors instead of latents, it writes the row of numbers that combines them, for the input of every
model evaluation and for the result.

Knows the solvers; not latents, models or guidance schedules.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from sdrt.errors import UsageError

from . import discrete, karras, spacing
from .noise_schedule import NoiseSchedule, denoised_and_noise, schedule_from_config
from .registry import SAMPLERS, SamplerSpec, sampler_name
from .run_part import RunPart, count_steps_before, truncate_table
from .table_data import DenoisedClipping, SamplerTable

MAX_STEPS = 1000
LONG = 100  # steps; of longer tables only a few are cached


class Recorder:
    """The solver context that writes the table: latents are vectors over columns.

    Columns: initial noise, image, then three equal blocks for outputs, noises and states. A state
    is the latents after an evaluation; it gets a column, so that later rows stay short. With
    clipping there is a fourth block: what clipping adds to the denoised image of each evaluation.
    """

    def __init__(self, evaluations: int, clips: bool = False) -> None:
        self.max_evaluations, self.clips = evaluations, clips
        self.rows: list[np.ndarray] = []
        self.states: list[np.ndarray] = []
        self.timesteps: list[float] = []
        self.alphas_sigmas: list[tuple[float, float]] = []
        self.num_noises = 0
        self.start, self.image = self._basis(0), self._basis(1)

    def _basis(self, column: int) -> np.ndarray:
        vector = np.zeros(2 + (4 if self.clips else 3) * self.max_evaluations)
        vector[column] = 1.0
        return vector

    def model(self, x: np.ndarray, timestep: float, alpha: float, sigma: float) -> np.ndarray:
        self.rows.append(x)
        self.timesteps.append(timestep)
        self.alphas_sigmas.append((alpha, sigma))
        return self._basis(1 + len(self.rows))

    def clip(self, denoised: np.ndarray) -> np.ndarray:
        if not self.clips:
            return denoised
        return denoised + self._basis(1 + 3 * self.max_evaluations + len(self.rows))

    def noise(self) -> np.ndarray:
        self.num_noises += 1
        return self._basis(1 + self.max_evaluations + self.num_noises)

    def callback(self, x: np.ndarray) -> np.ndarray:
        self.states.append(x)
        return self._basis(1 + 2 * self.max_evaluations + len(self.states))

    def clipping(self, schedule: NoiseSchedule) -> DenoisedClipping | None:
        if not self.clips:
            return None
        count = len(self.rows)
        weights = np.array(self.states)[:, 2 + 3 * self.max_evaluations :][:, :count]
        assert (weights == np.diag(np.diag(weights))).all(), "one row per denoised image"
        denoised = [
            [denoised_and_noise(schedule, x, 1.0 - x, *alphas_sigmas)[0] for x in (1.0, 0.0)]
            for alphas_sigmas in self.alphas_sigmas
        ]
        return DenoisedClipping(
            schedule.clip_sample_range, np.array(denoised), np.diag(weights).copy()
        )

    def recurrence(self, image: bool, scales: np.ndarray) -> np.ndarray:
        """See `SamplerTable.recurrence`."""
        count, block = len(self.rows), self.max_evaluations
        columns = [0, *range(2, 2 + count), *range(2 + block, 2 + block + self.num_noises)]
        columns += [1] if image else []
        columns += range(2 + 2 * block, 2 + 2 * block + count)
        states = np.array(self.states)[:, columns] / scales[1:, None]
        states[:, -count:] *= scales[1:]
        return np.concatenate([self.rows[0][None, columns], states])


def expand_recurrence(recurrence: np.ndarray, scales: np.ndarray, edits: bool) -> np.ndarray:
    """`SamplerTable.matrix`: the recurrence with every earlier row substituted."""
    count = len(recurrence) - 1
    known = recurrence[:, :-count]
    if edits:
        known = np.concatenate([known, np.eye(count + 1)[:, 1:] / scales[:, None]], axis=1)
    matrix = np.zeros_like(known)
    for k in range(count + 1):
        matrix[k] = known[k] + recurrence[k, -count:] @ matrix[1:]
    return matrix


def sampler_table(
    config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    denoise_from: int = 0,
    image: bool = False,
    edits: bool = False,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
) -> SamplerTable:
    """The table of a scheduler configuration for a number of steps.

    Args:
        config: The contents of a `scheduler_config.json`, with `_class_name`.
        num_inference_steps: Number of steps, unless timesteps or sigmas are given.
        timesteps: Descending timesteps instead of the configuration's spacing.
        sigmas: Descending sigmas instead of the configuration's spacing, including the last.
        denoise_from: Steps left out at the start; the run then starts from an image with the noise
            of that step.
        image: Start from an image even if no step is left out.
        edits: Give the latents after every evaluation a column of their own.
        denoising_start: The fraction of the run at which it takes over an image's noisy latents,
            in the solver's scale, instead of `denoise_from`.
        denoising_end: The fraction at which it stops; the result is the solver's latents there.

    Returns:
        The table; cached, and its arrays are read-only.

    Raises:
        UsageError: An unknown scheduler; an option that is not linear; steps outside 1 to the
            number of training steps, or that the solver does not support; timesteps or sigmas that
            do not descend; a start or an end that leaves no step.
    """
    own = tuple(
        None if values is None else tuple(float(value) for value in values)
        for values in (timesteps, sigmas)
    )
    if None not in own:
        raise UsageError("both timesteps and sigmas were given; expected one of them")
    text = json.dumps(dict(config), sort_keys=True)
    has_image = image or bool(denoise_from) or denoising_start is not None
    part = RunPart(denoise_from, has_image, denoising_start, denoising_end)
    long = isinstance(num_inference_steps, int) and num_inference_steps > LONG
    return (_cached_long_table if long else _cached_table)(
        text, num_inference_steps, own, part, edits
    )


GridValues = tuple[float, ...] | None


@lru_cache(maxsize=64)
def _cached_table(
    config_json: str, steps: int, own: tuple[GridValues, ...], part: RunPart, edits: bool
) -> SamplerTable:
    config = json.loads(config_json)
    try:
        with np.errstate(all="ignore"):  # results that are not finite are refused
            return _build_part(config, steps, own, part, edits)
    except (ArithmeticError, ValueError) as error:
        raise UsageError(
            f"{steps} steps of {sampler_name(config)} cannot be computed: {error}; expected finite "
            "sigmas that increase with the training steps"
        ) from error


def _build_part(
    config: dict[str, Any], steps: int, own: tuple[GridValues, ...], part: RunPart, edits: bool
) -> SamplerTable:
    """The table of a part of a run."""
    sampler = SAMPLERS[sampler_name(config)]
    total = schedule_from_config(config, sampler.defaults, sampler.options).num_train_timesteps
    if part.denoising_start is not None:
        timesteps = _build_table(config, steps, own, RunPart(), edits).timesteps
        if sampler.extra_evaluations:  # PLMS repeats a step, which begins once
            timesteps = np.array(sorted(set(timesteps.tolist()), reverse=True))
        skipped = count_steps_before(
            timesteps, part.denoising_start, total, sampler.evaluations_per_step
        )
        part = replace(part, denoise_from=skipped)
    table = _build_table(config, steps, own, part, edits)
    return table if part.denoising_end is None else truncate_table(table, part.denoising_end, total)


def _build_table(
    config: dict[str, Any], steps: int, own: tuple[GridValues, ...], part: RunPart, edits: bool
) -> SamplerTable:
    denoise_from, image = part.denoise_from, part.image
    sampler = SAMPLERS[sampler_name(config)]
    schedule = schedule_from_config(config, sampler.defaults, sampler.options)
    grid = _build_grid(sampler, schedule, steps, *own)
    if not 0 <= denoise_from < len(grid.timesteps):
        raise UsageError(f"denoise_from {denoise_from!r}; expected 0 to {len(grid.timesteps) - 1}")
    grid = grid.skip(denoise_from)
    recorder = Recorder(sampler.max_evaluations(len(grid.timesteps)), schedule.clip_sample)
    x = sampler.family.init_noise_sigma(schedule, grid) * recorder.start
    if part.denoising_start is not None:
        x = recorder.image
    elif image:
        image_scale, noise_scale = sampler.family.add_noise_scales(schedule, grid)
        x = image_scale * recorder.image + noise_scale * recorder.start
    sampler.solve(schedule, grid, x, recorder)
    alphas_sigmas = np.array([*recorder.alphas_sigmas, (1.0, 0.0)])
    scales = 1.0 / alphas_sigmas[:, 0] if sampler.family is karras else np.ones(len(alphas_sigmas))
    recurrence = recorder.recurrence(image, scales)
    if not np.isfinite(recurrence).all():
        raise UsageError(
            f"{steps} steps of {sampler_name(config)} contain numbers that are not finite"
        )
    matrix = expand_recurrence(recurrence, scales, edits)
    for array in (recurrence, matrix):
        array.setflags(write=False)
    timesteps = np.array(recorder.timesteps)
    return SamplerTable(
        timesteps,
        matrix,
        recorder.num_noises,
        alphas_sigmas,
        scales,
        recurrence,
        recorder.clipping(schedule),
    )


# A table grows with the square of the steps: one of 1000 steps takes 24 MB.
_cached_long_table = lru_cache(maxsize=2)(_cached_table.__wrapped__)


def _build_grid(
    sampler: SamplerSpec,
    schedule: NoiseSchedule,
    steps: int,
    timesteps: GridValues,
    sigmas: GridValues,
) -> spacing.TimestepGrid:
    if timesteps is not None or sigmas is not None:
        if sigmas is not None and sampler.family is discrete:
            raise UsageError(
                "sigmas are unsupported by discrete-time schedulers", hint="set timesteps instead"
            )
        return spacing.custom_grid(schedule, timesteps, sigmas)
    max_steps = min(MAX_STEPS, schedule.num_train_timesteps)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= max_steps:
        raise UsageError(f"{steps!r} steps; expected an integer from 1 to {max_steps}")
    build = spacing.sigma_schedule_grid if schedule.sigma_schedule else sampler.build_grid
    grid = build(schedule, steps)
    values = grid.sigmas[:-1] or grid.timesteps
    descending = all(a > b for a, b in itertools.pairwise(values))
    lowest, highest = min(grid.timesteps), max(grid.timesteps)
    integers = schedule.timestep_type == "discrete"
    if not descending or (integers and not 0 <= lowest <= highest < schedule.num_train_timesteps):
        raise UsageError(
            f"{steps} steps of {schedule.timestep_spacing} spacing do not fit "
            f"{schedule.num_train_timesteps} training steps",
            hint="set another number of steps",
        )
    return grid


def sample(
    table: SamplerTable,
    model: Callable[[np.ndarray, float], np.ndarray],
    init: np.ndarray,
    noise: Sequence[np.ndarray] = (),
    image: np.ndarray | None = None,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """A denoising loop in numpy over a table without edits.

    Args:
        table: From `sampler_table`.
        model: Called with (latents, timestep); returns the model output of the same shape.
        init: Initial noise of unit variance, any shape.
        noise: The M added noises, each of that shape.
        image: The image's latents, for a table that starts from an image.
        on_step: Called after each evaluation with the number of evaluations done and the latents.

    Returns:
        The denoised latents, float32, of the shape of `init`.

    Raises:
        UsageError: The noises or the image do not match the table.
    """
    last = [] if image is None else [image]
    if 1 + table.evaluations + len(noise) + len(last) != table.matrix.shape[1]:
        raise UsageError(
            f"{len(noise)} added noises and {len(last)} images; expected {table.num_noises} and "
            f"{table.matrix.shape[1] - 1 - table.evaluations - table.num_noises}, as in the table"
        )
    rows = table.recurrence.astype(np.float32)
    history = np.zeros((rows.shape[1], init.size), np.float32)
    fixed = [init, *[np.zeros_like(init)] * table.evaluations, *noise, *last]
    for column, value in enumerate(fixed):
        history[column] = np.asarray(value, np.float32).reshape(-1)
    x = (rows[0] @ history).reshape(init.shape)
    for k, timestep in enumerate(table.timesteps):
        output = np.asarray(model(x, float(timestep)), np.float32)
        history[1 + k] = output.reshape(-1)
        history[len(fixed) + k] = rows[k + 1] @ history
        if table.clip:
            history[len(fixed) + k] += table.clip.correction(k, x, output).reshape(-1)
        x = history[len(fixed) + k].reshape(init.shape).copy()
        if on_step:
            on_step(k + 1, x)
    return x
