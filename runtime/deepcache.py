"""Feature reuse: evaluations that compute only the UNet's layers nearest to its input and output,
with what an earlier, full one made of the rest: DeepCache, Ma et al. 2023 (arXiv:2312.00858).

Knows sampler tables and manifests; not how a network is cut in two.
"""

from collections.abc import Container, Sequence
from dataclasses import replace

import numpy as np

from sdrt.bundle.manifest import SHALLOW, Manifest
from sdrt.errors import UsageError

from .samplers.table import SamplerTable


def with_feature_reuse(table: SamplerTable, every: int, rows: Sequence[int]) -> SamplerTable:
    """The table with every so many evaluations full, the paper's uniform schedule. An evaluation
    with more rows than the one before is full too, since those have no feature yet, and the count
    begins again.

    rows: [N] of each evaluation
    """
    full = np.ones(len(rows), bool)
    since = 0
    for k in range(1, len(rows)):
        since += 1
        full[k] = since == every or rows[k] > rows[k - 1]
        since = 0 if full[k] else since
    return replace(table, full=full)


def check_feature_reuse(manifest: Manifest, engines: Container[str], backend: str) -> None:
    """Raise UsageError where the bundle has no network that takes a feature, or the backend runs
    none.
    """
    if SHALLOW not in manifest.components:
        model = manifest.source.split(",")[0]
        raise UsageError(
            f"{manifest.name} was built without feature reuse; type: "
            f"sdrt build --model {model} --feature-reuse --force"
        )
    if SHALLOW not in engines:
        raise UsageError(
            f"{backend} does not reuse features yet; leave it out, or choose --backend "
            "onnxruntime, openvino or torch"
        )
