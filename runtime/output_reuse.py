"""Output reuse: only some evaluations of a run are computed. In place of the others' guided outputs
stands what the last two computed ones extrapolate to, the first order of TaylorSeer, Liu et al.
2025 (arXiv:2503.06923), for the whole network.

Every solver is linear in the outputs, so this is another table, of fewer evaluations. Knows sampler
tables; not what evaluates them.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdrt.errors import UsageError

from .controlnet.unit import ControlUnit
from .reuse_schedule import list_sources
from .samplers.table_data import SamplerTable


def with_output_reuse(
    table: SamplerTable, every: int, scales: np.ndarray
) -> tuple[SamplerTable, list[int]]:
    """A table of the evaluations that are computed.

    Args:
        table: Of all evaluations; without clipping and without noises.
        every: One of so many evaluations is computed, see `list_sources`; so is one whose guidance
            scale is not that of the one before, and the count starts again.
        scales: [N], the guidance scale of every evaluation.

    Returns:
        The table, and which of the N evaluations are its own.
    """
    starts = [True, *(scales[1:] != scales[:-1]).tolist()]
    sources = list_sources(starts, every, extrapolates=True)
    computed = [k for k, (last, _) in enumerate(sources) if last == k]
    weights = _extrapolate(table.timesteps, sources, computed)
    rows = [*computed, table.evaluations]
    recurrence = _substitute_states(table, weights, rows)
    return (
        replace(
            table,
            timesteps=table.timesteps[computed],
            matrix=_reduce_matrix(table, weights, rows),
            alphas_sigmas=table.alphas_sigmas[rows],
            scales=table.scales[rows],
            recurrence=recurrence,
        ),
        computed,
    )


def _extrapolate(
    timesteps: np.ndarray, sources: Sequence[tuple[int, int | None]], computed: Sequence[int]
) -> np.ndarray:
    """[N, n]: what stands for each output, as a sum over the computed ones."""
    weights = np.zeros((len(timesteps), len(computed)))
    for k, (last, before) in enumerate(sources):
        column = computed.index(last)
        distance = 0.0 if before is None else timesteps[last] - timesteps[before]
        slope = (timesteps[k] - timesteps[last]) / distance if distance else 0.0
        weights[k, column] = 1.0 + slope
        if slope:
            weights[k, column - 1] = -slope
    return weights


def _reduce_matrix(table: SamplerTable, weights: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """`SamplerTable.matrix`; edits are those of the latents that the next evaluation reads."""
    count = table.evaluations
    start, outputs, rest = np.split(table.matrix, [1, 1 + count], axis=1)
    inputs = table.num_noises + table.starts_from_image
    edits = [inputs + row - 1 for row in rows[1:]] if rest.shape[1] > inputs else []
    others = rest[:, [*range(inputs), *edits]]
    return np.concatenate([start, outputs @ weights, others], axis=1)[rows]


def _substitute_states(table: SamplerTable, weights: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """`SamplerTable.recurrence`: a state that is left out is what its own row says."""
    count, left = table.evaluations, len(rows) - 1
    start, outputs, rest = np.split(table.recurrence, [1, 1 + count], axis=1)
    inputs, states = rest[:, :-count], rest[:, -count:]
    direct = np.concatenate([start, outputs @ weights, inputs], axis=1)
    width = direct.shape[1]
    known = np.zeros((count, width + left))  # of each state, over the new columns
    reduced = []
    for k in range(count + 1):
        row = np.concatenate([direct[k], np.zeros(left)]) + states[k] @ known
        if k in rows:
            reduced.append(row)
            row = np.zeros(width + left)
            row[width + len(reduced) - 2] = 1.0
        if k:
            known[k - 1] = row
    return np.array(reduced)


def check_output_reuse(table: SamplerTable, control: Sequence[ControlUnit], sampler: str) -> None:
    """Raise UsageError for runs that evaluations which are left out would change.

    Args:
        table: Of all evaluations.
        control: Of the run.
        sampler: Its name, for the error.
    """
    if table.num_noises:
        raise UsageError(
            f"output_reuse with {sampler}, which adds noise: outputs follow it and cannot be "
            "extrapolated",
            hint="choose a sampler that adds none, such as DPM++ 2M, or pass feature_reuse",
        )
    if table.clip is not None:
        raise UsageError(
            f"output_reuse with {sampler} that clips samples is unsupported",
            hint="choose a sampler that does not, such as DPM++ 2M",
        )
    if any((unit.start, unit.end) != (0.0, 1.0) for unit in control):
        raise UsageError(
            "output_reuse with control on a part of the run is unsupported",
            hint="leave out control_guidance_start and control_guidance_end, or output_reuse",
        )
