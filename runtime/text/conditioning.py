"""What the UNet reads besides latents and timestep: encoded prompts, or embeddings, and sizes.

Knows the text encoders' interface: token ids in, the hidden states after every layer out, and from
some encoders one vector for the full prompt (`pooled`).
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from sdrt.bundle.manifest import LORA_FACTORS, REFINER_TIME_IDS, TIME_IDS
from sdrt.engine import Engine
from sdrt.errors import UsageError
from sdrt.runtime.conditioning_schedule import ConditioningSchedule, build_constant_schedule
from sdrt.runtime.lora.rows import LoraFactors
from sdrt.runtime.options import SIZE_OPTIONS, GenerationOptions
from sdrt.runtime.prompt_timeline import PromptTimeline
from sdrt.runtime.refiner_options import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE
from sdrt.runtime.requests import Request
from sdrt.runtime.sampling_program import INPUT_IDS, TOKEN_WEIGHTS
from sdrt.runtime.textual_inversion.engine import WORD_EMBEDDINGS, has_words
from sdrt.runtime.textual_inversion.words import EncoderWords

from .prompt_embeds import read_embeddings, select_row
from .prompt_weighting import Chunks, apply_weights, chunks_from_prompt
from .tokenizer import Tokenizer

# Inputs of the UNet by name: one row, [...] each.
Conditioning = dict[str, np.ndarray]
# Rows of one image by text, and by the place of its prompt among those joined; -1 is negative.
Rows = dict[tuple[int, str], Conditioning]
MAX_CACHED_CHUNKS = 256
_CACHE_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """An encoder's output for one chunk of tokens.

    Attributes:
        context: [tokens, width] float32.
        pooled: [width] float32, from the encoders that have it.
    """

    context: np.ndarray
    pooled: np.ndarray | None


# By the encoder's name, the bytes of the ids and clip_skip; the oldest first.
EncodedChunkCache = dict[tuple[str, bytes, int], EncodedChunk]


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """One of a model's text encoders with its tokenizer.

    Attributes:
        name: Of the component.
        engine: Token ids to hidden states.
        tokenizer: Text to token ids.
        max_rows: Rows of one call.
        cache: Chunks encoded before; updated, and the oldest are removed.
        word_engine: The encoder for chunks that have words of textual inversion.
        words: The embeddings of these words.
        lora_engine: The encoder with LoRA factors.
        lora: The factors that it is called with; None for the plain encoder.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    max_rows: int
    cache: EncodedChunkCache
    word_engine: Engine | None = None
    words: EncoderWords | None = None
    lora_engine: Engine | None = None
    lora: LoraFactors | None = None

    def tokenize(self, texts: Iterable[str], options: GenerationOptions) -> dict[str, Chunks]:
        """Every text's chunks of token ids."""
        return {
            text: chunks_from_prompt(
                text,
                self.tokenizer,
                weighting=options.weighting,
                chunking=options.long_prompts == "chunk",
            )
            for text in texts
        }

    def encode(self, chunks: Iterable[Chunks], clip_skip: int) -> dict[bytes, EncodedChunk]:
        """Encode every different chunk.

        Args:
            chunks: Of all texts.
            clip_skip: Layers to leave out at the encoder's end.

        Returns:
            Encoded chunks by the bytes of their ids.

        Raises:
            UsageError: For a clip_skip that leaves no layer.
        """
        self.check_clip_skip(clip_skip)
        rows = {row.tobytes(): row for text in chunks for row in text.ids}
        places = {key: (self.name, self._digest(row) + key, clip_skip) for key, row in rows.items()}
        hits = ((key, self.cache.get(place)) for key, place in places.items())
        encoded = {key: hit for key, hit in hits if hit is not None}
        missing = [key for key in rows if key not in encoded]
        for keys in self._batches(rows, missing):
            outputs = self._call(np.stack([rows[key] for key in keys]))
            layers, pooled = outputs["contexts"], outputs.get("pooled")
            for j, key in enumerate(keys):
                # [rows, layers, tokens, width] -> [tokens, width]
                context = np.array(layers[j, layers.shape[1] - 1 - clip_skip], np.float32)
                vector = None if pooled is None else np.array(pooled[j], np.float32)
                encoded[key] = EncodedChunk(context, vector)
        self._store({places[key]: encoded[key] for key in missing})
        return encoded

    def _digest(self, ids: np.ndarray) -> bytes:
        """What tells a chunk from another of the same ids: the words' vectors, if it has words, and
        LoRA factors.
        """
        words = self.words.digest if self.words is not None and has_words(ids) else b""
        return words + (self.lora.digests.get(self.name, b"") if self.lora else b"")

    def _batches(
        self, rows: Mapping[bytes, np.ndarray], keys: list[bytes]
    ) -> Iterator[list[bytes]]:
        """Chunks for one call each: those with words of textual inversion, and the others."""
        for wordy in (False, True):
            alike = [key for key in keys if has_words(rows[key]) == wordy]
            for i in range(0, len(alike), self.max_rows):
                yield alike[i : i + self.max_rows]

    def _call(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The encoder's outputs; without LoRA factors and words of textual inversion, those of the
        plain graph.
        """
        factors = self.lora.by_part.get(self.name) if self.lora else None
        if factors is not None:
            assert self.lora_engine is not None
            assert not has_words(ids), "LoRA factors of an encoder exclude textual inversion"
            rows = np.repeat(factors[None], len(ids), axis=0)  # [rows, P]
            return self.lora_engine({"input_ids": ids, LORA_FACTORS: rows})
        if not has_words(ids):
            return self.engine({"input_ids": ids})
        assert self.word_engine is not None
        assert self.words is not None
        return self.word_engine({"input_ids": ids, WORD_EMBEDDINGS: self.words.vectors})

    def _store(self, encoded: EncodedChunkCache) -> None:
        """Cache these and remove the oldest; all who share the cache do it in turn."""
        with _CACHE_LOCK:
            self.cache.update(encoded)
            while len(self.cache) > MAX_CACHED_CHUNKS:
                del self.cache[next(iter(self.cache))]

    def check_clip_skip(self, clip_skip: int) -> None:
        """Raise UsageError for a clip_skip that leaves no layer."""
        layers = next(spec for spec in self.engine.outputs if spec.name == "contexts").shape[1]
        if clip_skip >= int(layers):
            raise UsageError(
                f"clip_skip is {clip_skip}; this text encoder has {layers} layers",
                hint=f"pass at most {int(layers) - 1}",
            )


class EncodedTexts:
    """Texts as all of a model's encoders encode them."""

    def __init__(
        self, encoders: Sequence[PromptEncoder], texts: Sequence[str], options: GenerationOptions
    ) -> None:
        """Encode the texts, and the empty one that shorter texts are padded with."""
        unique = dict.fromkeys([*texts, ""])
        self._chunks = [encoder.tokenize(unique, options) for encoder in encoders]
        self._encoded = [
            encoder.encode(chunks.values(), options.clip_skip)
            for encoder, chunks in zip(encoders, self._chunks, strict=True)
        ]

    def max_chunks(self, texts: Iterable[str]) -> int:
        """Chunks of the longest of these texts, in the encoder that has most."""
        return max(len(chunks[text]) for chunks in self._chunks for text in set(texts))

    def encode_joined(self, prompts: Sequence[Sequence[str]], min_chunks: int) -> Rows:
        """The rows of prompts joined by `AND`, all of one length.

        As in A1111, the texts of one prompt are padded with empty chunks, and a shorter prompt with
        its last token's vector; then all are padded with empty chunks.

        Args:
            prompts: Of each prompt, the texts that it goes through.
            min_chunks: The least number of chunks.
        """
        counts = [self.max_chunks(texts) for texts in prompts]
        longest = max(counts)
        rows = {}
        for i, texts in enumerate(prompts):
            for text in dict.fromkeys(texts):
                row = self.conditioning(text, counts[i])
                context = self._lengthen(row["context"], counts[i], longest, min_chunks)
                rows[i, text] = {**row, "context": context}
        return rows

    def _lengthen(
        self, context: np.ndarray, num_chunks: int, repeated: int, min_chunks: int
    ) -> np.ndarray:
        """[tokens, width] of so many chunks, with its last vector repeated, then empty chunks."""
        length = len(context) // num_chunks
        parts = [context, np.repeat(context[-1:], (repeated - num_chunks) * length, axis=0)]
        if min_chunks > repeated:
            parts.append(self.conditioning("", min_chunks - repeated)["context"])
        return np.concatenate(parts)

    def conditioning(self, text: str, num_chunks: int) -> Conditioning:
        """A text padded with empty chunks.

        Returns:
            `context` [tokens, width], the encoders' widths concatenated, and `pooled` [width] of
            the first chunk from the encoders that have it.
        """
        contexts, pooled = [], {}
        for chunks, encoded in zip(self._chunks, self._encoded, strict=True):
            own, empty = chunks[text], chunks[""]
            padding = [(empty, 0)] * (num_chunks - len(own))
            places = [*((own, i) for i in range(len(own))), *padding]
            parts = [(encoded[part.ids[i].tobytes()], part.weights[i]) for part, i in places]
            contexts.append(np.concatenate([apply_weights(p.context, w) for p, w in parts]))
            if (vector := parts[0][0].pooled) is not None:
                pooled["pooled"] = vector
        return {"context": np.concatenate(contexts, axis=-1), **pooled}


def build_conditioning(
    encoders: Sequence[PromptEncoder],
    requests: Sequence[Request],
    timelines: Sequence[PromptTimeline],
    options: GenerationOptions,
    *,
    input_names: Collection[str],
    size: tuple[int, int],
    zero_empty_prompt: bool = False,
    num_time_ids: int = TIME_IDS,
) -> list[ConditioningSchedule]:
    """Encode what the UNet reads of every image.

    Args:
        encoders: The model's text encoders.
        requests: The images.
        timelines: Of each, the texts that it reads.
        options: Of their call.
        input_names: Of the UNet.
        size: (width, height) of the images.
        zero_empty_prompt: Whether an empty negative prompt is zeros instead of encoded.
        num_time_ids: That the UNet reads; a refiner has an aesthetic score among them.

    Raises:
        UsageError: For embeddings that do not fit, and for sizes that the model does not read.
    """
    _check_supported(options, input_names, num_time_ids)
    has_pooled = "pooled" in input_names
    conditioning = _encode_prompts(
        encoders, requests, timelines, options, has_pooled, zero_empty_prompt
    )
    if "time_ids" in input_names:
        negative, positive = build_time_ids(options, size, num_time_ids)
        return [schedule.with_input("time_ids", positive, negative) for schedule in conditioning]
    return conditioning


def tokenize_prompts(
    encoder: PromptEncoder, timelines: Sequence[PromptTimeline], options: GenerationOptions
) -> list[ConditioningSchedule] | None:
    """Token ids for an engine that encodes them as part of the run.

    Args:
        encoder: The model's text encoder.
        timelines: Of each image; all are plain.
        options: Of their call.

    Returns:
        Of every image `input_ids` [2 or 1, chunks, tokens] int32 and their `weights` float32; None
        where there are more chunks than the encoder accepts in one call, or words of textual
        inversion.
    """
    encoder.check_clip_skip(options.clip_skip)
    _check_supported(options, ("context",))
    pairs = [timeline.evaluations[0][0 if options.guided else 1 :] for timeline in timelines]
    chunks = encoder.tokenize(dict.fromkeys([*chain(*pairs), ""]), options)
    if any(has_words(text.ids) for text in chunks.values()):
        return None
    tokenized = [_stack_chunks([chunks[text] for text in pair], chunks[""]) for pair in pairs]
    unique = {ids.tobytes() for tensors in tokenized for row in tensors[INPUT_IDS] for ids in row}
    if len(unique) > 2 * encoder.max_rows:
        return None
    return [build_constant_schedule(tensors) for tensors in tokenized]


def _stack_chunks(texts: Sequence[Chunks], empty: Chunks) -> Conditioning:
    """Texts in as many chunks as the longest has, shorter ones padded with empty chunks."""
    count = max(len(text) for text in texts)
    padded = [[text, *[empty] * (count - len(text))] for text in texts]
    ids = [np.concatenate([chunks.ids for chunks in row]) for row in padded]
    weights = [np.concatenate([chunks.weights for chunks in row]) for row in padded]
    return {INPUT_IDS: np.stack(ids), TOKEN_WEIGHTS: np.stack(weights).astype(np.float32)}


def _check_supported(
    options: GenerationOptions, input_names: Collection[str], num_time_ids: int = TIME_IDS
) -> None:
    """Raise UsageError for conditioning that this model does not read."""
    is_refiner = num_time_ids == REFINER_TIME_IDS
    for related, is_read, models in (
        (SIZE_OPTIONS[:2], "time_ids" in input_names, "models such as SDXL"),
        (SIZE_OPTIONS[2:], "time_ids" in input_names and not is_refiner, "models such as SDXL"),
        (("pooled_prompt_embeds",), "pooled" in input_names, "models such as SDXL"),
        (("aesthetic_score",), is_refiner, "refiners"),
    ):
        for option in (*related, *(f"negative_{name}" for name in related)):
            if not is_read and getattr(options, option) is not None:
                raise UsageError(
                    f"{option} is unsupported by this model", hint=f"it is for {models}"
                )


def _encode_prompts(
    encoders: Sequence[PromptEncoder],
    requests: Sequence[Request],
    timelines: Sequence[PromptTimeline],
    options: GenerationOptions,
    has_pooled: bool,
    zero_empty_prompt: bool,
) -> list[ConditioningSchedule]:
    """`context` of every image, and `pooled` if the model reads it."""
    positive_embeds = negative_embeds = None
    if options.prompt_embeds is not None:
        positive_embeds = read_embeddings(options, "", has_pooled)
    if options.guided and options.negative_prompt_embeds is not None:
        negative_embeds = read_embeddings(options, "negative_", has_pooled)

    def has_negative(timeline: PromptTimeline) -> bool:
        return options.guided or timeline.needs_negative

    def is_encoded(timeline: PromptTimeline) -> bool:
        is_zero = zero_empty_prompt and not any(timeline.negative)
        return has_negative(timeline) and negative_embeds is None and not is_zero

    prompts = [chain(*t.prompts) for t in timelines] if positive_embeds is None else []
    negatives = [timeline.negative for timeline in timelines if is_encoded(timeline)]
    encoded = EncodedTexts(encoders, [*chain(*prompts, *negatives)], options)

    def encode(request: Request, timeline: PromptTimeline) -> ConditioningSchedule:
        num_chunks = encoded.max_chunks(timeline.negative) if is_encoded(timeline) else 0
        positive: Rows = {}
        if positive_embeds is None:
            positive = encoded.encode_joined(timeline.prompts, num_chunks)
        else:
            positive[0, ""] = select_row(positive_embeds, request.prompt_index)
        first = next(iter(positive.values()))
        num_chunks = -(-len(first["context"]) // encoders[0].tokenizer.length)
        negative: Rows = {}
        for text in timeline.negative if has_negative(timeline) else ():
            if (-1, text) in negative:
                continue
            if negative_embeds is not None:
                row = select_row(negative_embeds, request.prompt_index)
            elif is_encoded(timeline):
                row = encoded.conditioning(text, num_chunks)
            else:
                row = {name: np.zeros_like(value) for name, value in first.items()}
            negative[-1, text] = row
        return _build_schedule(negative, positive, timeline)

    return [encode(*pair) for pair in zip(requests, timelines, strict=True)]


def _build_schedule(
    negative: Rows, positive: Rows, timeline: PromptTimeline
) -> ConditioningSchedule:
    """Every different row once, [...] each -> [D, ...], and which of them each evaluation reads."""
    rows = {**negative, **positive}
    first = next(iter(positive.values()))
    for name, value in first.items():
        for row in rows.values():
            if row[name].shape != value.shape:
                kind = "" if name == "context" else "pooled "
                raise UsageError(
                    f"the negative prompt's {kind}embeddings are {list(row[name].shape)}, the "
                    f"prompt's {list(value.shape)}",
                    hint="pass both in one shape",
                )
    places = {key: i for i, key in enumerate(rows)}
    start = -1 if negative else 0
    selections = tuple(
        tuple(places[i, text] for i, text in enumerate(texts[start + 1 :], start))
        for texts in timeline.evaluations
    )
    inputs = {name: np.stack([row[name] for row in rows.values()]) for name in first}
    return ConditioningSchedule(inputs, len(negative), selections)


def build_time_ids(
    options: GenerationOptions, size: tuple[int, int], count: int = TIME_IDS
) -> np.ndarray:
    """The sizes that SDXL is conditioned on: Podell et al. 2023 (arXiv:2307.01952), section 2.2.

    Args:
        options: The call's sizes, (height, width) each, and aesthetic scores.
        size: (width, height) of the image, the default of both sizes.
        count: 6, or 5 of a refiner, which reads an aesthetic score instead of the target's size.

    Returns:
        [2, count] float32, negative first.
    """
    width, height = size
    defaults = dict(zip(SIZE_OPTIONS, ((height, width), (0, 0), (height, width)), strict=True))
    positive = {name: getattr(options, name) or defaults[name] for name in SIZE_OPTIONS}
    negative = {n: getattr(options, f"negative_{n}") or positive[n] for n in SIZE_OPTIONS}
    if count == REFINER_TIME_IDS:
        score, low = options.aesthetic_score, options.negative_aesthetic_score
        target = SIZE_OPTIONS[-1]
        positive[target] = (AESTHETIC_SCORE if score is None else score,)
        negative[target] = (NEGATIVE_AESTHETIC_SCORE if low is None else low,)
    return np.array([[*chain(*sizes.values())] for sizes in (negative, positive)], np.float32)
