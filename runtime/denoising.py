"""The denoising loop.

Each image is a `DenoisingState`: the rows of its sampler table, the history that they combine and
its conditioning. The rows of several states make one call of the model.

Knows the engine protocol and sampler tables; not prompts, seeds or images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from sdrt.bundle.manifest import CONTROL, FEATURE, IP_ADAPTER_KV, LORA_FACTORS, LORA_PARTS, SHALLOW
from sdrt.engine import Engine, Feeds, NumpyHistory, find_ranges

from .conditioning_schedule import ConditioningSchedule
from .controlnet.control import Control
from .controlnet.residuals import ControlledRows, ResidualBatch
from .samplers.table_data import SamplerTable, split_outputs

# (evaluations done, latents [B, C, H/8, W/8]) -> the latents to continue from
LatentEdit = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Step:
    """The state of a run after one evaluation of the model.

    Attributes:
        index: Evaluations done, counted from 1.
        total: Evaluations in all.
        timestep: What the model was called with.
        latents: [B, C, H/8, W/8] float32, the next input of the model; after the last evaluation
            the result.
        alpha: The latents are `alpha * denoised + sigma * noise`; 1 for the result.
        sigma: 0 for the result.
    """

    index: int
    total: int
    timestep: float
    latents: np.ndarray
    alpha: float
    sigma: float


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: Ho and Salimans 2022 (arXiv:2207.12598); of several prompts, Liu et
    al. 2022 (arXiv:2206.01714), eq. 11.

    Attributes:
        scales: [N], the guidance scale of every evaluation; 1 is no guidance.
        rescale: How far the guided output's deviation is set back to the conditional one's, 0 to 1.
        weights: Of each of the P prompts.
    """

    scales: np.ndarray
    rescale: float = 0.0
    weights: tuple[float, ...] = (1.0,)

    @property
    def coefficients(self) -> np.ndarray:
        """[N, 1 + P] float64, of the negative output and of each prompt's in the guided output:
        `negative + sum_i w_i * g * (prompt_i - negative)`.
        """
        prompts = self.scales[:, None] * np.array(self.weights)
        return np.concatenate([1.0 - prompts.sum(axis=1, keepdims=True), prompts], axis=1)

    @property
    def num_rows(self) -> np.ndarray:
        """[N], rows of the model's batch: a negative one where it counts, and one a prompt."""
        return len(self.weights) + (self.coefficients[:, 0] != 0.0)

    @property
    def in_matrix(self) -> bool:
        """Whether the sampler's matrix combines the outputs; else they are combined first."""
        return bool((self.num_rows > 1).any()) and not self.rescale


@dataclass(frozen=True, slots=True)
class HistoryLayout:
    """A sampler's rows over the places of a history.

    An output or a state is read by the next few rows only. Each kind goes round a ring, so a long
    run needs no more memory than a short one. The places are: the starting noise, the ring of
    outputs, fresh noises and image latents, the ring of states.

    Attributes:
        rows: [N + 1, places] float32.
        ranges: Of the nonzero places of each row.
        outputs_per_evaluation: The negative one and one a prompt where guidance is in the matrix,
            else 1.
        output_ring: Evaluations whose outputs are stored.
        state_base: The first place of the ring of states.
        state_ring: States that are stored.
    """

    rows: np.ndarray
    ranges: list[list[tuple[int, int]]]
    outputs_per_evaluation: int
    output_ring: int
    state_base: int
    state_ring: int

    @property
    def noise_base(self) -> int:
        """The first place of the fresh noises, which the image latents follow."""
        return 1 + self.output_ring * self.outputs_per_evaluation

    def output_place(self, k: int) -> int:
        """The first place of evaluation k's outputs."""
        return 1 + k % self.output_ring * self.outputs_per_evaluation

    def state_place(self, k: int) -> int:
        """The place of the latents after evaluation k."""
        return self.state_base + k % self.state_ring


def get_history_layout(table: SamplerTable, guidance: Guidance) -> HistoryLayout:
    """The layout of a table with its guidance; the last one of each table is cached."""
    numbers = guidance.coefficients.tobytes() if guidance.in_matrix else None
    cached = _LAYOUTS.get(table)
    if cached is None or cached[0] != numbers:
        cached = _LAYOUTS[table] = numbers, _build_history_layout(table, guidance)
    return cached[1]


_LAYOUTS: WeakKeyDictionary[SamplerTable, tuple[bytes | None, HistoryLayout]] = WeakKeyDictionary()


