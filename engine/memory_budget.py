"""The memory that a bundle needs, estimated from its manifest before anything is loaded.

Knows manifests and how much memory is free; not backends. The figures are lower bounds: a backend
may hold weights twice while it loads, and pads its buffers. `memory_estimator` estimates single
calls.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import Manifest
from sdrt.errors import BackendError
from sdrt.process_stats import available_bytes

from .gpu import Gpu, free_memory

log = logging.getLogger(__name__)
ON_DEMAND = "vae_encoder"  # loaded for image-to-image and inpainting
MAX_IMAGES = 16  # at once; larger batches are no faster
USABLE_FRACTION = {
    True: 0.85,
    False: 0.5,
}  # of the free memory, for the largest batch


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of the weights, and of the largest component's activations."""

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
    """The memory that images of a size (width, height) need, at this many rows per evaluation.

    sequential: one component is loaded at a time
    streamed: the UNet's weights stay in host memory
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
    """The largest memory that a component's activations take at once, scaled from one row of the
    first size. The VAE runs one image at a time, and larger sizes than the bundle's in tiles.
    """
    (width, height), *_ = manifest.sizes
    pixels = size[0] * size[1]
    if name.startswith("vae"):
        rows, pixels = 1, min(pixels, max(w * h for w, h in manifest.sizes))
    if not name.startswith(("unet", "vae")):
        pixels = width * height  # not on pixels
    return manifest.components[name].activations * rows * pixels // (width * height)


def max_batch_images(manifest: Manifest, free: int) -> int:
    """How many guided images of the largest size fit into this many bytes at once; at least 1."""
    largest = max(manifest.sizes, key=lambda size: size[0] * size[1])
    fitting = [
        count
        for count in range(1, MAX_IMAGES + 1)
        if compute_budget(manifest, largest, 2 * count).total <= free
    ]
    return fitting[-1] if fitting else 1


def free_bytes(gpu: Gpu | None) -> int | None:
    """Free bytes of a GPU, or of the host and its container; None if unknown."""
    if gpu is None:
        return available_bytes()
    free = free_memory(gpu)
    return _ask_driver(gpu) if free is None else free


def _ask_driver(gpu: Gpu) -> int | None:
    """Where the management library is silent (Jetson, some containers) the driver tells, in a
    context that a backend needs anyway.
    """
    try:
        from .cuda.driver import get_device
    except ImportError:
        return None
    device = get_device(gpu.index)
    with device.use():
        return device.memory()[0]


def _join_budgets(
    manifests: Sequence[Manifest], size: tuple[int, int], sequential: bool, streamed: bool
) -> MemoryBudget:
    """Of models that generate one guided image together: of a refiner, its decoder counts too,
    which is not loaded.
    """
    budgets = [
        compute_budget(manifest, size, 2, sequential=sequential, streamed=streamed)
        for manifest in manifests
    ]
    if sequential:
        return max(budgets, key=lambda budget: budget.total)
    weights = sum(budget.weights for budget in budgets)
    return MemoryBudget(weights, max(budget.activations for budget in budgets))


def compute_full_budget(
    bundle: Bundle,
    control_bundles: Sequence[Bundle] = (),
    refiner: Bundle | None = None,
    sequential: bool = False,
    streamed: bool = False,
) -> MemoryBudget:
    """What one guided image of the first size needs, with nets and refiner; as `check_memory`."""
    manifests = [bundle.manifest, *([refiner.manifest] if refiner else [])]
    needed = _join_budgets(manifests, bundle.manifest.sizes[0], sequential, streamed)
    nets = sum(of.bytes for of in control_bundles)
    if control_bundles and not sequential:  # the UNet's second graph holds its weights again
        nets += weight_bytes(bundle.manifest, "unet")
    return replace(needed, weights=needed.weights + nets)


def check_memory(
    bundle: Bundle,
    gpu: Gpu | None,
    sequential: bool,
    streamed: bool = False,
    control_bundles: Sequence[Bundle] = (),
    refiner: Bundle | None = None,
) -> None:
    """Log what one guided image needs; raise BackendError if it is not free.

    control_bundles: whose nets stay loaded next to the UNet, as its second graph does
    refiner: whose text encoder and UNet are loaded too, or one of them at a time
    """
    manifest, free = bundle.manifest, free_bytes(gpu)
    size = manifest.sizes[0]
    needed = compute_full_budget(bundle, control_bundles, refiner, sequential, streamed)
    numbers = (
        f"at least {needed.total / 1e6:,.0f} MB (weights {needed.weights / 1e6:,.0f}, activations "
        f"{needed.activations / 1e6:,.0f} for an image of {size[0]}x{size[1]})"
    )
    if free is None:
        log.debug("Memory: %s", numbers)
        return
    log.debug("Memory: %s; %s MB free", numbers, f"{free / 1e6:,.0f}")
    if needed.total > free:
        less = compute_full_budget(bundle, control_bundles, refiner, True, streamed).total
        fits = less < min(free, needed.total)
        where = f"on GPU {gpu.index}" if gpu else "of host memory"
        raise BackendError(
            f"{manifest.name} needs {numbers}; {free / 1e6:,.0f} MB {where} are free",
            hint=f"--low-memory needs {less / 1e6:,.0f} MB" if fits else None,
        )
