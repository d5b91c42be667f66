"""Previews: latents to colours by a projection fitted at the build, without the decoder."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .denoising import Step
from .images import images_from_decoded, make_grid


class Preview:
    """Previews of a run's steps. One object gets the steps of one run, in order."""

    def __init__(self, projection: Sequence[Sequence[float]]) -> None:
        """projection: [3, C + 1], colours in [-1, 1] from latents and 1."""
        self.projection = np.array(projection, np.float32)
        self._previous: Step | None = None

    def image(self, step: Step) -> Image.Image:
        """All images of the batch in a grid, one pixel per latent, as the last two steps predict
        them.
        """
        denoised = predict_denoised(self._previous, step)
        self._previous = None if step.index == step.total else step
        colours = np.einsum("rc,bchw->brhw", self.projection[:, :-1], denoised)
        colours += self.projection[None, :, -1:, None]
        return make_grid(images_from_decoded(colours))


def predict_denoised(previous: Step | None, step: Step) -> np.ndarray:
    """Predict the denoised latents from two steps, if both have the same noise.

    With `latents = alpha * denoised + sigma * noise` of two steps, noise is eliminated.

    Args:
        previous: The step before, if any.
        step: The current step.

    Returns:
        [B, C, H/8, W/8] float32.
    """
    if previous is None or previous.latents.shape != step.latents.shape:
        return step.latents
    weight = previous.alpha * step.sigma - step.alpha * previous.sigma
    if abs(weight) < 1e-6:
        return step.latents
    mixed = step.sigma * previous.latents - previous.sigma * step.latents
    denoised: np.ndarray = mixed / np.float32(weight)
    return denoised