def _build_history_layout(table: SamplerTable, guidance: Guidance) -> HistoryLayout:
    count, per = table.evaluations, 1 + len(guidance.weights) if guidance.in_matrix else 1
    chain = table.recurrence  # [N + 1, 1 + N * per + noises + image + N]
    if guidance.in_matrix:
        chain = split_outputs(chain, guidance.coefficients)
    outputs = chain[:, 1 : 1 + count * per].reshape(count + 1, count, per)
    others, states = chain[:, 1 + count * per : -count], chain[:, -count:]
    output_ring, state_ring = _ring_size((outputs != 0.0).any(axis=2)), _ring_size(states != 0.0)
    state_base = 1 + output_ring * per + others.shape[1]
    rows = np.zeros((count + 1, state_base + state_ring), np.float32)
    rows[:, 0] = chain[:, 0]
    rows[:, 1 + output_ring * per : state_base] = others
    for place in range(output_ring):  # a row reads at most one of the columns that share a place
        at = 1 + place * per
        rows[:, at : at + per] = outputs[:, place::output_ring].sum(axis=1)
    for place in range(state_ring):
        rows[:, state_base + place] = states[:, place::state_ring].sum(axis=1)
    rows.flags.writeable = False
    ranges = [find_ranges(row) for row in rows]
    return HistoryLayout(rows, ranges, per, output_ring, state_base, state_ring)


def _ring_size(is_read: np.ndarray) -> int:
    """The longest distance from column k, written before row k + 1, to the last row that reads it.

    is_read: [N + 1, N], whether a row reads a column
    """
    rows, columns = np.nonzero(is_read)
    return int(max(1, (rows - columns).max(initial=1)))


class DenoisingState:
    """One image on its way through the loop.

    Attributes:
        latents: [C, H/8, W/8] float32, the next input of the model; after the last evaluation the
            result.
        evaluations_done: How often the model was called.
        features: [rows, ...] of the last full evaluation and of the one before, while later
            evaluations read them.
    """

    def __init__(
        self,
        table: SamplerTable,
        guidance: Guidance,
        layout: HistoryLayout,
        columns: Sequence[np.ndarray],
        conditioning: ConditioningSchedule,
        extra_channels: np.ndarray,
        control: Control | None = None,
        lora: np.ndarray | None = None,
    ) -> None:
        """Start a run.

        Args:
            table: The sampler's numbers.
            guidance: Scales of every evaluation.
            layout: That of table and guidance, shared by all states of a batch.
            columns: [C, H/8, W/8] each: the starting noise, fresh noises, and the image's latents
                where the run starts from them.
            conditioning: Other inputs of the UNet.
            extra_channels: [E, H/8, W/8], concatenated to the latents; E is 0 for most models.
            control: Of the run's ControlNets and T2I-Adapters.
            lora: [P] LoRA factors of the run's rows.
        """
        self.control, self.lora = control, lora
        self.table, self.guidance, self.layout = table, guidance, layout
        self.conditioning, self.extra_channels = conditioning, extra_channels
        start, *others = columns
        self.history = NumpyHistory(layout.rows.shape[1], start.shape)
        self.history.write(0, start)
        for i, value in enumerate(others):
            self.history.write(layout.noise_base + i, value)
        self.evaluations_done = 0
        self.features: list[np.ndarray] = []
        self._num_rows = guidance.num_rows.tolist()
        last_state = layout.state_place(self.num_evaluations - 1)
        self.latents = self.history.combine(layout.rows[0], layout.ranges[0], last_state)

    @property
    def num_evaluations(self) -> int:
        return self.table.evaluations

    @property
    def finished(self) -> bool:
        return self.evaluations_done == self.num_evaluations

    @property
    def num_rows(self) -> int:
        """Rows of the model's batch in the next evaluation: one a prompt, and with guidance a
        negative one.
        """
        return int(self._num_rows[self.evaluations_done])

    @property
    def conditioning_rows(self) -> tuple[int, ...]:
        """Rows of the conditioning that the next evaluation reads."""
        return self.conditioning.select_rows(self.evaluations_done, self.num_rows)

    @property
    def component(self) -> str:
        """Which network the next evaluation runs: the full UNet, or its shallow part."""
        return "unet" if self.table.is_full(self.evaluations_done) else SHALLOW

    @property
    def has_image_prompt(self) -> bool:
        """Whether the UNet reads an IP-Adapter's tokens."""
        return self.conditioning.image_tokens > 0

    @property
    def control_cost(self) -> float:
        """Of the ControlNets in the next evaluation, relative to the model."""
        return self.control.cost(self.evaluations_done) if self.control else 0.0

    def store_feature(self, feature: np.ndarray) -> None:
        """Store a full evaluation's feature [rows, ...] while later evaluations read it."""
        full = self.table.full_evaluations
        reads = full is not None and not full[self.evaluations_done :].all()
        self.features = [feature, *self.features[:1]] if reads else []

    def combine_features(self, rows: int) -> np.ndarray:
        """The feature [rows, ...] that the next evaluation reads instead of the deep layers'."""
        assert self.table.feature_weights is not None, "shallow evaluations are weighted"
        last, before = self.table.feature_weights[self.evaluations_done].astype(np.float32)
        if not before:
            return self.features[0][-rows:]
        return last * self.features[0][-rows:] + before * self.features[1][-rows:]

    def advance(self, output: np.ndarray) -> None:
        """Go on by one evaluation with the model's output [rows, C, H/8, W/8]."""
        k, clip, layout = self.evaluations_done, self.table.clip, self.layout
        place = layout.output_place(k)
        # Computed before the latents that it reads are overwritten.
        change = clip.correction(k, self.latents, self._apply_guidance(output)) if clip else None
        if layout.outputs_per_evaluation > 1:  # the first place is the negative one's
            first = place + layout.outputs_per_evaluation - len(output)
            self.history.write(first, output)
        else:
            self.history.write(place, self._apply_guidance(output))
        row, ranges = layout.rows[k + 1], layout.ranges[k + 1]
        self.latents = self.history.combine(row, ranges, layout.state_place(k))
        self.evaluations_done += 1
        if change is not None:
            self.replace_latents(self.latents + change)

    def _apply_guidance(self, output: np.ndarray) -> np.ndarray:
        """[rows, C, H/8, W/8] -> [C, H/8, W/8]."""
        if len(output) == 1:
            return output[0]
        weights, rescale = self.guidance.weights, self.guidance.rescale
        scale = self.guidance.scales[self.evaluations_done]
        guided = combine_outputs(output, scale, weights)
        if not rescale:
            return guided
        return rescale_guidance(guided, combine_outputs(output, 1.0, weights), rescale)

    def replace_latents(self, latents: np.ndarray) -> None:
        """Continue from these latents [C, H/8, W/8] instead of the last evaluation's."""
        self.history.write(self.layout.state_place(self.evaluations_done - 1), latents)
        self.latents = latents


