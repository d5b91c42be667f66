"""Where a run begins: noise by seed, latents given, or a picture under noise.

Noise is drawn in the reference library's order: the encoder's, the start's, then the fresh ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.engine import Engine
from sdrt.errors import UsageError

from .noise import noise_from_seed
from .options import Options, Request
from .pictures import image_array, mask_array
from .samplers.table import SamplerTable

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Source:
    """What a call's pictures share: mean and deviation of the given picture's latents
    [C, H/8, W/8], and the mask [1, H/8, W/8] of 0 (keep) and 1; None where there is none.
    """

    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    mask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """One picture's columns: starting noise, fresh noises, and the given picture's latents where
    the run begins at them; and those latents, zeros if there are none.
    """

    columns: Sequence[np.ndarray]
    picture: np.ndarray


def source_of(encoder: Engine, options: Options, size: tuple[int, int], shape: Shape) -> Source:
    """Encode the given picture once for all seeds; raises UsageError for what does not fit."""
    _check_latents(options, shape)
    if options.image is None:
        return Source()
    found = encoder({"image": image_array(options.image, size)})
    mean, std = (found[name][0].astype(np.float32) for name in ("mean", "std"))
    mask = None
    if options.mask_image is not None:
        mask = mask_array(options.mask_image, options.image, (shape[2], shape[1]))[0]
    return Source(mean, std, mask)


def _check_latents(options: Options, shape: Shape) -> None:
    if options.latents is None:
        return
    found = np.shape(options.latents)
    if found[1:] != shape or not np.issubdtype(np.asarray(options.latents).dtype, np.floating):
        raise UsageError(
            f"latents {list(found)} of {np.asarray(options.latents).dtype}; expected "
            f"[pictures, {', '.join(map(str, shape))}] of floats"
        )
    if not np.isfinite(options.latents).all():
        raise UsageError("latents hold NaN or infinity")


def start_of(
    request: Request, options: Options, table: SamplerTable, shape: Shape, source: Source
) -> Start:
    """Draw what one picture needs; the same whatever else is in its batch."""
    stream = noise_from_seed(request.seed, options.rng)
    picture = np.zeros(shape, np.float32)
    if source.mean is not None and source.std is not None:
        picture = source.mean + source.std * stream.randn(shape)
    noise = stream.randn(shape)
    if options.latents is not None:
        if request.index >= len(options.latents):
            raise UsageError(
                f"{len(options.latents)} latents for picture {request.index + 1}; give one each"
            )
        noise = np.asarray(options.latents[request.index], np.float32)
    fresh = [stream.randn(shape) for _ in range(table.noises)]
    begun = [picture] if table.begins_at_picture else []
    return Start([noise, *fresh, *begun], picture)
