"""Feature reuse: DeepCache, Ma et al. 2023 (arXiv:2312.00858).

Some evaluations run only the UNet's shallow layers, nearest to its input and output, with the deep
layers' feature of an earlier full evaluation, or with one that is extrapolated from the last two:
the first order of TaylorSeer, Liu et al. 2025 (arXiv:2503.06923). Knows sampler tables and
manifests; not how a network is split.
"""

import itertools
from collections.abc import Container, Sequence
from dataclasses import replace

import numpy as np

from sdrt.bundle.manifest import SHALLOW, Manifest
from sdrt.errors import UsageError

from .reuse_schedule import extrapolate, list_sources
from .samplers.table_data import SamplerTable


def with_feature_reuse(
    table: SamplerTable,
    every: int,
    rows: Sequence[int],
    changes: Sequence[bool] = (),
    order: int = 0,
) -> SamplerTable:
    """A table whose evaluations are full at the paper's uniform schedule.

    An evaluation with more rows than the previous one is full too, since those have no feature yet,
    and so is one that reads another prompt, whose feature would be the old one's. The count then
    starts again, and features from before are not extrapolated. See `list_sources`.

    Args:
        table: Of full evaluations.
        every: One of so many evaluations is full.
        rows: [N], rows of the model's batch in each evaluation.
        changes: [N], whether an evaluation reads another prompt than the one before; by default
            none does.
        order: 0 reads the last full evaluation's feature; 1 extrapolates it and the one before, by
            the number of evaluations since.
    """
    starts = [True, *(now > before for before, now in itertools.pairwise(rows))]
    if changes:
        starts = [start or change for start, change in zip(starts, changes, strict=True)]
    sources = list_sources(starts, every, extrapolates=order > 0)
    full = np.array([last == k for k, (last, _) in enumerate(sources)])
    weights = np.zeros((len(rows), 2))
    for k in np.flatnonzero(~full).tolist():
        last, before = sources[k]
        weights[k] = extrapolate(k, last, before if order else None)
    return replace(table, full_evaluations=full, feature_weights=weights)


def check_feature_reuse(
    manifest: Manifest, engines: Container[str], backend: str, has_control: bool
) -> None:
    """Raise UsageError where the bundle, the backend or the call cannot reuse features."""
    if has_control:  # the deep layers' feature would hold the control of an earlier evaluation
        raise UsageError("feature_reuse with control_image", hint="leave one of them out")
    if SHALLOW not in manifest.components:
        model = manifest.source.split(",")[0]
        raise UsageError(
            f"{manifest.name} was built without feature reuse",
            hint=f"run `sdrt build --model {model} --feature-reuse --force`",
        )
    if SHALLOW not in engines:
        raise UsageError(
            f"feature reuse is unsupported by {backend}",
            hint="leave it out, or choose --backend onnxruntime, openvino or torch",
        )
