"""Upscalers by name: what enlarges latents, and what enlarges images.

Knows A1111's names, Pillow, interpolation and upscalers' bundles; not where the result goes.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sdrt.bundle import Bundle, open_bundle
from sdrt.bundle.manifest import UPSCALER, read_manifest
from sdrt.bundle.store import bundle_name, find_bundle, list_bundles
from sdrt.engine import Engine, LazyEngine
from sdrt.errors import BundleError, UsageError

from .esrgan import Esrgan, read_scale
from .interpolation import Mode, interpolate


@dataclass(frozen=True, slots=True)
class LatentUpscaler:
    """Interpolates latents; no image is decoded."""

    title: str
    mode: Mode
    antialias: bool = False

    def upscale(self, latents: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """[C, H/8, W/8] -> [C, *sides]."""
        return interpolate(latents, sides, self.mode, self.antialias)


@dataclass(frozen=True, slots=True)
class ImageUpscaler:
    """Enlarges an image.

    Attributes:
        title: Its name.
        scale: Of the model behind it; 1 for a filter, which reaches any size.
        enlarge: An image to one `scale` times as large.
        resampling: Of what is left to the size asked for.
    """

    title: str
    resampling: Image.Resampling = Image.Resampling.LANCZOS
    scale: int = 1
    enlarge: Callable[[Image.Image], Image.Image] | None = None

    def upscale(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """An RGB image in the size (width, height)."""
        while self.enlarge and (image.width < size[0] or image.height < size[1]):
            image = self.enlarge(image)
        return image if image.size == size else image.resize(size, self.resampling)


Upscaler = LatentUpscaler | ImageUpscaler
LATENT_UPSCALERS = (
    LatentUpscaler("Latent", "bilinear"),
    LatentUpscaler("Latent (antialiased)", "bilinear", antialias=True),
    LatentUpscaler("Latent (bicubic)", "bicubic"),
    LatentUpscaler("Latent (bicubic antialiased)", "bicubic", antialias=True),
    LatentUpscaler("Latent (nearest)", "nearest"),
    LatentUpscaler("Latent (nearest-exact)", "nearest-exact"),
)
FILTERS = (
    ImageUpscaler("Lanczos"),
    ImageUpscaler("Nearest", Image.Resampling.NEAREST),
)
BUILT_IN: dict[str, Upscaler] = {
    upscaler.title.casefold(): upscaler for upscaler in (*LATENT_UPSCALERS, *FILTERS)
}


@dataclass(slots=True)
class Upscalers:
    """Upscalers by name, those of bundles with an engine that is loaded when it is first used.

    Attributes:
        load: Loads a component of a bundle; None where nothing is run.
    """

    load: Callable[[Bundle, str], Engine] | None = None
    _opened: dict[str, tuple[ImageUpscaler, Engine]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, name: str) -> Upscaler:
        """The upscaler of a name, in any case, or of a bundle's name or folder.

        Raises:
            UsageError: For an unknown name, and a bundle of something else.
            BundleError: For a damaged bundle.
        """
        if upscaler := BUILT_IN.get(name.strip().casefold()):
            return upscaler
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open(name)
            return self._opened[name][0]

    def _open(self, name: str) -> tuple[ImageUpscaler, Engine]:
        try:
            folder = find_bundle(name)
        except BundleError:
            raise UsageError(
                f"unknown upscaler {name!r}", hint=f"one of {', '.join(list_upscalers())}"
            ) from None
        bundle = open_bundle(folder)
        manifest, load = bundle.manifest, self.load
        if UPSCALER not in manifest.components:
            raise UsageError(
                f"the bundle {name!r} is not an upscaler", hint="see `sdrt build --upscaler`"
            )

        def open_engine() -> Engine:
            assert load is not None, "these upscalers are not run"
            return load(bundle, UPSCALER)

        engine = LazyEngine(open_engine, manifest.components[UPSCALER])
        width, height = manifest.sizes[0]
        esrgan = Esrgan(engine, read_scale(manifest), (height, width), manifest.multiple)
        return ImageUpscaler(manifest.name, scale=esrgan.scale, enlarge=esrgan.enlarge), engine

    def close(self) -> None:
        """Release the engines' memory."""
        with self._lock:
            for _, engine in self._opened.values():
                engine.close()


def list_upscalers() -> list[str]:
    """The names of all upscalers of this user: A1111's, then those of bundles."""
    names = []
    for folder in list_bundles():
        with contextlib.suppress(BundleError):
            if UPSCALER in read_manifest(folder).components:
                names.append(bundle_name(folder))
    return [*(upscaler.title for upscaler in BUILT_IN.values()), *sorted(names)]