class BatchBuilder:
    """Packs the rows of several states into one call of the model.

    The states may differ in everything but shapes and the network that is next. What does not
    change from call to call is written once.
    """

    def __init__(self, min_rows: int = 0) -> None:
        """Create an empty batch; calls of fewer than `min_rows` rows are padded with zeros."""
        self._min_rows = min_rows
        self._placed: list[tuple[DenoisingState, int]] = []
        self._sample = self._timesteps = np.empty(0, np.float32)
        self._conditioning: dict[str, np.ndarray] = {}
        self._conditioning_rows: dict[int, tuple[int, ...]] = {}  # written, by their first place
        self._residuals: ResidualBatch | None = None
        self._lora: np.ndarray | None = None  # [rows, P]

    def evaluate(self, engines: Mapping[str, Engine], states: Sequence[DenoisingState]) -> None:
        """Advance every state by one evaluation.

        Args:
            engines: By component.
            states: Whose next evaluation runs one network.
        """
        placed = [(state, state.num_rows) for state in states]
        if placed != self._placed:
            self._allocate(placed)
        component = states[0].component
        at = 0
        for state, rows in placed:
            assert state.component == component, "states of a call run one network"
            self._sample[at : at + rows, : len(state.latents)] = state.latents
            self._timesteps[at : at + rows] = state.table.timesteps[state.evaluations_done]
            self._write_conditioning(at, state)
            at += rows
        feeds = {"sample": self._sample, "timestep": self._timesteps, **self._conditioning}
        if self._lora is not None:
            assert component == "unet", "rows with LoRA factors do not reuse features"
            component, feeds = LORA_PARTS["unet"], {**feeds, LORA_FACTORS: self._lora}
        elif component == SHALLOW:
            feeds[FEATURE] = self._gather_features(placed)
        elif residuals := self._compute_residuals(engines, placed, feeds):
            component, feeds = CONTROL, {**feeds, **residuals}
        outputs = engines[component](feeds)
        at = 0
        for state, rows in placed:
            if FEATURE in outputs:
                state.store_feature(outputs[FEATURE][at : at + rows])
            state.advance(outputs["output"][at : at + rows])
            at += rows

    def _compute_residuals(
        self, engines: Mapping[str, Engine], placed: list[tuple[DenoisingState, int]], feeds: Feeds
    ) -> Feeds:
        """The inputs of the UNet that control adds; none where no image is under control or has an
        image prompt.
        """
        if IP_ADAPTER_KV not in feeds and not any(state.control for state, _ in placed):
            return {}
        images, first = [], 0
        for state, rows in placed:
            negative = rows - len(state.guidance.weights)
            k = state.evaluations_done
            images.append(ControlledRows(state.control, k, first, rows, negative))
            first += rows
        if not (any(image.is_active for image in images) or IP_ADAPTER_KV in feeds):
            return {}
        if self._residuals is None:
            self._residuals = ResidualBatch(engines[CONTROL], feeds, self._min_rows)
        return self._residuals.compute(engines, images, feeds)

    def _gather_features(self, placed: list[tuple[DenoisingState, int]]) -> np.ndarray:
        """[rows, ...] of every state's last full evaluations, padded as the batch is."""
        features = [state.combine_features(rows) for state, rows in placed]
        padding = len(self._sample) - sum(rows for _, rows in placed)
        return np.concatenate([*features, *[np.zeros_like(features[0][:1])] * padding])

    def _allocate(self, placed: list[tuple[DenoisingState, int]]) -> None:
        """Buffers for these states, filled with what no evaluation changes."""
        count = max(sum(rows for _, rows in placed), self._min_rows)
        first = placed[0][0]
        channels, *sides = first.latents.shape
        in_channels = channels + len(first.extra_channels)
        self._sample = np.zeros((count, in_channels, *sides), np.float32)
        self._timesteps = np.zeros(count, np.float32)
        self._conditioning = {
            name: np.zeros((count, *value.shape[1:]), value.dtype)
            for state, _ in placed  # some have an image prompt, for the others it is zeros
            for name, value in state.conditioning.inputs.items()
        }
        self._conditioning_rows = {}
        at = 0
        for state, rows in placed:
            self._sample[at : at + rows, channels:] = state.extra_channels
            at += rows
        self._placed, self._residuals = placed, None
        self._lora = _stack_factors(placed, count)

    def _write_conditioning(self, at: int, state: DenoisingState) -> None:
        """Write the rows of conditioning that an image reads next, unless they are there."""
        rows = state.conditioning_rows
        if self._conditioning_rows.get(at) != rows:
            for name, value in state.conditioning.inputs.items():
                self._conditioning[name][at : at + len(rows)] = value[list(rows)]
            self._conditioning_rows[at] = rows


