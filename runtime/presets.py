"""Presets: named options that make a run cheaper, by how far its images are from the full run's.

`benchmarks/fewer.py` measures them. Knows options by name; not what they do.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sdrt.errors import UsageError

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "exact": {},
        "balanced": {"output_reuse": 3},
        "fast": {"output_reuse": 5},
    }
)


def expand_preset(name: object, passed: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a preset's options with those that are passed, which take precedence. A `feature_reuse`
    above 1 replaces the preset's `output_reuse`.

    Raises:
        UsageError: There is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"preset {name!r}; expected {', '.join(PRESETS)}")
    options = dict(PRESETS[name])
    if passed.get("feature_reuse", 1) != 1:
        options.pop("output_reuse", None)
    return {**options, **passed}
