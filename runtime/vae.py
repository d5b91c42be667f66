"""Latents to pictures and pictures to latents: one at a time, whole or in tiles, never black.

Knows the interfaces of the autoencoder's two components; not what made the latents.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sdrt.engine import Engine
from sdrt.errors import SdrtError

from .images import pixels_of

log = logging.getLogger(__name__)
DECODERS = ("vae_decoder", "vae_decoder_float32")
OVERLAP = 0.25  # of a tile
Size = tuple[int, int]  # height and width
Call = Callable[[np.ndarray], np.ndarray]


def decode_latents(
    engines: Mapping[str, Engine], tiling: "Tiling", latents: np.ndarray
) -> np.ndarray:
    """One picture, [1, C, H/8, W/8] -> [1, 3, H, W] float32 about [-1, 1]: in float32 where half
    precision overflows and the bundle can. Without a decoder the latents are the picture. Raises
    SdrtError rather than give NaN or infinity.
    """
    if not np.isfinite(latents).all():
        raise SdrtError(
            "the model's latents hold NaN or infinity, so no picture was written; build the bundle "
            "with --fp32, or lower the guidance scale"
        )
    if DECODERS[0] not in engines:
        return pixels_of(latents)
    for name in DECODERS:
        if name in engines:
            picture = tiling.decode(partial(_image, engines[name]), latents)
            if np.isfinite(picture).all():
                return picture
            if name != DECODERS[-1]:
                log.warning("the picture overflows half precision: decoding it again in float32")
    raise SdrtError(
        "the picture holds NaN or infinity, so it was not written; build the bundle again "
        "with --force, or with --fp32"
    )


def _image(engine: Engine, latents: np.ndarray) -> np.ndarray:
    return engine({"latents": latents})["image"].astype(np.float32, copy=False)


def encode_pixels(
    engine: Engine, tiling: "Tiling", picture: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[1, 3, H, W] in [-1, 1] -> mean and deviation of its latents, [C, H/8, W/8] float32."""

    def moments(tile: np.ndarray) -> np.ndarray:
        found = engine({"image": tile})
        return np.concatenate([found["mean"], found["std"]], axis=1).astype(np.float32)

    mean, std = np.split(tiling.encode(moments, picture)[0], 2)
    return mean, std


@dataclass(frozen=True, slots=True)
class Tiling:
    """How pictures larger than a bundle's sizes go through its autoencoder.

    sizes: of latents, (H/8, W/8); what fits into one of them goes through whole, else in tiles of
        the largest
    scale: pixels of a latent's side
    """

    sizes: Sequence[Size]
    scale: int

    def tile_size(self, sides: Size) -> Size:
        """What goes through at once of latents of these sides."""
        if any(sides[0] <= height and sides[1] <= width for height, width in self.sizes):
            return sides
        return max(self.sizes, key=math.prod)

    def decode(self, call: Call, latents: np.ndarray) -> np.ndarray:
        """[1, C, H/8, W/8] -> [1, 3, H, W] float32."""
        return self._blend_tiles(call, latents, self.scale, 1)

    def encode(self, call: Call, picture: np.ndarray) -> np.ndarray:
        """[1, 3, H, W] -> [1, C, H/8, W/8] float32."""
        return self._blend_tiles(call, picture, 1, self.scale)

    def _blend_tiles(self, call: Call, whole: np.ndarray, up: int, down: int) -> np.ndarray:
        """Overlapping tiles through the network, faded into each other along their borders.

        up, down: the output's side is `up / down` of the input's; one of them is 1
        """
        height, width = (side // down for side in whole.shape[2:])  # of the latents
        sides = height, width
        spans = [
            tile_spans(side, tile) for side, tile in zip(sides, self.tile_size(sides), strict=True)
        ]
        if len(spans[0]) == len(spans[1]) == 1:
            return call(whole[:, :, : height * down, : width * down])
        total, weight = np.zeros(0, np.float32), np.zeros(0, np.float32)
        for rows in spans[0]:
            for columns in spans[1]:
                place = [slice(s.start * down, s.stop * down) for s in (rows, columns)]
                made = call(whole[:, :, place[0], place[1]])
                if not total.size:
                    total = np.zeros((*made.shape[:2], *(n * up for n in sides)), np.float32)
                    weight = np.zeros(total.shape[2:], np.float32)
                faded = np.outer(
                    *(tile_weights(s, n, up) for s, n in zip((rows, columns), sides, strict=True))
                )
                out = tuple(slice(s.start * up, s.stop * up) for s in (rows, columns))
                total[:, :, out[0], out[1]] += faded * made
                weight[out] += faded
        return total / weight


def tile_spans(side: int, tile: int) -> list[slice]:
    """Where tiles lie along a side: all of one length, spread evenly, overlapping by a quarter or
    more of it.
    """
    if side <= tile:
        return [slice(0, side)]
    overlap = max(1, int(tile * OVERLAP))
    count = math.ceil((side - overlap) / (tile - overlap))
    starts = [round(i * (side - tile) / (count - 1)) for i in range(count)]
    return [slice(start, start + tile) for start in starts]


def tile_weights(span: slice, side: int, up: int) -> np.ndarray:
    """A tile's weights along one side, [length * up] float32: rising from each border over the
    overlap, full at the picture's own.
    """
    length = (span.stop - span.start) * up
    ramp = max(1.0, (span.stop - span.start) * OVERLAP * up)
    at = np.arange(length) + 0.5
    left = at if span.start > 0 else np.full(length, ramp)
    right = at[::-1] if span.stop < side else np.full(length, ramp)
    return (np.minimum(np.minimum(left, right), ramp) / ramp).astype(np.float32)
