"""The picture forming: latents to colours without the decoder, by a projection fitted at build."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .denoising import Step
from .images import image_grid, images_from_decoded


class Preview:
    """Small pictures of a run's steps. One object sees the steps of one run, in order."""

    def __init__(self, projection: Sequence[Sequence[float]]) -> None:
        """projection: [3, C + 1], colours in [-1, 1] from latents and 1."""
        self.projection = np.array(projection, np.float32)
        self._before: Step | None = None

    def image(self, step: Step) -> Image.Image:
        """All pictures of the batch, one pixel a latent, as the last two steps foretell them."""
        clean = predict_denoised(self._before, step)
        self._before = None if step.index == step.total else step
        colours = np.einsum("rc,bchw->brhw", self.projection[:, :-1], clean)
        colours += self.projection[None, :, -1:, None]
        return image_grid(images_from_decoded(colours))


def predict_denoised(before: Step | None, step: Step) -> np.ndarray:
    """The clean latents that two steps agree on if the noise in both is the same."""
    if before is None or before.latents.shape != step.latents.shape:
        return step.latents
    weight = before.alpha * step.sigma - step.alpha * before.sigma
    if abs(weight) < 1e-6:
        return step.latents
    mixed = step.sigma * before.latents - before.sigma * step.latents
    clean: np.ndarray = mixed / np.float32(weight)
    return clean
