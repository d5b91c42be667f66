"""The texts that each evaluation of a run reads.

Knows prompts, steps and evaluations; not tokens, or what a model makes of them.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from sdrt.errors import UsageError

from .text.prompt_schedule import parse_prompt_schedule, split_prompts
from .text.tokenizer import check_prompt

MAX_TEXTS = 128  # different ones of an image


@dataclass(frozen=True, slots=True)
class PromptTimeline:
    """The texts of one image in each of N evaluations.

    Attributes:
        prompts: Of each of the P prompts joined by `AND`, N texts.
        negative: N texts.
        weights: Of each prompt.
    """

    prompts: tuple[tuple[str, ...], ...]
    negative: tuple[str, ...]
    weights: tuple[float, ...] = (1.0,)

    @property
    def evaluations(self) -> tuple[tuple[str, ...], ...]:
        """[N] of the texts that it reads, the negative one first."""
        return tuple(zip(self.negative, *self.prompts, strict=True))

    @property
    def changes(self) -> tuple[bool, ...]:
        """[N], whether an evaluation reads other texts than the one before it."""
        texts = self.evaluations
        return (False, *(a != b for a, b in pairwise(texts)))

    def skip(self, count: int) -> "PromptTimeline":
        """The timeline without its first `count` evaluations."""
        prompts = tuple(texts[count:] for texts in self.prompts)
        return PromptTimeline(prompts, self.negative[count:], self.weights)

    @property
    def is_plain(self) -> bool:
        """Whether it is one prompt that never changes."""
        return len(self.prompts) == 1 and not any(self.changes)

    @property
    def needs_negative(self) -> bool:
        """Whether the negative prompt counts without guidance too."""
        return sum(self.weights) != 1.0


@lru_cache(maxsize=256)
def build_prompt_timeline(
    prompt: str,
    negative_prompt: str,
    evaluations: int,
    steps: int,
    *,
    first_pass_steps: int | None = None,
    weighting: bool = True,
) -> PromptTimeline:
    """Read what a prompt and its negative prompt say of a run.

    Args:
        prompt: As the user wrote it.
        negative_prompt: The same. `AND` is text in it, as in A1111.
        evaluations: Of the run, which begins at its first step also where it starts from an image.
        steps: That the prompts count, see `parse_prompt_schedule`.
        first_pass_steps: In a second pass, the first one's.
        weighting: Whether brackets, `AND` and `|` are syntax; else they are text.

    Raises:
        UsageError: The prompts are nested too deeply, joined too often, or change too often.
    """
    if not weighting:
        return PromptTimeline(((prompt,) * evaluations,), (negative_prompt,) * evaluations)
    pieces = split_prompts(check_prompt(prompt))
    *prompts, negative = (
        _spread(text, evaluations, steps, first_pass_steps)
        for text in (*(text for text, _ in pieces), negative_prompt)
    )
    count = sum(len(set(texts)) for texts in (*prompts, negative))
    if count > MAX_TEXTS:
        raise UsageError(
            f"the prompt reads {count} different texts during the run; expected at most {MAX_TEXTS}"
        )
    return PromptTimeline(tuple(prompts), negative, tuple(weight for _, weight in pieces))


def _spread(
    prompt: str, evaluations: int, steps: int, first_pass_steps: int | None
) -> tuple[str, ...]:
    schedule = parse_prompt_schedule(check_prompt(prompt), steps, first_pass_steps)
    return tuple(schedule.text_at(k) for k in range(evaluations))


def build_constant_timeline(
    prompt: str, negative_prompt: str, evaluations: int = 1
) -> PromptTimeline:
    """The timeline of texts that never change."""
    return PromptTimeline(((prompt,) * evaluations,), (negative_prompt,) * evaluations)
