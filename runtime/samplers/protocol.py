"""What a solver gets besides its numbers: the model, noise, and a callback after each step.

A latent may be anything that can be added and multiplied by a number. Knows no solver.
"""

from typing import Any, Protocol

Latent = Any


class SolverContext(Protocol):
    """One sampling run, as a solver sees it."""

    def model(self, x: Latent, timestep: float, alpha: float, sigma: float) -> Latent:
        """The model output at a timestep for `x = alpha * denoised + sigma * noise`."""
        ...

    def clip(self, denoised: Latent) -> Latent:
        """The denoised latent, clipped if the configuration asks for it."""
        ...

    def noise(self) -> Latent:
        """New noise of unit variance."""
        ...

    def callback(self, x: Latent) -> Latent:
        """Called after each evaluation; returns x, which the caller may have changed."""
        ...
