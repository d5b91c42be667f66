"""How much memory a bundle needs, by arithmetic over its manifest, before anything is loaded.

Knows manifests and how much memory is free; not backends. The numbers are lower bounds: a backend
may keep weights twice while it loads, and pads what it computes with.
"""

import logging
from dataclasses import dataclass

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import Manifest
from sdrt.errors import BackendError
from sdrt.process_stats import available_bytes

from .gpu import Gpu, free_memory

log = logging.getLogger(__name__)
ON_DEMAND = "vae_encoder"  # loaded when a picture is given
MAX_IMAGES = 16  # at once; more are no faster anywhere
USABLE_FRACTION = {
    True: 0.85,
    False: 0.5,
}  # of the free memory, for the largest batch


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes. scratch: what the largest component that runs has alive at once"""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


def compute_budget(
    manifest: Manifest,
    size: tuple[int, int],
    rows: int,
    *,
    sequential: bool = False,
    streamed: bool = False,
) -> MemoryBudget:
    """What pictures of a size (width, height) need whose evaluations have so many rows.

    in_turn: one component is loaded at a time
    streamed: the UNet's weights stay with the host
    """
    parts = [
        MemoryBudget(
            0 if streamed and name == "unet" else weight_bytes(manifest, name),
            activation_bytes(manifest, name, size, rows),
        )
        for name in manifest.components
        if name != ON_DEMAND
    ]
    if sequential:
        return max(parts, key=lambda part: part.total)
    return MemoryBudget(
        sum(part.weights for part in parts), max(part.activations for part in parts)
    )


def weight_bytes(manifest: Manifest, name: str) -> int:
    record = manifest.files.get(f"{name}/model.safetensors")
    return record.size if record else 0


def activation_bytes(manifest: Manifest, name: str, size: tuple[int, int], rows: int) -> int:
    """What a component has alive at once, from the bytes of one row of the first size. Pictures go
    through the autoencoder one by one, those larger than the bundle's sizes in tiles.
    """
    (width, height), *_ = manifest.sizes
    pixels = size[0] * size[1]
    if name.startswith("vae"):
        rows, pixels = 1, min(pixels, max(w * h for w, h in manifest.sizes))
    if not name.startswith(("unet", "vae")):
        pixels = width * height  # it sees none
    return manifest.components[name].activations * rows * pixels // (width * height)


def max_batch_images(manifest: Manifest, free: int) -> int:
    """The most pictures of the largest size, guided, made at once in so many bytes; at least 1."""
    largest = max(manifest.sizes, key=lambda size: size[0] * size[1])
    fitting = [
        count
        for count in range(1, MAX_IMAGES + 1)
        if compute_budget(manifest, largest, 2 * count).total <= free
    ]
    return fitting[-1] if fitting else 1


def free_bytes(gpu: Gpu | None) -> int | None:
    """Bytes free on a GPU, or of the host's memory and that of its container; None where nobody
    says.
    """
    if gpu:
        return free_memory(gpu)
    return available_bytes()


def check_memory(bundle: Bundle, gpu: Gpu | None, sequential: bool, streamed: bool = False) -> None:
    """Say what one guided picture needs; raise BackendError with the numbers if it is not free."""
    manifest, free = bundle.manifest, free_bytes(gpu)
    size = manifest.sizes[0]
    needed = compute_budget(manifest, size, 2, sequential=sequential, streamed=streamed)
    numbers = (
        f"at least {needed.total / 1e6:,.0f} MB (weights {needed.weights / 1e6:,.0f}, scratch "
        f"{needed.activations / 1e6:,.0f} for a picture of {size[0]}x{size[1]})"
    )
    if free is None:
        log.info("memory: %s", numbers)
        return
    log.info("memory: %s; %s MB are free", numbers, f"{free / 1e6:,.0f}")
    if needed.total > free:
        less = compute_budget(manifest, size, 2, sequential=True, streamed=streamed).total
        fits = less < min(free, needed.total)
        hint = f"; --low-memory needs {less / 1e6:,.0f} MB" if fits else ""
        where = f"on GPU {gpu.index}" if gpu else "of the host's memory"
        raise BackendError(
            f"{manifest.name} needs {numbers}, and {free / 1e6:,.0f} MB {where} are free{hint}"
        )
