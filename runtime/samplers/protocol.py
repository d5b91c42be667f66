"""What a solver is given besides its numbers: the model, fresh noise, and a place for edits.

A solver does not care what a latent is: anything that can be added and multiplied by a number.
"""

from typing import Any, Protocol

Latent = Any


class Run(Protocol):
    """One sampling run, as a solver sees it."""

    def output(self, x: Latent, timestep: float, alpha: float, sigma: float) -> Latent:
        """The model's output at a timestep for x of `alpha * clean + sigma * noise`."""
        ...

    def clipped(self, clean: Latent) -> Latent:
        """The clean latent, kept within bounds where the configuration says so."""
        ...

    def noise(self) -> Latent:
        """Fresh noise of unit variance."""
        ...

    def edited(self, x: Latent) -> Latent:
        """x after an evaluation's update, as the caller may have changed it."""
        ...