def _stack_factors(placed: list[tuple[DenoisingState, int]], count: int) -> np.ndarray | None:
    """[count, P] LoRA factors of all rows, zeros for states without; None if no state has any."""
    factors = [state.lora for state, _ in placed if state.lora is not None]
    if not factors:
        return None
    stacked = np.zeros((count, len(factors[0])), factors[0].dtype)
    at = 0
    for state, rows in placed:
        if state.lora is not None:
            stacked[at : at + rows] = state.lora
        at += rows
    return stacked


def denoise(
    engines: Mapping[str, Engine], states: Sequence[DenoisingState], edit: LatentEdit | None = None
) -> Iterator[Step]:
    """Run the denoising loop over states that share one sampler table.

    Args:
        engines: By component.
        states: At their beginning.
        edit: Called after every evaluation; the loop continues from the latents that it returns.

    Yields:
        One `Step` per evaluation, with the latents of all states.
    """
    batch, table = BatchBuilder(), states[0].table
    for k in range(1, table.evaluations + 1):
        batch.evaluate(engines, states)
        latents = np.array([state.latents for state in states])  # [B, C, H/8, W/8]
        if edit:
            latents = np.array(edit(k, latents), np.float32)
            for state, edited in zip(states, latents, strict=True):
                state.replace_latents(edited)
        yield build_step(table, k, latents)


def build_step(table: SamplerTable, evaluations_done: int, latents: np.ndarray) -> Step:
    """The step after so many evaluations, with latents [B, C, H/8, W/8]."""
    timestep = float(table.timesteps[evaluations_done - 1])
    alpha, sigma = table.alphas_sigmas[evaluations_done]
    return Step(evaluations_done, table.evaluations, timestep, latents, alpha, sigma)


def combine_outputs(output: np.ndarray, scale: float, weights: Sequence[float]) -> np.ndarray:
    """`negative + sum_i w_i * g * (prompt_i - negative)`: Liu et al. 2022 (arXiv:2206.01714).

    Args:
        output: [1 + P, ...], negative first; or [P, ...] where its coefficient is zero.
        scale: The guidance scale g.
        weights: [P].
    """
    factors = [np.float32(scale * weight) for weight in weights]
    prompts = output[-len(factors) :]
    if len(output) == len(factors):
        return np.asarray(sum(factor * row for factor, row in zip(factors, prompts, strict=True)))
    guided = negative = output[0]
    for factor, row in zip(factors, prompts, strict=True):
        change = row - negative
        change *= factor
        change += guided
        guided = change
    return guided


def rescale_guidance(guided: np.ndarray, positive: np.ndarray, rescale: float) -> np.ndarray:
    """Bring the guided output's deviation back towards the conditional output's.

    Lin et al. 2023 (arXiv:2305.08891), eqs. 15 and 16. It is not linear, so it cannot be part of
    the sampler's matrix.
    """
    factor = rescale * positive.std(ddof=1) / guided.std(ddof=1) + 1.0 - rescale
    return guided * np.float32(factor)
