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
    alpha, sigma: the latents are `alpha * clean + sigma * noise`; the result's are 1 and 0
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    alpha: float
    sigma: float


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


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's rows over the places of a history. An output or a state is read by the next few rows
    only, so each kind goes round a ring, and a long run needs no more memory than a short one.

    rows: [N + 1, places] float32
    output: the place of evaluation k's output is `1 + k % output_ring * per`, of `per` places
    state: the place of the latents after it is `state_base + k % state_ring`
    """

    rows: np.ndarray
    per: int
    output_ring: int
    state_base: int
    state_ring: int

    @property
    def others_base(self) -> int:
        """Where fresh noises and the picture are."""
        return 1 + self.output_ring * self.per

    def output_place(self, k: int) -> int:
        return 1 + k % self.output_ring * self.per

    def state_place(self, k: int) -> int:
        return self.state_base + k % self.state_ring


def plan_of(table: SamplerTable, guidance: Guidance) -> Plan:
    """The rows of a run with its guidance, in as few places as they need."""
    count, per = table.evaluations, 2 if guidance.pairs else 1
    chain = guided_matrix(table.chain, count, guidance.scales) if guidance.pairs else table.chain
    outputs = chain[:, 1 : 1 + count * per].reshape(count + 1, count, per)
    others, states = chain[:, 1 + count * per : -count], chain[:, -count:]
    output_ring, state_ring = _ring((outputs != 0.0).any(axis=2)), _ring(states != 0.0)
    state_base = 1 + output_ring * per + others.shape[1]
    rows = np.zeros((count + 1, state_base + state_ring), np.float32)
    rows[:, 0] = chain[:, 0]
    rows[:, 1 + output_ring * per : state_base] = others
    for k in range(count):
        at = 1 + k % output_ring * per
        rows[k + 1 :, at : at + per] += outputs[k + 1 :, k]
        rows[k + 1 :, state_base + k % state_ring] += states[k + 1 :, k]
    return Plan(rows, per, output_ring, state_base, state_ring)


def _ring(read: np.ndarray) -> int:
    """Places that columns need when each is written before row k + 1: the longest that one waits
    for its last reader. read: [N + 1, N], whether a row reads column k.
    """
    rows, columns = np.nonzero(read)
    return int(max(1, (rows - columns).max(initial=1)))


def histories_of(plan: Plan, columns: Sequence[Sequence[np.ndarray]]) -> list[NumpyHistory]:
    """One history for each image; columns: its starting noise, its fresh noises, its picture."""
    made = []
    for start, *others in columns:
        history = NumpyHistory(plan.rows.shape[1], start.shape)
        history.write(0, start)
        for i, value in enumerate(others):
            history.write(plan.others_base + i, value)
        made.append(history)
    return made


def denoised(
    unet: Engine,
    table: SamplerTable,
    guidance: Guidance,
    plan: Plan,
    histories: Sequence[NumpyHistory],
    context: np.ndarray,
    beside: np.ndarray,
    edit: Edit | None = None,
) -> Iterator[Step]:
    """One `Step` per evaluation.

    context: [2 B, tokens, width], what is steered away from first; [B, ..] if nothing is guided
    beside: [B, E, H/8, W/8] what the model is fed beside the latents; E is 0 for most
    edit: given the evaluations done and the latents, may give others in their place
    """
    count, batch, rows = table.evaluations, len(histories), plan.rows
    channels, *sides = histories[0].shape
    sample = np.empty((2, batch, channels + beside.shape[1], *sides), np.float32)
    sample[:, :, channels:] = beside
    timesteps = np.empty(2 * batch, np.float32)
    latents = np.stack([h.combine(rows[0], plan.state_place(count - 1)) for h in histories])
    for k in range(count):
        used = 2 * batch if guidance.scales[k] != 1.0 else batch
        sample[: used // batch, :, :channels] = latents
        timesteps[:used] = table.timesteps[k]
        feeds = {
            "sample": sample.reshape(-1, *sample.shape[2:])[:used],
            "timestep": timesteps[:used],
            "context": context[-used:],
        }
        output = unet(feeds)["output"]
        _write(histories, plan.output_place(k), output, guidance, float(guidance.scales[k]))
        for i, history in enumerate(histories):
            latents[i] = history.combine(rows[k + 1], plan.state_place(k))
        if edit:
            latents = np.array(edit(k + 1, latents), np.float32)
            for history, edited in zip(histories, latents, strict=True):
                history.write(plan.state_place(k), edited)
        yield Step(k + 1, count, float(table.timesteps[k]), latents.copy(), *table.shares[k + 1])


def _write(
    histories: Sequence[NumpyHistory],
    place: int,
    output: np.ndarray,
    guidance: Guidance,
    scale: float,
) -> None:
    batch = len(histories)
    two = len(output) == 2 * batch
    for i, history in enumerate(histories):
        if guidance.pairs:
            if two:
                history.write(place, output[i])
            history.write(place + 1, output[i - batch])
        elif two:
            history.write(place, rescaled(output[i], output[batch + i], scale, guidance.rescale))
        else:
            history.write(place, output[i])


def rescaled(
    unguided: np.ndarray, prompted: np.ndarray, scale: float, rescale: float
) -> np.ndarray:
    """The guided output with its spread brought back towards the prompt's own: Lin et al. 2023
    (arXiv:2305.08891), eqs. 15 and 16. Not linear, so it is no entry of the table.
    """
    guided = unguided + np.float32(scale) * (prompted - unguided)
    factor = rescale * prompted.std(ddof=1) / guided.std(ddof=1) + 1.0 - rescale
    return guided * np.float32(factor)
