"""The denoising loop of one batch: rows of numbers, one engine, nothing decided in between.

Knows the engine protocol and sampler tables; not prompts, seeds or pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sdrt.engine import Engine, NumpyHistory

from .samplers.table import SamplerTable, guided_matrix

Edit = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Step:
    """The state of a run after one evaluation.

    index, total: evaluations done, and in all
    timestep: what the model was fed
    latents: [B, C, H/8, W/8] float32, the next model input, or the result after the last
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray


@dataclass(frozen=True, slots=True)
class Guidance:
    """The guidance scale of every evaluation [N], 1 where there is none, and how much of the
    guided output's spread is set back to the prompt's own.
    """

    scales: np.ndarray
    rescale: float = 0.0

    @property
    def pairs(self) -> bool:
        """Whether both outputs are kept; else they are combined before."""
        return bool((self.scales != 1.0).any()) and not self.rescale


def histories_of(
    table: SamplerTable, guidance: Guidance, columns: Sequence[Sequence[np.ndarray]]
) -> list[NumpyHistory]:
    """One history for each image; columns: its starting noise, its fresh noises, its picture."""
    outputs = table.evaluations * (2 if guidance.pairs else 1)
    made = []
    for start, *others in columns:
        history = NumpyHistory(1 + outputs + len(others) + table.evaluations, start.shape)
        history.write(0, start)
        for i, value in enumerate(others):
            history.write(1 + outputs + i, value)
        made.append(history)
    return made


def denoised(
    unet: Engine,
    table: SamplerTable,
    guidance: Guidance,
    histories: Sequence[NumpyHistory],
    context: np.ndarray,
    edit: Edit | None = None,
) -> Iterator[Step]:
    """One `Step` per evaluation.

    context: [2 B, tokens, width], what is steered away from first; [B, ..] if nothing is guided
    edit: given the evaluations done and the latents, may give others in their place
    """
    count, batch = table.evaluations, len(histories)
    rows = table.chain
    if guidance.pairs:
        rows = guided_matrix(rows, count, guidance.scales)
    rows = rows.astype(np.float32)
    kept = rows.shape[1] - count
    sample = np.empty((2 * batch, *histories[0].shape), np.float32)
    timesteps = np.empty(2 * batch, np.float32)
    latents = np.stack([history.combine(rows[0], kept) for history in histories])
    for k in range(count):
        used = 2 * batch if guidance.scales[k] != 1.0 else batch
        sample[:used].reshape(-1, *latents.shape)[:] = latents
        timesteps[:used] = table.timesteps[k]
        feeds = {
            "sample": sample[:used],
            "timestep": timesteps[:used],
            "context": context[-used:],
        }
        output = unet(feeds)["output"]
        _write(histories, k, output, guidance)
        for i, history in enumerate(histories):
            latents[i] = history.combine(rows[k + 1], kept + k)
        if edit:
            latents = np.array(edit(k + 1, latents), np.float32)
            for history, edited in zip(histories, latents, strict=True):
                history.write(kept + k, edited)
        yield Step(k + 1, count, float(table.timesteps[k]), latents.copy())


def _write(
    histories: Sequence[NumpyHistory], k: int, output: np.ndarray, guidance: Guidance
) -> None:
    batch, scale = len(histories), float(guidance.scales[k])
    two = len(output) == 2 * batch
    for i, history in enumerate(histories):
        if guidance.pairs:
            if two:
                history.write(1 + 2 * k, output[i])
            history.write(2 + 2 * k, output[i - batch])
        elif two:
            combined = rescaled(output[i], output[batch + i], scale, guidance.rescale)
            history.write(1 + k, combined)
        else:
            history.write(1 + k, output[i])


def rescaled(
    unguided: np.ndarray, prompted: np.ndarray, scale: float, rescale: float
) -> np.ndarray:
    """The guided output with its spread brought back towards the prompt's own: Lin et al. 2023
    (arXiv:2305.08891), eqs. 15 and 16. Not linear, so it is no entry of the table.
    """
    guided = unguided + np.float32(scale) * (prompted - unguided)
    factor = rescale * prompted.std(ddof=1) / guided.std(ddof=1) + 1.0 - rescale
    return guided * np.float32(factor)
