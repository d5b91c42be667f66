"""Where a run begins: noise by seed, latents given, or a picture under noise.

Noise is drawn in the reference library's order: the encoder's, the start's, then the fresh ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.errors import UsageError

from .images import depth_array, image_array, mask_array
from .noise import Noise, noise_from_seed
from .options import GenerationOptions, Request
from .samplers.table import SamplerTable

Shape = tuple[int, int, int]
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class LatentDistribution:
    """A picture through the encoder: mean and deviation of its latents, [C, H/8, W/8]."""

    mean: np.ndarray
    std: np.ndarray

    def drawn(self, stream: Noise) -> np.ndarray:
        if not self.std.any():  # an encoder without deviation; the reference draws nothing then
            return self.mean
        return self.mean + self.std * stream.randn(self.mean.shape)


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """What a call's pictures share; None where there is none.

    picture: the given picture. kept: that with what the mask makes new left grey
    mask: [1, H/8, W/8] of 0 (keep) and 1. depth: [1, H/8, W/8] in [-1, 1]
    is_inpainting_model: whether the model is fed the mask; else what it keeps is put back after
        every evaluation
    """

    picture: LatentDistribution | None = None
    kept: LatentDistribution | None = None
    mask: np.ndarray | None = None
    depth: np.ndarray | None = None

    @property
    def is_inpainting_model(self) -> bool:
        return self.kept is not None


@dataclass(frozen=True, slots=True)
class InitialState:
    """One picture's own.

    columns: starting noise, fresh noises, and the given picture's latents where the run begins
        at them
    picture: those latents, zeros if there are none
    beside: [E, H/8, W/8] what the model is fed beside the latents
    """

    columns: Sequence[np.ndarray]
    picture: np.ndarray
    beside: np.ndarray


def encode_image_inputs(
    encode: Encode,
    options: GenerationOptions,
    size: tuple[int, int],
    shape: Shape,
    model_channels: int,
) -> ImageInputs:
    """Encode what is given once for all seeds; raises UsageError for what does not fit.

    encode: [1, 3, H, W] -> mean and deviation
    model_channels: of the UNet's input; more than the latents' for inpainting and depth models.
    """
    _check_latents(options, shape)
    beside = model_channels - shape[0]
    check_task(options, beside, shape[0])
    latent_size = (shape[2], shape[1])
    depth = depth_array(options.depth_map, latent_size) if options.depth_map else None
    if options.image is None:
        return ImageInputs(depth=depth)
    pixels = image_array(options.image, size)
    picture = LatentDistribution(*encode(pixels))
    mask = kept = None
    if options.mask_image is not None:
        mask = mask_array(options.mask_image, options.image, latent_size)[0]
        if beside:
            new = mask_array(options.mask_image, options.image, size)
            kept = LatentDistribution(*encode(pixels * (new < 0.5).astype(np.float32)))
    return ImageInputs(picture, kept, mask, depth)


def check_task(options: GenerationOptions, extra: int, channels: int) -> None:
    """Raise UsageError unless what is given is what the model takes."""
    if extra == 0 and options.depth_map is not None:
        raise UsageError("a depth map, but this model takes none; build a depth model")
    if extra == 1 and options.depth_map is None:
        raise UsageError("this model takes a depth map; give depth_map (--depth FILE)")
    if extra == channels + 1 and options.mask_image is None:
        raise UsageError("this is an inpainting model; give image and mask_image (--image, --mask)")
    if extra not in (0, 1, channels + 1):
        raise UsageError(f"this model takes {extra} channels beside the latents, which is unknown")


def _check_latents(options: GenerationOptions, shape: Shape) -> None:
    if options.latents is None:
        return
    shape_given = np.shape(options.latents)
    if shape_given[1:] != shape or not np.issubdtype(
        np.asarray(options.latents).dtype, np.floating
    ):
        raise UsageError(
            f"latents {list(shape_given)} of {np.asarray(options.latents).dtype}; expected "
            f"[pictures, {', '.join(map(str, shape))}] of floats"
        )
    if not np.isfinite(options.latents).all():
        raise UsageError("latents hold NaN or infinity")


def build_initial_state(
    request: Request,
    options: GenerationOptions,
    table: SamplerTable,
    shape: Shape,
    source: ImageInputs,
) -> InitialState:
    """Draw what one picture needs; the same whatever else is in its batch."""
    stream = noise_from_seed(request.seed, options.rng)
    picture = np.zeros(shape, np.float32)
    if source.picture is not None and (table.begins_at_picture or not source.is_inpainting_model):
        picture = source.picture.drawn(stream)
    noise = stream.randn(shape)
    if options.latents is not None:
        if request.index >= len(options.latents):
            raise UsageError(
                f"{len(options.latents)} latents for picture {request.index + 1}; give one each"
            )
        noise = np.asarray(options.latents[request.index], np.float32)
    beside = [source.depth] if source.depth is not None else []
    if source.kept is not None and source.mask is not None:
        beside = [source.mask, source.kept.drawn(stream)]
    fresh = [stream.randn(shape) for _ in range(table.noises)]
    begun = [picture] if table.begins_at_picture else []
    return InitialState(
        [noise, *fresh, *begun],
        picture,
        np.concatenate(beside) if beside else np.zeros((0, *shape[1:]), np.float32),
    )
