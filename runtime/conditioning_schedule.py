"""What the UNet reads of one image besides latents and timestep, evaluation by evaluation.

Knows arrays and their rows; not prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from sdrt.bundle.manifest import IP_ADAPTER_KV, IP_ADAPTER_SCALE
from sdrt.engine import Feeds

IMAGE_PROMPT = (IP_ADAPTER_KV, IP_ADAPTER_SCALE)


@dataclass(frozen=True, slots=True, eq=False)
class ConditioningSchedule:
    """The conditioning of one image.

    A prompt may change during the run, and several may be joined, so evaluations differ in the rows
    that they read. Every different row is stored once.

    Attributes:
        inputs: Inputs of the UNet by name, [D, ...] each, negative rows first.
        num_negative: How many of the D rows are negative; 0 without guidance.
        selections: For every evaluation the indices of its rows, the negative one first. The last
            selection holds for all later evaluations.
    """

    inputs: Feeds
    num_negative: int
    selections: tuple[tuple[int, ...], ...]

    @property
    def is_constant(self) -> bool:
        """Whether all evaluations read the same rows."""
        return all(selection == self.selections[0] for selection in self.selections)

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The shape of one row of every input but an image prompt's; rows of equal shapes can share
        a batch, if their image prompts have one number of tokens or are missing.
        """
        named = self.inputs.items()
        return tuple((name, value.shape[1:]) for name, value in named if name not in IMAGE_PROMPT)

    @property
    def image_tokens(self) -> int:
        """Of an image prompt; 0 without."""
        keys_values = self.inputs.get(IP_ADAPTER_KV)
        return 0 if keys_values is None else keys_values.shape[1]

    def select_rows(self, evaluation: int, count: int) -> tuple[int, ...]:
        """The last `count` rows of an evaluation, or all for 0: without guidance the negative one
        is left out.
        """
        return self.selections[min(evaluation, len(self.selections) - 1)][-count:]

    def select_inputs(self, evaluation: int) -> Feeds:
        """The rows of an evaluation, [1 + P or P, ...] of every input, negative first."""
        rows = list(self.select_rows(evaluation, 0))
        return {name: value[rows] for name, value in self.inputs.items()}

    def with_input(
        self, name: str, positive: np.ndarray, negative: np.ndarray | None = None
    ) -> "ConditioningSchedule":
        """The same with one more input, which is constant during the run.

        Args:
            name: Of the UNet's input.
            positive: [...], read by the rows of prompts.
            negative: [...], read by negative rows; by default as `positive`.
        """
        count = max((len(value) for value in self.inputs.values()), default=1)
        values = [positive if negative is None else negative] * self.num_negative
        values += [positive] * (count - self.num_negative)
        return replace(self, inputs={**self.inputs, name: np.stack(values)})


def build_constant_schedule(inputs: Mapping[str, np.ndarray]) -> ConditioningSchedule:
    """The schedule of inputs that never change, [2 or 1, ...] each, negative first."""
    count = max((len(value) for value in inputs.values()), default=1)
    return ConditioningSchedule(dict(inputs), count - 1, (tuple(range(count)),))
