"""The denoising loop: every picture is a run with rows of numbers of its own, and the rows of
several runs make one call of the model.

Knows the engine protocol and sampler tables; not prompts, seeds or pictures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from sdrt.bundle.manifest import FEATURE, SHALLOW
from sdrt.engine import Engine, Feeds, NumpyHistory

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
    def in_matrix(self) -> bool:
        """Whether both outputs are kept; else they are combined before."""
        return bool((self.scales != 1.0).any()) and not self.rescale


@dataclass(frozen=True, slots=True)
class HistoryLayout:
    """A run's rows over the places of a history. An output or a state is read by the next few rows
    only, so each kind goes round a ring, and a long run needs no more memory than a short one.

    rows: [N + 1, places] float32
    output: the place of evaluation k's output is `1 + k % output_ring * per`, of `per` places
    state: the place of the latents after it is `state_base + k % state_ring`
    """

    rows: np.ndarray
    outputs_per_evaluation: int
    output_ring: int
    state_base: int
    state_ring: int

    @property
    def noise_base(self) -> int:
        """Where fresh noises and the picture are."""
        return 1 + self.output_ring * self.outputs_per_evaluation

    def output_place(self, k: int) -> int:
        return 1 + k % self.output_ring * self.outputs_per_evaluation

    def state_place(self, k: int) -> int:
        return self.state_base + k % self.state_ring


def get_history_layout(table: SamplerTable, guidance: Guidance) -> HistoryLayout:
    """The rows of a run with its guidance, in as few places as they need; the table's last plan is
    remembered for as long as the table is.
    """
    scales = guidance.scales.tobytes() if guidance.in_matrix else None
    known = _LAYOUTS.get(table)
    if known is None or known[0] != scales:
        known = _LAYOUTS[table] = scales, _build_history_layout(table, guidance)
    return known[1]


_LAYOUTS: WeakKeyDictionary[SamplerTable, tuple[bytes | None, HistoryLayout]] = WeakKeyDictionary()


def _build_history_layout(table: SamplerTable, guidance: Guidance) -> HistoryLayout:
    count, per = table.evaluations, 2 if guidance.in_matrix else 1
    chain = (
        guided_matrix(table.chain, count, guidance.scales) if guidance.in_matrix else table.chain
    )
    outputs = chain[:, 1 : 1 + count * per].reshape(count + 1, count, per)
    others, states = chain[:, 1 + count * per : -count], chain[:, -count:]
    output_ring, state_ring = _ring_size((outputs != 0.0).any(axis=2)), _ring_size(states != 0.0)
    state_base = 1 + output_ring * per + others.shape[1]
    rows = np.zeros((count + 1, state_base + state_ring), np.float32)
    rows[:, 0] = chain[:, 0]
    rows[:, 1 + output_ring * per : state_base] = others
    for place in range(output_ring):  # of those that share one, a row reads one at most
        at = 1 + place * per
        rows[:, at : at + per] = outputs[:, place::output_ring].sum(axis=1)
    for place in range(state_ring):
        rows[:, state_base + place] = states[:, place::state_ring].sum(axis=1)
    rows.flags.writeable = False
    return HistoryLayout(rows, per, output_ring, state_base, state_ring)


def _ring_size(read: np.ndarray) -> int:
    """Places that columns need when each is written before row k + 1: the longest that one waits
    for its last reader. read: [N + 1, N], whether a row reads column k.
    """
    rows, columns = np.nonzero(read)
    return int(max(1, (rows - columns).max(initial=1)))


class DenoisingState:
    """One picture's run: its rows of numbers, its history, and what the model is told.

    latents: [C, H/8, W/8] float32, the next model input, or the result after the last evaluation
    done: evaluations done
    feature: [rows, ..] of the last full evaluation, while others need it
    """

    def __init__(
        self,
        table: SamplerTable,
        guidance: Guidance,
        layout: HistoryLayout,
        columns: Sequence[np.ndarray],
        conditioning: Feeds,
        extra_channels: np.ndarray,
    ) -> None:
        """plan: that of table and guidance; runs alike share it
        columns: starting noise, fresh noises, and the picture's latents where the run begins there
        told: what the model is fed besides, by input name, [2 or 1, ..], what is steered away from
            first; the last row alone is the prompt's
        beside: [E, H/8, W/8] channels beside the latents; E is 0 for most models
        """
        self.table, self.guidance, self.layout = table, guidance, layout
        self.conditioning, self.extra_channels = conditioning, extra_channels
        start, *others = columns
        self.history = NumpyHistory(layout.rows.shape[1], start.shape)
        self.history.write(0, start)
        for i, value in enumerate(others):
            self.history.write(layout.noise_base + i, value)
        self.evaluations_done = 0
        self.feature: np.ndarray | None = None
        self.latents = self.history.combine(
            layout.rows[0], layout.state_place(self.num_evaluations - 1)
        )

    @property
    def num_evaluations(self) -> int:
        return self.table.evaluations

    @property
    def finished(self) -> bool:
        return self.evaluations_done == self.num_evaluations

    @property
    def num_rows(self) -> int:
        """Rows of the next evaluation: two where it is guided."""
        return 2 if self.guidance.scales[self.evaluations_done] != 1.0 else 1

    @property
    def component(self) -> str:
        """Which network the next evaluation runs: the whole one, or its shallow part."""
        return "unet" if self.table.is_full(self.evaluations_done) else SHALLOW

    def store_feature(self, feature: np.ndarray) -> None:
        """Take a full evaluation's feature [rows, ..] if the next evaluation needs one."""
        needed = self.evaluations_done + 1 < self.num_evaluations and not self.table.is_full(
            self.evaluations_done + 1
        )
        self.feature = feature if needed else None

    def advance(self, output: np.ndarray) -> None:
        """Take the model's output [rows, C, H/8, W/8] and go on by one evaluation."""
        k, place, clip = (
            self.evaluations_done,
            self.layout.output_place(self.evaluations_done),
            self.table.clip,
        )
        # Before the latents that it reads are written over.
        change = clip.change(k, self.latents, self._apply_guidance(output)) if clip else None
        if self.layout.outputs_per_evaluation == 2:
            if len(output) == 2:
                self.history.write(place, output[0])
            self.history.write(place + 1, output[-1])
        else:
            self.history.write(place, self._apply_guidance(output))
        self.latents = self.history.combine(self.layout.rows[k + 1], self.layout.state_place(k))
        self.evaluations_done += 1
        if change is not None:
            self.replace_latents(self.latents + change)

    def _apply_guidance(self, output: np.ndarray) -> np.ndarray:
        if len(output) == 1:
            return output[0]
        unguided, prompted = output
        guided = unguided + np.float32(self.guidance.scales[self.evaluations_done]) * (
            prompted - unguided
        )
        return (
            rescale_guidance(guided, prompted, self.guidance.rescale)
            if self.guidance.rescale
            else guided
        )

    def replace_latents(self, latents: np.ndarray) -> None:
        """Go on from other latents than those of the last evaluation."""
        self.history.write(self.layout.state_place(self.evaluations_done - 1), latents)
        self.latents = latents


