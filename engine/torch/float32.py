"""Float32 as it is on the CPU: torch's TensorFloat-32 settings for the length of a call.

cuDNN rounds the operands of float32 convolutions to 10 bits by default, which fails the parity
thresholds of a float32 bundle. The settings belong to the process, so they are set only while
`GPU_LOCK` is held, and what other users of torch had set is set again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Convolutions and matrix products in full float32."""
    backends: Any = torch.backends  # the settings that torch documents, which its stubs lack
    settings = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    saved = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, saved, strict=True):
            setting.fp32_precision = precision
