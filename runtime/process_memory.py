"""The memory that models take, of this process and of GPUs, for servers that load and unload them.

Knows what engines measure; not models.
"""

from sdrt.engine.gpu import Gpu, detect_gpus, free_memory
from sdrt.engine.memory_estimator import format_bytes
from sdrt.engine.page_cache import limit_arenas, trim_heap
from sdrt.process_stats import resident_bytes

__all__ = [
    "Gpu",
    "detect_gpus",
    "format_bytes",
    "free_memory",
    "limit_arenas",
    "resident_bytes",
    "trim_heap",
]
