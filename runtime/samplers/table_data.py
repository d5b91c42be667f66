"""The numbers of a sampling run, which `table.py` writes.

Knows rows and columns; not solvers.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class DenoisedClipping:
    """`clip_sample`: the denoised image of each evaluation is clipped. Clipping is not linear, so
    it is not in the table but a step of its own after each row.

    Attributes:
        bound: Largest absolute value.
        denoised: [N, 2] factors of the model's input and of its guided output in the denoised
            image.
        weights: [N] factor of the denoised image in the next row.
    """

    bound: float
    denoised: np.ndarray
    weights: np.ndarray

    def correction(self, k: int, x: np.ndarray, output: np.ndarray) -> np.ndarray:
        """What clipping adds to the row after evaluation k; x is that evaluation's input."""
        input_scale, output_scale = self.denoised[k].astype(np.float32)
        denoised = input_scale * x + output_scale * output
        return np.float32(self.weights[k]) * (np.clip(denoised, -self.bound, self.bound) - denoised)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SamplerTable:
    """A sampling run of N model evaluations with M added noises. Compared by identity.

    Attributes:
        timesteps: [N] float64, the timestep of each evaluation as passed to the model.
        matrix: [N + 1, 1 + N + M + ..] float64. Row k < N is the model input of evaluation k,
            scaled as the model expects it; the last row is the result. Columns, in order: the
            initial noise of unit variance, the N outputs, the M added noises in the order of use;
            the image's latents if the run starts from an image (`denoise_from`, `image`); with
            `edits`, N edits, the k-th added to the latents after evaluation k.
        num_noises: M.
        alphas_sigmas: [N + 1, 2] float64; each row is `alpha * denoised + sigma * noise`, the
            result (1, 0).
        scales: [N + 1] float64; the solver's latents are a row times this (edits add to those).
        recurrence: [N + 1, columns + N] float64; the same rows as a short recurrence: the matrix's
            columns without edits, then one for each earlier row from the second on.
        clip: Clipping after each row, if any.
        full_evaluations: [N] bool, whether an evaluation runs the full model; the others run its
            shallow part with the features of the last full ones (see `deepcache.py`). None: all.
        feature_weights: [N, 2] float64, the shares of the last full evaluation's feature and of the
            one before in what each shallow evaluation reads.
    """

    timesteps: np.ndarray
    matrix: np.ndarray
    num_noises: int
    alphas_sigmas: np.ndarray
    scales: np.ndarray
    recurrence: np.ndarray
    clip: DenoisedClipping | None = None
    full_evaluations: np.ndarray | None = None
    feature_weights: np.ndarray | None = None

    @property
    def evaluations(self) -> int:
        return len(self.timesteps)

    @property
    def starts_from_image(self) -> bool:
        """Whether the table has a column for an image's latents."""
        return self.recurrence.shape[1] > 1 + 2 * self.evaluations + self.num_noises

    def is_full(self, k: int) -> bool:
        """Whether evaluation k runs the full model."""
        return self.full_evaluations is None or bool(self.full_evaluations[k])

    @property
    def full_fraction(self) -> float:
        """The fraction of evaluations that run the full model."""
        return 1.0 if self.full_evaluations is None else float(self.full_evaluations.mean())

    def with_guidance(self, guidance_scale: float | np.ndarray) -> np.ndarray:
        """The matrix over both outputs of every evaluation, [N + 1, 1 + 2 N + ..] float64.

        Column k becomes two, unconditional first: `(1 - g) * uncond + g * cond` (Ho and Salimans
        2022, arXiv:2207.12598, with g = 1 for no guidance).

        Args:
            guidance_scale: One for all evaluations, or [N].
        """
        scale = np.broadcast_to(guidance_scale, (self.evaluations,))
        return split_outputs(self.matrix, np.stack([1.0 - scale, scale], axis=1))


def split_outputs(matrix: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """A matrix, or a recurrence, over all R outputs of every evaluation.

    Args:
        matrix: [N + 1, 1 + N + ..], over one output of every evaluation.
        coefficients: [N, R], how that output is combined from R outputs.

    Returns:
        [N + 1, 1 + N * R + ..].
    """
    count, per = coefficients.shape
    start, outputs, rest = np.split(matrix, [1, 1 + count], axis=1)
    split = outputs[:, :, None] * coefficients
    return np.concatenate([start, split.reshape(count + 1, per * count), rest], axis=1)
