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


def expand_preset(name: object) -> Mapping[str, Any]:
    """The options of a preset; those that are passed by name go before them.

    Raises:
        UsageError: There is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise UsageError(f"preset {name!r}; expected {', '.join(PRESETS)}")
    return PRESETS[name]
