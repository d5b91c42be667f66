"""Runs that nobody looks into, handed whole to an engine that can run them so.

Knows runs and the engine protocol; not how a backend does it.
"""

from collections.abc import Sequence

import numpy as np

from sdrt.engine import Engine, Schedule

from .loop import Run


def sampled(unet: Engine, runs: Sequence[Run]) -> np.ndarray | None:
    """The result's latents [B, C, H/8, W/8], or None where the engine or the runs cannot do it."""
    whole = getattr(unet, "sampled", None)
    if whole is None or (schedule := schedule_of(runs)) is None:
        return None
    latents: np.ndarray = whole(schedule)
    return latents


def schedule_of(runs: Sequence[Run]) -> Schedule | None:
    """What runs at their beginning will do; None if they are not alike, or do what is not linear:
    set the spread of the guided output back, or clip.
    """
    first = runs[0]
    plan, guidance, count = first.plan, first.guidance, first.evaluations
    used = tuple(2 if scale != 1.0 else 1 for scale in guidance.scales)
    alike = all(run.plan is plan and run.guidance is guidance and not run.done for run in runs)
    if not alike or first.table.clip or (2 in used and not guidance.pairs):
        return None
    return Schedule(
        columns=np.stack([run.history.columns.reshape(-1, *run.history.shape) for run in runs]),
        rows=np.repeat(plan.rows[:, None], len(runs), axis=1),
        timesteps=np.repeat(
            np.asarray(first.table.timesteps, np.float32)[:, None], len(runs), axis=1
        ),
        used=used,
        per=plan.per,
        output_places=tuple(plan.output_place(k) for k in range(count)),
        state_places=(plan.state_place(count - 1), *(plan.state_place(k) for k in range(count))),
        told={name: np.stack([run.told[name] for run in runs]) for name in first.told},
        beside=np.stack([run.beside for run in runs]),
    )
