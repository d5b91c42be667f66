"""The part of a run that one of several models does, by diffusers' `denoising_start` and
`denoising_end`: an ensemble of expert denoisers, Balaji et al. 2022 (arXiv:2211.01324).

Both are fractions of the training steps, so models whose samplers have other steps meet at one
timestep. Knows timesteps and tables of numbers; not solvers.
"""

from dataclasses import dataclass, replace

import numpy as np

from sdrt.errors import UsageError

from .table_data import SamplerTable


@dataclass(frozen=True, slots=True)
class RunPart:
    """Where a run begins and stops.

    Attributes:
        denoise_from: Steps left out at the start.
        image: Whether it starts from an image's latents.
        denoising_start: Where it takes over noisy latents, instead of `denoise_from`.
        denoising_end: Where it hands them over.
    """

    denoise_from: int = 0
    image: bool = False
    denoising_start: float | None = None
    denoising_end: float | None = None


def get_timestep_cutoff(fraction: float, num_train_timesteps: int) -> int:
    """The training step of a fraction of the run: evaluations at it or above are before it."""
    return round(num_train_timesteps - fraction * num_train_timesteps)


def count_steps_before(
    timesteps: np.ndarray, fraction: float, num_train_timesteps: int, evaluations_per_step: int
) -> int:
    """Steps of a run that begin before a fraction of it, as diffusers' `get_timesteps`: of samplers
    with two evaluations a step, a step whose second one lies behind it is run again.

    Args:
        timesteps: [N] of all evaluations of the run, or of its steps.
        fraction: Above 0, below 1.
        num_train_timesteps: Of the model.
        evaluations_per_step: Of the sampler.

    Raises:
        UsageError: No step is left.
    """
    cutoff = get_timestep_cutoff(fraction, num_train_timesteps)
    left = int((timesteps.astype(np.float32) < cutoff).sum())
    if evaluations_per_step == 2 and left % 2 == 0:
        left += 1
    if not left:
        raise UsageError(
            f"denoising_start {fraction:g} leaves no step of {len(timesteps)}",
            hint="lower it, or raise num_inference_steps",
        )
    return (len(timesteps) - left) // evaluations_per_step


def truncate_table(table: SamplerTable, fraction: float, num_train_timesteps: int) -> SamplerTable:
    """The evaluations of a run before a fraction of it.

    The result is the solver's latents after them, with the noise of the next evaluation. Their
    scale is the solver's: Karras solvers' latents are `denoised + sigma * noise`.

    Raises:
        UsageError: No evaluation is left.
    """
    cutoff = get_timestep_cutoff(fraction, num_train_timesteps)
    count = int((table.timesteps.astype(np.float32) >= cutoff).sum())
    if not count:
        raise UsageError(
            f"denoising_end {fraction:g} leaves no step of the run",
            hint="raise it, or raise num_inference_steps",
        )
    if count == table.evaluations:
        return table
    scale = table.scales[count]
    columns, num_noises = _columns_before(table, count)
    end = 1 + table.evaluations + table.num_noises + table.starts_from_image

    def cut(matrix: np.ndarray) -> np.ndarray:
        per_evaluation = range(end, end + count) if matrix.shape[1] > end else ()
        rows = matrix[: count + 1, [*columns, *per_evaluation]]
        rows[-1] *= scale
        rows.setflags(write=False)
        return rows

    alphas_sigmas, scales = (
        table.alphas_sigmas[: count + 1].copy(),
        table.scales[: count + 1].copy(),
    )
    alphas_sigmas[-1] *= scale
    scales[-1] = 1.0
    clip = table.clip
    return replace(
        table,
        timesteps=table.timesteps[:count],
        matrix=cut(table.matrix),
        num_noises=num_noises,
        alphas_sigmas=alphas_sigmas,
        scales=scales,
        recurrence=cut(table.recurrence),
        clip=clip and replace(clip, denoised=clip.denoised[:count], weights=clip.weights[:count]),
    )


def _columns_before(table: SamplerTable, count: int) -> tuple[list[int], int]:
    """The columns that the first evaluations read, but states and edits, and how many of them are
    fresh noises.
    """
    outputs, noises = 1 + table.evaluations, table.num_noises
    is_read = (table.recurrence[: count + 1, outputs : outputs + noises] != 0.0).any(axis=0)
    num_noises = int(np.flatnonzero(is_read)[-1]) + 1 if is_read.any() else 0
    image = [outputs + noises] if table.starts_from_image else []
    columns = [*range(1 + count), *range(outputs, outputs + num_noises), *image]
    return columns, num_noises
