"""What an image costs before it is generated: evaluations, rows of the model's batch, seconds.

Knows validated calls and measured costs; not the queue.
"""

from dataclasses import dataclass

import numpy as np

from sdrt.runtime.controlnet.unit import mean_cost
from sdrt.runtime.job import GenerationJob
from sdrt.runtime.prompt_timeline import PromptTimeline

from .cost_model import CostModel


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """The cost of one image.

    Attributes:
        evaluations: Of the model, in all passes.
        shallow_evaluations: Those of them that reuse features.
        rows: Of the model's batch, summed over the evaluations: guidance adds one to each.
        seconds: If nothing else runs.
    """

    evaluations: int
    shallow_evaluations: int
    rows: int
    seconds: float


def estimate_run(job: GenerationJob, costs: CostModel) -> RunEstimate:
    """Estimate the first image of a call from the costs that were measured on this machine."""
    request = job.requests[0]
    parts = [_estimate_pass(job, job.get_timeline(request), costs)]
    size = job.size
    if later := job.later_pass:
        parts.append(_estimate_pass(later.job, later.get_timeline(request), costs))
        size = later.job.size
    fixed = costs.encode_seconds + costs.for_size(size).decode_seconds
    return RunEstimate(
        sum(part.evaluations for part in parts),
        sum(part.shallow_evaluations for part in parts),
        sum(part.rows for part in parts),
        fixed + sum(part.seconds for part in parts),
    )


def _estimate_pass(job: GenerationJob, timeline: PromptTimeline, costs: CostModel) -> RunEstimate:
    """One pass, without encoding and decoding."""
    table, own = job.get_table(timeline), costs.for_size(job.size)
    rows = job.get_guidance(timeline).num_rows
    full = np.array([table.is_full(k) for k in range(table.evaluations)], bool)
    control = own.control_ratio * mean_cost(job.control_units, table.evaluations)
    relative = np.where(full, 1.0, own.shallow_ratio) + control
    seconds = sum(own.seconds(int(n)) * float(r) for n, r in zip(rows, relative, strict=True))
    return RunEstimate(table.evaluations, int((~full).sum()), int(rows.sum()), seconds)
