"""What the UNet is told: prompts through the text encoder, or embeddings given.

Knows the text encoder's interface: ids in, the context after every layer out.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from sdrt.engine import Engine
from sdrt.errors import UsageError

from .options import Options, Request
from .prompt import Chunks, chunks_from_prompt, weighted
from .tokenizer import Tokenizer

# Contexts of stretches encoded before, by the bytes of their ids and the layers left out.
Known = dict[tuple[bytes, int], np.ndarray]
MOST_KNOWN = 256


def contexts_of(
    encoder: Engine,
    tokenizer: Tokenizer,
    most: int,
    requests: Sequence[Request],
    options: Options,
    known: Known,
) -> list[np.ndarray]:
    """The context of every picture, [2, tokens, width] with what is steered away from first, or
    [1, tokens, width] if nothing is guided.

    most: rows of one call of the encoder. known: see `encoded_stretches`.
    Raises UsageError for embeddings that do not fit.
    """
    given, avoided = options.prompt_embeds, options.negative_prompt_embeds
    texts = [r.prompt for r in requests] if given is None else []
    if options.guided and avoided is None:
        texts.append(options.negative_prompt)
    chunks = {
        text: chunks_from_prompt(
            text,
            tokenizer,
            weighting=options.weighting,
            chunking=options.long_prompts == "chunk",
        )
        for text in dict.fromkeys([*texts, ""])
    }
    stretches = encoded_stretches(encoder, chunks.values(), most, options.clip_skip, known)

    def of_text(text: str, count: int) -> np.ndarray:
        """The context of a text in `count` stretches; the ones that it lacks are empty."""
        filled = [(chunks[text], i) for i in range(len(chunks[text]))]
        filled += [(chunks[""], 0)] * (count - len(filled))
        return np.concatenate(
            [weighted(stretches[c.ids[i].tobytes()], c.weights[i]) for c, i in filled]
        )

    contexts = []
    for request in requests:
        negative = chunks.get(options.negative_prompt, ()) if avoided is None else ()
        if given is None:
            count = max(len(chunks[request.prompt]), len(negative) if options.guided else 0)
            prompted = of_text(request.prompt, count)
        else:
            prompted = _given("prompt_embeds", given, request.prompt_index)
            count = -(-len(prompted) // tokenizer.length)
        if not options.guided:
            contexts.append(prompted[None])
            continue
        if avoided is None:
            unwanted = of_text(options.negative_prompt, count)
        else:
            unwanted = _given("negative_prompt_embeds", avoided, request.prompt_index)
        if unwanted.shape != prompted.shape:
            raise UsageError(
                f"the negative prompt's embeddings are {list(unwanted.shape)}, the prompt's "
                f"{list(prompted.shape)}; give both of one shape"
            )
        contexts.append(np.stack([unwanted, prompted]))
    return contexts


def _given(name: str, embeddings: np.ndarray, index: int) -> np.ndarray:
    """One picture's embeddings [tokens, width]; one for all is enough."""
    array = np.asarray(embeddings, np.float32)
    if array.ndim != 3 or index >= len(array) > 1 or not np.isfinite(array).all():
        raise UsageError(
            f"{name} are {list(array.shape)}; expected [pictures or 1, tokens, width] of finite "
            "numbers"
        )
    return array[min(index, len(array) - 1)]


def encoded_stretches(
    encoder: Engine, chunks: Iterable[Chunks], most: int, clip_skip: int, known: Known
) -> dict[bytes, np.ndarray]:
    """The context [tokens, width] of every different stretch, by the bytes of its ids.

    known: those of earlier calls; kept up to date, the oldest are dropped.
    """
    rows = {row.tobytes(): row for each in chunks for row in each.ids}
    found = {key: known[key, clip_skip] for key in rows if (key, clip_skip) in known}
    keys = [key for key in rows if key not in found]
    for i in range(0, len(keys), most):
        part = keys[i : i + most]
        layers = encoder({"input_ids": np.stack([rows[key] for key in part])})["contexts"]
        if clip_skip >= layers.shape[1]:
            raise UsageError(
                f"clip_skip {clip_skip}; this text encoder has {layers.shape[1]} layers"
            )
        for key, context in zip(part, layers[:, layers.shape[1] - 1 - clip_skip], strict=True):
            found[key] = known[key, clip_skip] = np.array(context, np.float32)
    while len(known) > MOST_KNOWN:
        del known[next(iter(known))]
    return found
