"""Where a run starts: noise from a seed, latents, or an image under noise.

Noise is sampled in diffusers' order: the encoder's, the starting noise, the masked image's, then
the fresh noises.
Knows options and the encoder's moments; not the loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.errors import UsageError

from .images import depth_to_array, image_to_array, mask_to_array
from .job import GenerationJob
from .noise import Noise, noise_from_seed
from .options import GenerationOptions
from .requests import Request

Shape = tuple[int, int, int]  # [C, H/8, W/8]
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class LatentDistribution:
    """An encoded image: mean and standard deviation of its latents, [C, H/8, W/8] each."""

    mean: np.ndarray
    std: np.ndarray

    def sample(self, noise: Noise) -> np.ndarray:
        """Latents [C, H/8, W/8]."""
        if not self.std.any():  # an encoder without deviation; diffusers samples no noise then
            return self.mean
        return self.mean + self.std * noise.randn(self.mean.shape)


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """The encoded image inputs of a call; None where there is none.

    Attributes:
        image: The image to start from.
        masked_image: The same with the masked area grey, for inpainting models.
        mask: [1, H/8, W/8], 0 where the image stays and 1 where it is replaced.
        depth: [1, H/8, W/8] in [-1, 1].
    """

    image: LatentDistribution | None = None
    masked_image: LatentDistribution | None = None
    mask: np.ndarray | None = None
    depth: np.ndarray | None = None

    @property
    def blends_mask(self) -> bool:
        """Whether the loop puts the unmasked area back; an inpainting model is given the mask."""
        return self.mask is not None and self.masked_image is None


@dataclass(frozen=True, slots=True)
class InitialState:
    """What one image starts from.

    Attributes:
        columns: [C, H/8, W/8] each: starting noise, fresh noises, and the image's latents where
            the run starts from them.
        image_latents: [C, H/8, W/8], zeros without an image.
        extra_channels: [E, H/8, W/8].
    """

    columns: Sequence[np.ndarray]
    image_latents: np.ndarray
    extra_channels: np.ndarray


def encode_image_inputs(
    encode: Encode, job: GenerationJob, shape: Shape, in_channels: int
) -> ImageInputs:
    """Encode the image inputs of a job, once for all of its seeds.

    Args:
        encode: [1, 3, H, W] in [-1, 1] to mean and standard deviation, [C, H/8, W/8].
        job: The call.
        shape: Of one image's latents.
        in_channels: Of the UNet; more than the latents' for inpainting and depth models.

    Raises:
        UsageError: For inputs that do not fit the model or each other.
    """
    options = job.options
    _check_latents(options, shape)
    num_extra = in_channels - shape[0]
    check_task(options, num_extra, shape[0])
    latent_size = (shape[2], shape[1])
    depth = depth_to_array(options.depth_map, latent_size) if options.depth_map else None
    if options.image_latents is not None:
        latents = options.image_latents[0]
        return ImageInputs(LatentDistribution(latents, np.zeros_like(latents)), depth=depth)
    if options.image is None:
        return ImageInputs(depth=depth)
    pixels = image_to_array(options.image, job.size)
    image = LatentDistribution(*encode(pixels))
    mask = masked_image = None
    if options.mask_image is not None:
        mask = mask_to_array(options.mask_image, options.image, latent_size)[0]
        if num_extra:
            masked = mask_to_array(options.mask_image, options.image, job.size)
            unmasked_pixels = pixels * (masked < 0.5).astype(np.float32)
            masked_image = LatentDistribution(*encode(unmasked_pixels))
    return ImageInputs(image, masked_image, mask, depth)


def check_task(options: GenerationOptions, num_extra: int, channels: int) -> None:
    """Raise UsageError unless the image inputs are those that the model accepts.

    Args:
        options: Of the call.
        num_extra: Channels that the UNet reads besides the latents.
        channels: Of the latents.
    """
    if num_extra == 0 and options.depth_map is not None:
        raise UsageError(
            "depth_map is unsupported by this model", hint="build a bundle of a depth model"
        )
    if num_extra == 1 and options.depth_map is None:
        raise UsageError(
            "this depth model requires depth_map", hint="pass depth_map=... (--depth FILE)"
        )
    if num_extra == channels + 1 and options.mask_image is None:
        raise UsageError(
            "this inpainting model requires image and mask_image",
            hint="pass image=... and mask_image=... (--image FILE --mask FILE)",
        )
    if num_extra not in (0, 1, channels + 1):
        raise UsageError(f"this model reads {num_extra} extra channels, which is unsupported")


def _check_latents(options: GenerationOptions, shape: Shape) -> None:
    if options.latents is None:
        return
    latents = np.asarray(options.latents)
    if latents.shape[1:] != shape or not np.issubdtype(latents.dtype, np.floating):
        expected = ", ".join(map(str, shape))
        raise UsageError(
            f"latents are {list(latents.shape)} of {latents.dtype}; expected [images, {expected}] "
            "of floats"
        )
    if not np.isfinite(latents).all():
        raise UsageError("latents hold NaN or infinity")


def build_initial_state(
    request: Request, job: GenerationJob, shape: Shape, inputs: ImageInputs
) -> InitialState:
    """Sample the noise of one image; it does not depend on the other images of its batch."""
    options, table = job.options, job.table
    noise = noise_from_seed(request.seed, options.rng)
    image_latents = np.zeros(shape, np.float32)
    if inputs.image is not None and (table.starts_from_image or inputs.masked_image is None):
        image_latents = inputs.image.sample(noise)
    if options.image_latents is not None:
        image_latents = _select_latents("image_latents", options.image_latents, request)
    # diffusers samples no starting noise for a run that takes over noisy latents.
    continues = job.continues_after is not None
    for _ in range(job.continues_after or 0):
        noise.randn(shape)
    start = np.zeros(shape, np.float32) if continues else noise.randn(shape)
    if options.latents is not None:
        start = _select_latents("latents", np.asarray(options.latents), request)
    extra = [] if inputs.depth is None else [inputs.depth]
    if inputs.masked_image is not None and inputs.mask is not None:
        extra = [inputs.mask, inputs.masked_image.sample(noise)]
    elif inputs.blends_mask and inputs.image is not None:
        inputs.image.sample(noise)  # diffusers encodes the masked image of every model
    fresh = [noise.randn(shape) for _ in range(table.num_noises)]
    return InitialState(
        [start, *fresh, *([image_latents] if table.starts_from_image else [])],
        image_latents,
        np.concatenate(extra) if extra else np.zeros((0, *shape[1:]), np.float32),
    )


def _select_latents(name: str, latents: np.ndarray, request: Request) -> np.ndarray:
    """[C, H/8, W/8] of one image, float32; one of `image_latents` alone is for all images."""
    index = 0 if name == "image_latents" and len(latents) == 1 else request.index
    if index >= len(latents):
        raise UsageError(
            f"{len(latents)} {name} for image {request.index + 1}",
            hint="pass latents for every image",
        )
    return np.asarray(latents[index], np.float32)
