"""What a build needs, estimated before it begins from the sizes of the weights and of the images:
the memory, and roughly the time.

Knows headers of weight files and the arithmetic of published networks; reads no weights. The memory
is a lower bound: what is alive at once, not what a library allocates besides.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sdrt.bundle.safetensors import WIDTHS, read_header
from sdrt.errors import CheckpointError, SdrtError
from sdrt.process_stats import available_bytes

from .checkpoint import Checkpoint

log = logging.getLogger("sdrt.build")
Size = tuple[int, int]  # width and height in pixels
BASE_BYTES = 800_000_000  # of the process with torch and ONNX Runtime
# Bytes of activations for each pixel of an image: in the VAE six maps of 256 channels, in one row
# of the UNet as many of its smaller ones.
PIXEL_BYTES = {"vae": 6_000, "unet": 1_000}
# Bytes of the UNet's largest attention scores, for the square of the pixels: 8 heads on tokens of
# 8x8 pixels, and in models with two text encoders 10 heads on tokens of 16x16.
SCORE_BYTES = {1: 0.0078, 2: 0.0006}
# Arithmetic of one evaluation, in operations for each parameter and pixel.
OPERATIONS = {"unet": 0.004, "vae": 0.09}
# Of an export: see benchmarks/results/build_full_sdxl_fp16.json.
SECONDS_PER_PARAMETER, SECONDS_PER_EXPORT = 6e-8, 5.0
EVALUATIONS = {"unet": 11, "vae": 11}  # by torch and by the backend, together


@dataclass(frozen=True, slots=True)
class PartWeights:
    """The number of a part's parameters, and their bytes as they are stored."""

    parameters: int
    stored_bytes: int

    @property
    def width(self) -> int:
        """Bytes of most parameters."""
        return round(self.stored_bytes / max(1, self.parameters))


@dataclass(frozen=True, slots=True)
class BuildRequirements:
    """Estimated needs of a build.

    memory_bytes: what cannot be dropped when other processes need it; mapped weights can
    """

    memory_bytes: int
    seconds: float


def count_weights(checkpoint: Checkpoint) -> dict[str, PartWeights]:
    """The weights of every part, from the headers of its files."""
    counts = {}
    for part in checkpoint.parts:
        headers = [read_header(file, CheckpointError) for file in checkpoint.weight_files(part)]
        records = [record for header in headers for record in header.records.values()]
        sizes = [math.prod(record.shape) for record in records]
        stored = sum(
            WIDTHS[record.dtype] * size for record, size in zip(records, sizes, strict=True)
        )
        counts[part] = PartWeights(sum(sizes), stored)
    return counts


def estimate_requirements(
    weights: Mapping[str, PartWeights], sizes: Sequence[Size], dtype: str, rate: float
) -> BuildRequirements:
    """Estimate a build's needs.

    Args:
        weights: Of every part.
        sizes: Of the images that it is validated with.
        dtype: `float32` or `float16`, of the bundle.
        rate: Floating-point operations per second of this machine.
    """
    pixels = max(width * height for width, height in sizes)
    width = 2 if dtype == "float16" else 4
    encoders = 2 if "text_encoder_2" in weights else 1
    activations = {part: count * pixels for part, count in PIXEL_BYTES.items()}
    activations["unet"] += int(SCORE_BYTES[encoders] * pixels**2)
    # Weights in the bundle's precision stay in the mapped file; others are converted.
    needs = [
        activations.get(part, 0) + (0 if of.width == width else of.parameters * width)
        for part, of in weights.items()
    ]
    total_pixels = sum(width * height for width, height in sizes)
    seconds = sum(
        SECONDS_PER_EXPORT
        + SECONDS_PER_PARAMETER * of.parameters
        + EVALUATIONS.get(part, 0) * OPERATIONS.get(part, 0) * of.parameters * total_pixels / rate
        for part, of in weights.items()
    )
    return BuildRequirements(int(BASE_BYTES + max(needs)), seconds)


def check_requirements(checkpoint: Checkpoint, sizes: Sequence[Size], dtype: str) -> None:
    """Log what a build needs; raise SdrtError if the memory is not there."""
    needs = estimate_requirements(count_weights(checkpoint), sizes, dtype, measure_rate())
    free = available_bytes()
    log.info(
        "needs about %.1f GB of memory (%.1f GB free) and %s on this machine",
        needs.memory_bytes / 1e9,
        free / 1e9,
        format_duration(needs.seconds),
    )
    if needs.memory_bytes > free:
        raise SdrtError(
            f"the build needs about {needs.memory_bytes / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free",
            hint="close other programs, validate smaller images with --size, or build on a larger "
            "machine and copy the bundle",
        )


def measure_rate() -> float:
    """Floating-point operations per second, of a product of matrices that takes milliseconds."""
    side = 512
    matrix = torch.ones(side, side)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def format_duration(seconds: float) -> str:
    """For people: `40 seconds`, `12 minutes`."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{seconds / 60:.0f} minutes"