class BatchBuilder:
    """The rows of several runs as one call of the model. They need not agree on anything but
    shapes and which network is next; what stays from call to call is laid out once.
    """

    def __init__(self, min_rows: int = 0) -> None:
        """padded: the least rows of a call, filled up with zeros."""
        self._min_rows = min_rows
        self._placed: list[tuple[DenoisingState, int]] = []
        self._sample = self._timesteps = np.empty(0, np.float32)
        self._conditioning: dict[str, np.ndarray] = {}

    def evaluate(self, engines: Mapping[str, Engine], states: Sequence[DenoisingState]) -> None:
        """One evaluation of every run; engines: by component."""
        placed = [(state, state.num_rows) for state in states]
        if placed != self._placed:
            self._allocate(placed)
        component = states[0].component
        at = 0
        for run, rows in placed:
            assert run.component == component, "runs of a call run one network"
            self._sample[at : at + rows, : len(run.latents)] = run.latents
            self._timesteps[at : at + rows] = run.table.timesteps[run.evaluations_done]
            at += rows
        feeds = {"sample": self._sample, "timestep": self._timesteps, **self._conditioning}
        if component == SHALLOW:
            feeds[FEATURE] = self._gather_features(placed)
        outputs = engines[component](feeds)
        at = 0
        for run, rows in placed:
            if FEATURE in outputs:
                run.store_feature(outputs[FEATURE][at : at + rows])
            run.advance(outputs["output"][at : at + rows])
            at += rows

    def _gather_features(self, laid: list[tuple[DenoisingState, int]]) -> np.ndarray:
        """Of every row, as its run's last full evaluation left it."""
        kept = [run.feature[-rows:] for run, rows in laid if run.feature is not None]
        short = len(self._sample) - sum(rows for _, rows in laid)
        return np.concatenate([*kept, *[np.zeros_like(kept[0][:1])] * short])

    def _allocate(self, laid: list[tuple[DenoisingState, int]]) -> None:
        """Buffers for these runs, with what no evaluation changes in place."""
        used = sum(rows for _, rows in laid)
        count = max(used, self._min_rows)
        first = laid[0][0]
        channels, *sides = first.latents.shape
        self._sample = np.zeros((count, channels + len(first.extra_channels), *sides), np.float32)
        self._timesteps = np.zeros(count, np.float32)
        self._conditioning = {
            name: np.zeros((count, *value.shape[1:]), value.dtype)
            for name, value in first.conditioning.items()
        }
        at = 0
        for run, rows in laid:
            self._sample[at : at + rows, channels:] = run.extra_channels
            for name, value in run.conditioning.items():
                self._conditioning[name][at : at + rows] = value[-rows:]
            at += rows
        self._placed = laid


def denoise(
    engines: Mapping[str, Engine], runs: Sequence[DenoisingState], edit: Edit | None = None
) -> Iterator[Step]:
    """One `Step` per evaluation of runs that share one table.

    engines: by component
    edit: given the evaluations done and the latents [B, ..], may give others in their place
    """
    gather, table = BatchBuilder(), runs[0].table
    for k in range(1, table.evaluations + 1):
        gather.evaluate(engines, runs)
        latents = np.stack([run.latents for run in runs])
        if edit:
            latents = np.array(edit(k, latents), np.float32)
            for run, edited in zip(runs, latents, strict=True):
                run.replace_latents(edited)
        yield build_step(table, k, latents)


def build_step(table: SamplerTable, done: int, latents: np.ndarray) -> Step:
    """The state of runs [B, ..] after so many evaluations."""
    timestep = float(table.timesteps[done - 1])
    return Step(done, table.evaluations, timestep, latents, *table.shares[done])


def rescale_guidance(guided: np.ndarray, prompted: np.ndarray, rescale: float) -> np.ndarray:
    """The guided output with its spread brought back towards the prompt's own: Lin et al. 2023
    (arXiv:2305.08891), eqs. 15 and 16. Not linear, so it is no entry of the table.
    """
    factor = rescale * prompted.std(ddof=1) / guided.std(ddof=1) + 1.0 - rescale
    return guided * np.float32(factor)
