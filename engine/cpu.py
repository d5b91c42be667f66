"""What this machine's processor is and can do, as Linux tells it. Knows no engine."""

import platform
from functools import cache
from pathlib import Path


def has_bf16() -> bool:
    """Whether it multiplies in bfloat16."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_flags())


def has_amx() -> bool:
    """Whether it multiplies tiles of bfloat16 at once: some times faster than without."""
    return "amx_bf16" in _cpu_flags()


def cpu_fingerprint() -> str:
    """All that may decide how weights are laid out for it: the system, and what it can do."""
    named = platform.system(), platform.machine(), platform.processor()
    return " ".join((*named, *_cpu_flags()))


@cache
def _cpu_flags() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    line = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return line.partition(":")[2].split()
