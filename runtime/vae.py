"""The autoencoder: latents to images and back, one at a time, at once or in tiles, never black.

Knows the interfaces of the autoencoder's two components; not where latents come from.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sdrt.engine import Engine
from sdrt.engine.axes import tile_size
from sdrt.errors import SdrtError

from .images import pixels_from_latents

log = logging.getLogger(__name__)
DECODERS = ("vae_decoder", "vae_decoder_float32")
OVERLAP = 0.25  # of a tile
Size = tuple[int, int]  # height and width
Network = Callable[[np.ndarray], np.ndarray]


def decode_latents(
    engines: Mapping[str, Engine], tiling: "Tiling", latents: np.ndarray
) -> np.ndarray:
    """Decode one image; again in float32 where half precision overflows and the bundle has that.

    Args:
        engines: By component; without a decoder the latents are the pixels.
        tiling: Of the bundle's sizes.
        latents: [1, C, H/8, W/8] float32.

    Returns:
        [1, 3, H, W] float32 about [-1, 1].

    Raises:
        SdrtError: Rather than return NaN or infinity.
    """
    if not np.isfinite(latents).all():
        raise SdrtError(
            "the model's latents hold NaN or infinity, so no image was written",
            hint="build the bundle with --fp32, or lower the guidance scale",
        )
    if DECODERS[0] not in engines:
        return pixels_from_latents(latents)
    for name in DECODERS:
        if name in engines:
            pixels = tiling.decode(partial(_run_decoder, engines[name]), latents)
            if np.isfinite(pixels).all():
                return pixels
            if name != DECODERS[-1]:
                log.warning("the image overflows half precision: decoding it again in float32")
    raise SdrtError(
        "the image holds NaN or infinity, so it was not written",
        hint="build the bundle again with --force, or with --fp32",
    )


def _run_decoder(engine: Engine, latents: np.ndarray) -> np.ndarray:
    return engine({"latents": latents})["image"].astype(np.float32, copy=False)


def encode_pixels(
    engine: Engine, tiling: "Tiling", pixels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Encode one image.

    Args:
        engine: The encoder.
        tiling: Of the bundle's sizes.
        pixels: [1, 3, H, W] float32 in [-1, 1].

    Returns:
        Mean and standard deviation of its latents, [C, H/8, W/8] float32 each.
    """

    def moments(tile: np.ndarray) -> np.ndarray:
        outputs = engine({"image": tile})
        return np.concatenate([outputs["mean"], outputs["std"]], axis=1).astype(np.float32)

    mean, std = np.split(tiling.encode(moments, pixels)[0], 2)
    return mean, std


@dataclass(frozen=True, slots=True)
class Tiling:
    """How images larger than a bundle's sizes go through its autoencoder.

    Attributes:
        sizes: (H/8, W/8) of latents, see `tile_size`.
        scale: Pixels per side of a latent.
    """

    sizes: Sequence[Size]
    scale: int

    def decode(self, network: Network, latents: np.ndarray) -> np.ndarray:
        """[1, C, H/8, W/8] -> [1, 3, H, W] float32."""
        return self._blend_tiles(network, latents, self.scale, 1)

    def encode(self, network: Network, pixels: np.ndarray) -> np.ndarray:
        """[1, 3, H, W] -> [1, C, H/8, W/8] float32."""
        return self._blend_tiles(network, pixels, 1, self.scale)

    def _blend_tiles(self, network: Network, array: np.ndarray, up: int, down: int) -> np.ndarray:
        """Run the network on overlapping tiles and blend them along their borders.

        up, down: the output's side is `up / down` of the input's; one of them is 1
        """
        height, width = (side // down for side in array.shape[2:])  # of the latents
        sides = height, width
        spans = [
            tile_spans(side, tile)
            for side, tile in zip(sides, tile_size(sides, self.sizes), strict=True)
        ]
        if len(spans[0]) == len(spans[1]) == 1:
            return network(array[:, :, : height * down, : width * down])
        total, weight = np.zeros(0, np.float32), np.zeros(0, np.float32)
        for rows in spans[0]:
            for columns in spans[1]:
                place = [slice(s.start * down, s.stop * down) for s in (rows, columns)]
                output = network(array[:, :, place[0], place[1]])
                if not total.size:
                    total = np.zeros((*output.shape[:2], *(n * up for n in sides)), np.float32)
                    weight = np.zeros(total.shape[2:], np.float32)
                weights = np.outer(
                    *(tile_weights(s, n, up) for s, n in zip((rows, columns), sides, strict=True))
                )
                out = tuple(slice(s.start * up, s.stop * up) for s in (rows, columns))
                total[:, :, out[0], out[1]] += weights * output
                weight[out] += weights
        return total / weight


def tile_spans(side: int, tile: int) -> list[slice]:
    """Tiles along a side: of one length, evenly spaced, overlapping by a quarter of it or more."""
    if side <= tile:
        return [slice(0, side)]
    overlap = max(1, int(tile * OVERLAP))
    count = math.ceil((side - overlap) / (tile - overlap))
    starts = [round(i * (side - tile) / (count - 1)) for i in range(count)]
    return [slice(start, start + tile) for start in starts]


def tile_weights(span: slice, side: int, up: int) -> np.ndarray:
    """A tile's weights along one side, [length * up] float32.

    They rise from the tile's borders over the overlap, and are full at the image's borders.
    """
    length = (span.stop - span.start) * up
    ramp = max(1.0, (span.stop - span.start) * OVERLAP * up)
    at = np.arange(length) + 0.5
    left = at if span.start > 0 else np.full(length, ramp)
    right = at[::-1] if span.stop < side else np.full(length, ramp)
    return (np.minimum(np.minimum(left, right), ramp) / ramp).astype(np.float32)
