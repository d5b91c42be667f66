"""A component that is compiled for one shape of calls: OpenVINO fuses more where it knows them.

Imports openvino, so import it only where it is used.
"""

import threading
from collections.abc import Callable, Mapping

import numpy as np

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import SHALLOW
from sdrt.engine.axes import axis_lengths, spec_shape, tile_size
from sdrt.engine.protocol import Feeds, check_feeds
from sdrt.errors import BackendError

from .cache import Shapes
from .engine import OpenVinoEngine

ROWS = {"unet": 2, SHALLOW: 2, "vae_decoder": 1}  # of a call: those of one guided image


def static_shapes(bundle: Bundle, name: str, size: tuple[int, int]) -> Shapes | None:
    """The shapes of a component's inputs for one guided image.

    Args:
        bundle: The bundle.
        name: The component's name.
        size: (width, height) of the image in pixels.

    Returns:
        Shapes by the input's name; None for components that are not compiled for one shape.
    """
    if name not in ROWS:
        return None
    if name == "vae_decoder":
        size = tile_size(size, bundle.manifest.sizes)
    lengths = axis_lengths(bundle.manifest, size, ROWS[name])
    inputs = bundle.manifest.components[name].inputs
    return {spec.name: spec_shape(spec, lengths) for spec in inputs}


class StaticShapeEngine:
    """Calls of one shape run on an engine that is compiled for it, all others on one for any shape,
    which is loaded when the first of them comes.

    A call of more rows is several calls, whose last repeats a row if one is missing: so a row has
    the same result whichever rows it shares a call with.
    """

    def __init__(
        self,
        fixed: OpenVinoEngine,
        shapes: Shapes,
        load_dynamic: Callable[[], OpenVinoEngine],
    ) -> None:
        self.name, self.inputs, self.outputs = fixed.name, fixed.inputs, fixed.outputs
        self._fixed, self.static_shapes = fixed, shapes
        self._rows = next(iter(shapes.values()))[0]
        self._load_dynamic = load_dynamic
        self._dynamic: OpenVinoEngine | None = None
        self._weights: Feeds = {}
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        ready = check_feeds(self.name, self.inputs, feeds)
        if any(ready[name].shape[1:] != shape[1:] for name, shape in self.static_shapes.items()):
            return self._any_shape()(ready)
        count = len(next(iter(ready.values())))
        parts = [self._fixed(_take(ready, i, self._rows)) for i in range(0, count, self._rows)]
        if len(parts) == 1 and count == self._rows:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def _any_shape(self) -> OpenVinoEngine:
        with self._lock:
            if self._closed:
                raise BackendError(f"{self.name} is closed")
            if self._dynamic is None:
                self._dynamic = self._load_dynamic()
                if self._weights:
                    self._dynamic.refit(self._weights)
            return self._dynamic

    def refit(self, weights: Feeds) -> None:
        """See `Engine.refit`."""
        with self._lock:
            self._fixed.refit(weights)
            if self._dynamic is not None:
                self._dynamic.refit(weights)
            self._weights = weights

    def release_memory(self) -> None:
        """See `ReleasableMemory`."""
        for engine in (self._fixed, self._dynamic):
            if engine is not None:
                engine.release_memory()

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            self._closed = True
            self._fixed.close()
            if self._dynamic is not None:
                self._dynamic.close()


def _take(feeds: Mapping[str, np.ndarray], start: int, rows: int) -> dict[str, np.ndarray]:
    """`rows` rows of all inputs from one on, the last repeated where there are fewer."""
    taken = {name: array[start : start + rows] for name, array in feeds.items()}
    missing = rows - len(next(iter(taken.values())))
    if not missing:
        return taken
    return {name: np.concatenate([a, *[a[-1:]] * missing]) for name, a in taken.items()}
