"""A sampling run as a table of numbers, known before any picture is made.

Every solver is linear in the starting noise, the model's outputs and the fresh noise. Handing it
basis vectors instead of latents makes it write, for every model evaluation and for the result, the
row of numbers that combines them.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sdrt.errors import UsageError

from . import discrete as samplers_discrete
from . import karras, spacing
from .noise_schedule import NoiseSchedule, clean_and_noise, schedule_from_config
from .registry import SAMPLERS, Sampler, sampler_name

MAX_STEPS = 1000
LONG = 100  # steps of tables of which few are remembered


@dataclass(frozen=True, slots=True)
class Clip:
    """The clean picture that an evaluation foretells, kept within bounds. Not linear, so it is no
    entry of the table but a step of its own after each row.

    bound: the most of either sign
    clean: [N, 2] shares of the model's input and of its guided output in the clean picture
    weights: [N] the share of the clean picture in the next row
    """

    bound: float
    clean: np.ndarray
    weights: np.ndarray

    def change(self, k: int, x: np.ndarray, output: np.ndarray) -> np.ndarray:
        """What clipping after evaluation k adds to the row that follows; x is its input."""
        of_input, of_output = self.clean[k].astype(np.float32)
        clean = of_input * x + of_output * output
        return np.float32(self.weights[k]) * (np.clip(clean, -self.bound, self.bound) - clean)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SamplerTable:
    """A sampling run of N evaluations with M fresh noises; equal to itself alone.

    timesteps: [N] float64, as the model is fed, one per evaluation
    matrix: [N + 1, 1 + N + M] float64; row k < N is the model input of evaluation k, scaled as the
        model wants it, the last the result. Columns: the starting noise of unit variance, the N
        outputs, the M fresh noises in the order drawn; then, where the run begins at a picture
        (`denoise_from`), the picture's latents; then, where edits were asked for, N edits, the
        k-th added to the latents after evaluation k.
    noises: M
    shares: [N + 1, 2] float64; each row is `alpha * clean + sigma * noise`, the result (1, 0)
    scales: [N + 1] float64; the solver's latents are its row times this (what edits add to)
    chain: [N + 1, columns + N] float64; the same rows, short: as the matrix without edits, then a
        column for each row from the first on, once it is known
    clip: what is clipped after each row; None for most
    full: [N] bool, which evaluations run the whole model; the others run its shallow part with the
        feature of the last that did (see `deepcache.py`). None is all
    """

    timesteps: np.ndarray
    matrix: np.ndarray
    noises: int
    shares: np.ndarray
    scales: np.ndarray
    chain: np.ndarray
    clip: Clip | None = None
    full: np.ndarray | None = None

    @property
    def evaluations(self) -> int:
        return len(self.timesteps)

    @property
    def begins_at_picture(self) -> bool:
        """Whether there is a column for the latents of a picture."""
        return self.chain.shape[1] > 1 + 2 * self.evaluations + self.noises

    def is_full(self, k: int) -> bool:
        """Whether evaluation k runs the whole model."""
        return self.full is None or bool(self.full[k])

    @property
    def full_share(self) -> float:
        """The share of evaluations that run the whole model."""
        return 1.0 if self.full is None else float(self.full.mean())

    def guided(self, guidance_scale: float | np.ndarray) -> np.ndarray:
        """The matrix over both outputs of every evaluation, [N + 1, 1 + 2 N + ..] float64.

        Output k becomes two columns, unguided first: `(1 - g) * unguided + g * guided`
        (Ho and Salimans 2022, arXiv:2207.12598, in the field's convention). The scale is one for
        all, or [N], where 1 leaves the unguided output out.
        """
        return guided_matrix(self.matrix, self.evaluations, guidance_scale)


def guided_matrix(matrix: np.ndarray, count: int, guidance_scale: float | np.ndarray) -> np.ndarray:
    """See `SamplerTable.guided`; also for a chain."""
    start, outputs, rest = np.split(matrix, [1, 1 + count], axis=1)
    scale = np.broadcast_to(guidance_scale, (count,))
    both = outputs[:, :, None] * np.stack([1.0 - scale, scale], axis=1)
    return np.concatenate([start, both.reshape(count + 1, 2 * count), rest], axis=1)


class Recorder:
    """The run that writes the table: latents are vectors over columns.

    Columns: start, picture, then three equal stretches of outputs, noises and states. A state is
    the latents after an evaluation; it gets a column, so that what follows stays short. A run that
    clips has a fourth stretch: what clipping adds to the clean picture of each evaluation.
    """

    def __init__(self, evaluations: int, clips: bool = False) -> None:
        self.most, self.clips = evaluations, clips
        self.rows: list[np.ndarray] = []
        self.states: list[np.ndarray] = []
        self.timesteps: list[float] = []
        self.shares: list[tuple[float, float]] = []
        self.noises = 0
        self.start, self.picture = self._basis(0), self._basis(1)

    def _basis(self, column: int) -> np.ndarray:
        vector = np.zeros(2 + (4 if self.clips else 3) * self.most)
        vector[column] = 1.0
        return vector

    def output(self, x: np.ndarray, timestep: float, alpha: float, sigma: float) -> np.ndarray:
        self.rows.append(x)
        self.timesteps.append(timestep)
        self.shares.append((alpha, sigma))
        return self._basis(1 + len(self.rows))

    def clipped(self, clean: np.ndarray) -> np.ndarray:
        if not self.clips:
            return clean
        return clean + self._basis(1 + 3 * self.most + len(self.rows))

    def noise(self) -> np.ndarray:
        self.noises += 1
        return self._basis(1 + self.most + self.noises)

    def edited(self, x: np.ndarray) -> np.ndarray:
        self.states.append(x)
        return self._basis(1 + 2 * self.most + len(self.states))

    def clip(self, schedule: NoiseSchedule) -> Clip | None:
        if not self.clips:
            return None
        count = len(self.rows)
        weights = np.array(self.states)[:, 2 + 3 * self.most :][:, :count]
        assert (weights == np.diag(np.diag(weights))).all(), "a clean picture is read once"
        clean = [
            [clean_and_noise(schedule, x, 1.0 - x, *shares)[0] for x in (1.0, 0.0)]
            for shares in self.shares
        ]
        return Clip(schedule.clip_sample_range, np.array(clean), np.diag(weights).copy())

    def chain(self, picture: bool, scales: np.ndarray) -> np.ndarray:
        """See `SamplerTable.chain`."""
        count, most = len(self.rows), self.most
        columns = [0, *range(2, 2 + count), *range(2 + most, 2 + most + self.noises)]
        columns += [1] if picture else []
        columns += range(2 + 2 * most, 2 + 2 * most + count)
        states = np.array(self.states)[:, columns] / scales[1:, None]
        states[:, -count:] *= scales[1:]
        return np.concatenate([self.rows[0][None, columns], states])


def dense(chain: np.ndarray, scales: np.ndarray, edits: bool) -> np.ndarray:
    """The chain with every earlier row written out; see `SamplerTable.matrix`."""
    count = len(chain) - 1
    known = chain[:, :-count]
    if edits:
        known = np.concatenate([known, np.eye(count + 1)[:, 1:] / scales[:, None]], axis=1)
    matrix = np.zeros_like(known)
    for k in range(count + 1):
        matrix[k] = known[k] + chain[k, -count:] @ matrix[1:]
    return matrix


def sampler_table(
    config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    denoise_from: int = 0,
    picture: bool = False,
    edits: bool = False,
) -> SamplerTable:
    """The table of a `scheduler_config.json` for a number of steps.

    timesteps, sigmas: instead of the spacing's own, falling; sigmas with the last level. They
        decide the number of steps.
    denoise_from: steps left out at the start; the run then begins at a picture with the noise of
        that step. picture: begin at one also when none is left out.
    edits: give the latents after every evaluation a column of their own.
    Raises UsageError for an unknown scheduler, an option that is not linear, steps outside 1 to
    the number of training steps or that the solver cannot take, rungs that do not fall.
    """
    own = tuple(
        None if rungs is None else tuple(float(value) for value in rungs)
        for rungs in (timesteps, sigmas)
    )
    if None not in own:
        raise UsageError("timesteps and sigmas both; give one of them")
    text = json.dumps(dict(config), sort_keys=True)
    begin = denoise_from, picture or bool(denoise_from)
    long = isinstance(num_inference_steps, int) and num_inference_steps > LONG
    return (_long_table if long else _table)(text, num_inference_steps, own, begin, edits)


Rungs = tuple[float, ...] | None


@lru_cache(maxsize=64)
def _table(
    config_json: str, steps: int, own: tuple[Rungs, ...], begin: tuple[int, bool], edits: bool
) -> SamplerTable:
    config = json.loads(config_json)
    try:
        with np.errstate(all="ignore"):  # what comes to no number is refused
            return _written(config, steps, own, begin, edits)
    except (ArithmeticError, ValueError) as error:
        raise UsageError(
            f"{steps} steps of {sampler_name(config)} cannot be laid out: {error}; expected levels "
            "of noise that rise with the training steps, none of them infinite"
        ) from error


def _written(
    config: dict[str, Any],
    steps: int,
    own: tuple[Rungs, ...],
    begin: tuple[int, bool],
    edits: bool,
) -> SamplerTable:
    denoise_from, picture = begin
    sampler = SAMPLERS[sampler_name(config)]
    schedule = schedule_from_config(config, sampler.defaults, sampler.reads)
    rungs = _ladder(sampler, schedule, steps, *own)
    if not 0 <= denoise_from < len(rungs.timesteps):
        raise UsageError(
            f"{denoise_from!r} steps left out of {len(rungs.timesteps)}; expected fewer than all"
        )
    rungs = rungs.after(denoise_from)
    run = Recorder(sampler.most_evaluations(len(rungs.timesteps)), schedule.clip_sample)
    x = sampler.family.start(schedule, rungs) * run.start
    if picture:
        of_picture, of_noise = sampler.family.mix(schedule, rungs)
        x = of_picture * run.picture + of_noise * run.start
    sampler.solve(schedule, rungs, x, run)
    shares = np.array([*run.shares, (1.0, 0.0)])
    scales = 1.0 / shares[:, 0] if sampler.family is karras else np.ones(len(shares))
    chain = run.chain(picture, scales)
    if not np.isfinite(chain).all():
        raise UsageError(f"{steps} steps of {sampler_name(config)} hold no finite numbers")
    matrix = dense(chain, scales, edits)
    for array in (chain, matrix):
        array.setflags(write=False)
    timesteps = np.array(run.timesteps)
    return SamplerTable(timesteps, matrix, run.noises, shares, scales, chain, run.clip(schedule))


# A table grows with the square of the steps: of a thousand it holds 24 MB.
_long_table = lru_cache(maxsize=2)(_table.__wrapped__)


def _ladder(
    sampler: Sampler, schedule: NoiseSchedule, steps: int, timesteps: Rungs, sigmas: Rungs
) -> spacing.TimestepGrid:
    if timesteps is not None or sigmas is not None:
        if sigmas is not None and sampler.family is samplers_discrete:
            raise UsageError("this scheduler goes by timesteps; give timesteps, not sigmas")
        return spacing.given(schedule, timesteps, sigmas)
    most = min(MAX_STEPS, schedule.num_train_timesteps)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise UsageError(f"{steps!r} steps; expected a whole number from 1 to {most}")
    laid = spacing.scheduled if schedule.sigma_schedule else sampler.ladder
    rungs = laid(schedule, steps)
    heights = rungs.levels[:-1] or rungs.timesteps
    falling = all(a > b for a, b in itertools.pairwise(heights))
    lowest, highest = min(rungs.timesteps), max(rungs.timesteps)
    discrete = schedule.timestep_type == "discrete"
    if not falling or (discrete and not 0 <= lowest <= highest < schedule.num_train_timesteps):
        raise UsageError(
            f"{steps} steps of {schedule.timestep_spacing} spacing do not fit "
            f"{schedule.num_train_timesteps} training steps; ask for another number"
        )
    return rungs


def sample(
    table: SamplerTable,
    model: Callable[[np.ndarray, float], np.ndarray],
    init: np.ndarray,
    noise: Sequence[np.ndarray] = (),
    picture: np.ndarray | None = None,
    on_step: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """A denoising loop of one's own over a table without edits.

    model: called with (latents, timestep), gives the output of the same shape
    init: starting noise of unit variance, any shape. noise: M fresh ones of that shape
    picture: the picture's latents, for a table made with `denoise_from`
    on_step: called with the evaluations done and the latents after each
    Raises UsageError where the columns given are not the table's.
    """
    last = [] if picture is None else [picture]
    if 1 + table.evaluations + len(noise) + len(last) != table.matrix.shape[1]:
        raise UsageError(
            f"{len(noise)} fresh noises and {len(last)} pictures; the table has "
            f"{table.noises} and {table.matrix.shape[1] - 1 - table.evaluations - table.noises}"
        )
    rows = table.chain.astype(np.float32)
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
            history[len(fixed) + k] += table.clip.change(k, x, output).reshape(-1)
        x = history[len(fixed) + k].reshape(init.shape).copy()
        if on_step:
            on_step(k + 1, x)
    return x
