"""How much of a text encoder's chunks a prompt fills.

Knows tokenizers and prompt syntax; not models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from sdrt.runtime.lora.tags import parse_tags
from sdrt.runtime.options import GenerationOptions
from sdrt.runtime.prompt_timeline import build_prompt_timeline

from .prompt_weighting import chunks_from_prompt
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, order=True)
class TokenCount:
    """Tokens of a prompt, without start and end.

    Attributes:
        tokens: Before a `BREAK` the full chunk is counted, as in A1111.
        limit: Of the chunks that they fill: 75, 150 and so on.
    """

    tokens: int
    limit: int

    def __str__(self) -> str:
        return f"{self.tokens} of {self.limit} tokens"


def count_tokens(
    tokenizers: Sequence[Tokenizer], prompt: str, options: GenerationOptions
) -> TokenCount:
    """Count the longest text that a prompt becomes during a run.

    Args:
        tokenizers: Of the model; the one with most tokens counts.
        prompt: As the user wrote it; LoRA tags are not counted.
        options: `num_inference_steps` and `weighting` say how it is read.

    Raises:
        UsageError: The prompt is not understood.
    """
    steps = options.num_inference_steps
    if options.weighting:
        prompt, _ = parse_tags(prompt)
    timeline = build_prompt_timeline(prompt, "", steps, steps, weighting=options.weighting)
    counts = []
    for text in set(chain(*timeline.prompts)):
        for tokenizer in tokenizers:
            chunks = chunks_from_prompt(text, tokenizer, weighting=options.weighting)
            room = tokenizer.length - 2
            before = (len(chunks) - 1) * room
            counts.append(TokenCount(before + chunks.last_tokens, before + room))
    return max(counts)
