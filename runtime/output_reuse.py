"""Output reuse: only some evaluations of a run are computed. The outputs of the others are
extrapolated from the last two that were: the first order of TaylorSeer, Liu et al. 2025
(arXiv:2503.06923), for the whole network.

Solvers that do not clip are linear in the outputs, so the result is another table, of fewer
evaluations. Knows sampler tables and what cannot be extrapolated; not what evaluates them.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sdrt.errors import UsageError

from .controlnet.unit import ControlUnit
from .reuse_schedule import extrapolate, list_sources
from .samplers.table import expand_recurrence
from .samplers.table_data import SamplerTable


def with_output_reuse(table: SamplerTable, every: int) -> tuple[SamplerTable, list[int]]:
    """A table of the evaluations that are computed.

    Args:
        table: Of all N evaluations; see `check_output_reuse`.
        every: One of this many evaluations is computed, see `list_sources`.

    Returns:
        The table, and the indices of its evaluations among the N.
    """
    starts = [k == 0 for k in range(table.evaluations)]
    sources = list_sources(starts, every, extrapolates=True)
    computed = [k for k, (last, _) in enumerate(sources) if last == k]
    weights = _extrapolate(sources, computed)
    rows = [*computed, table.evaluations]
    recurrence, scales = _substitute_states(table, weights, rows), table.scales[rows]
    has_edits = table.matrix.shape[1] == table.recurrence.shape[1]
    return (
        replace(
            table,
            timesteps=table.timesteps[computed],
            matrix=expand_recurrence(recurrence, scales, has_edits),
            alphas_sigmas=table.alphas_sigmas[rows],
            scales=scales,
            recurrence=recurrence,
        ),
        computed,
    )


def _extrapolate(sources: Sequence[tuple[int, int | None]], computed: Sequence[int]) -> np.ndarray:
    """[N, n]: each output as a weighted sum of the computed ones, by the number of evaluations
    since. By timestep instead, weights would be unbounded where two timesteps are close.
    """
    weights = np.zeros((len(sources), len(computed)))
    for k, (last, before) in enumerate(sources):
        column = computed.index(last)
        weights[k, column], other = extrapolate(k, last, before)
        if before is not None:
            weights[k, column - 1] = other
    return weights


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


def check_output_reuse(
    table: SamplerTable, scales: np.ndarray, control: Sequence[ControlUnit], sampler: str
) -> None:
    """Raise UsageError for a run whose outputs cannot be extrapolated.

    Args:
        table: Of all N evaluations.
        scales: [N], the guidance scale of every evaluation.
        control: Of the run.
        sampler: Its name, for the error.
    """
    first = 1 + table.evaluations
    if table.recurrence[:, first : first + table.num_noises].any():
        raise UsageError(
            f"output_reuse with {sampler}, which adds noise, is unsupported: outputs cannot be "
            "extrapolated across it",
            hint="choose a sampler that adds no noise, such as DPM++ 2M",
        )
    if table.clip is not None:
        raise UsageError(
            f"output_reuse with {sampler}, which clips samples, is unsupported",
            hint="choose a sampler that does not, such as DPM++ 2M",
        )
    if (scales != scales[:1]).any():
        raise UsageError(
            "output_reuse with guidance on a part of the run is unsupported",
            hint="leave out guidance_interval, or output_reuse and the presets that set it",
        )
    if any((unit.start, unit.end) != (0.0, 1.0) for unit in control):
        raise UsageError(
            "output_reuse with control on a part of the run is unsupported",
            hint="leave out control_guidance_start and control_guidance_end, or output_reuse",
        )
