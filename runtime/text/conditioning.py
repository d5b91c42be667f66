"""What the UNet is told besides latents and time: prompts through the text encoders, or embeddings
given, and sizes.

Knows the text encoders' interface: ids in, the context after every layer out, and from some the
prompt as a whole (`pooled`).
"""

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from sdrt.engine import Engine
from sdrt.errors import UsageError
from sdrt.runtime.options import SIZES, GenerationOptions, Request
from sdrt.runtime.sampling_program import INPUT_IDS, TOKEN_WEIGHTS

from .prompt_weighting import Chunks, chunks_from_prompt, weighted
from .tokenizer import Tokenizer

# What the UNet is fed by input name, [rows, ..]. Of a picture that is guided there are two rows,
# what is steered away from first; else one.
Conditioning = dict[str, np.ndarray]
MAX_CACHED_CHUNKS = 256
_CACHE_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """What an encoder made of a stretch of tokens: [tokens, width], and as a whole [width] from the
    encoders that give it.
    """

    context: np.ndarray
    pooled: np.ndarray | None


# Stretches encoded before, by the encoder's name, the bytes of their ids and the layers left out.
EncodedChunkCache = dict[tuple[str, bytes, int], EncodedChunk]


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """One of a model's text encoders.

    most: rows of one call
    known: see `Known`; kept up to date, the oldest are dropped
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    most: int
    known: EncodedChunkCache

    def chunks(self, texts: Iterable[str], options: GenerationOptions) -> dict[str, Chunks]:
        """Every text's stretches of tokens."""
        return {
            text: chunks_from_prompt(
                text,
                self.tokenizer,
                weighting=options.weighting,
                chunking=options.long_prompts == "chunk",
            )
            for text in texts
        }

    def encoded(self, chunks: Iterable[Chunks], clip_skip: int) -> dict[bytes, EncodedChunk]:
        """Every different stretch, by the bytes of its ids; raises UsageError for a clip_skip that
        leaves no layer.
        """
        self.check_skip(clip_skip)
        rows = {row.tobytes(): row for each in chunks for row in each.ids}
        places = {key: (self.name, key, clip_skip) for key in rows}
        hits = ((key, self.known.get(at)) for key, at in places.items())
        found = {key: hit for key, hit in hits if hit is not None}
        keys = [key for key in rows if key not in found]
        for i in range(0, len(keys), self.most):
            part = keys[i : i + self.most]
            made = self.engine({"input_ids": np.stack([rows[key] for key in part])})
            layers, pooled = made["contexts"], made.get("pooled")
            for j, key in enumerate(part):
                context = np.array(layers[j, layers.shape[1] - 1 - clip_skip], np.float32)
                whole = None if pooled is None else np.array(pooled[j], np.float32)
                found[key] = EncodedChunk(context, whole)
        self._keep({places[key]: found[key] for key in keys})
        return found

    def _keep(self, made: EncodedChunkCache) -> None:
        """Keep these for later calls, and drop the oldest; all who share `known` do it in turn."""
        with _CACHE_LOCK:
            self.known.update(made)
            while len(self.known) > MAX_CACHED_CHUNKS:
                del self.known[next(iter(self.known))]

    def check_skip(self, clip_skip: int) -> None:
        """Raise UsageError for a clip_skip that leaves no layer."""
        layers = next(spec for spec in self.engine.outputs if spec.name == "contexts").shape[1]
        if clip_skip >= int(layers):
            raise UsageError(f"clip_skip {clip_skip}; this text encoder has {layers} layers")


class EncodedTexts:
    """Texts as all of a model's encoders read them."""

    def __init__(
        self, encoders: Sequence[PromptEncoder], texts: Sequence[str], options: GenerationOptions
    ) -> None:
        every = dict.fromkeys([*texts, ""])
        self.chunks = [encoder.chunks(every, options) for encoder in encoders]
        self.stretches = [
            encoder.encoded(chunks.values(), options.clip_skip)
            for encoder, chunks in zip(encoders, self.chunks, strict=True)
        ]

    def stretches_of(self, text: str) -> int:
        return max(len(chunks[text]) for chunks in self.chunks)

    def told(self, text: str, count: int) -> Conditioning:
        """A text in `count` stretches, the ones that it lacks empty: its context [tokens, width],
        the encoders' side by side, and as a whole [width] by its first stretch.
        """
        told: Conditioning = {}
        contexts = []
        for chunks, stretches in zip(self.chunks, self.stretches, strict=True):
            own, empty = chunks[text], chunks[""]
            filled = [(own, i) for i in range(len(own))] + [(empty, 0)] * (count - len(own))
            read = [(stretches[each.ids[i].tobytes()], each.weights[i]) for each, i in filled]
            contexts.append(np.concatenate([weighted(s.context, w) for s, w in read]))
            if (whole := read[0][0].pooled) is not None:
                told["pooled"] = whole
        return {"context": np.concatenate(contexts, axis=-1), **told}


def build_conditioning(
    encoders: Sequence[PromptEncoder],
    requests: Sequence[Request],
    options: GenerationOptions,
    *,
    fed: Collection[str],
    size: tuple[int, int],
    zeroed: bool = False,
) -> list[Conditioning]:
    """What the UNet is told of every picture.

    fed: the names of the UNet's inputs
    size: (width, height) of the pictures
    zeroed: an empty negative prompt is zeros
    Raises UsageError for embeddings that do not fit, and for sizes that the model is not told of.
    """
    _check_supported(options, fed)
    told = _encode_prompts(encoders, requests, options, "pooled" in fed, zeroed)
    if "time_ids" in fed:
        time_ids = build_time_ids(options, size)[0 if options.guided else 1 :]
        told = [{**each, "time_ids": time_ids} for each in told]
    return told


def tokenize_requests(
    encoder: PromptEncoder, requests: Sequence[Request], options: GenerationOptions
) -> list[Conditioning] | None:
    """Of every picture the ids of its text's stretches, `input_ids` [2 or 1, stretches, tokens],
    and their `weights`, for an engine that reads them in its run; None where there is more than
    the encoder takes at once.
    """
    encoder.check_skip(options.clip_skip)
    _check_supported(options, ("context",))
    pairs = [(r.negative_prompt, r.prompt) if options.guided else (r.prompt,) for r in requests]
    chunks = encoder.chunks(dict.fromkeys([*chain(*pairs), ""]), options)
    told = [_stack_chunks([chunks[text] for text in pair], chunks[""]) for pair in pairs]
    rows = {row.tobytes() for each in told for stretches in each[INPUT_IDS] for row in stretches}
    return told if len(rows) <= 2 * encoder.most else None


def _stack_chunks(texts: Sequence[Chunks], empty: Chunks) -> Conditioning:
    """Texts in as many stretches as the longest has, the ones that they lack empty."""
    count = max(len(text) for text in texts)
    filled = [[text, *[empty] * (count - len(text))] for text in texts]
    ids = [np.concatenate([each.ids for each in stretches]) for stretches in filled]
    weights = [np.concatenate([each.weights for each in stretches]) for stretches in filled]
    return {INPUT_IDS: np.stack(ids), TOKEN_WEIGHTS: np.stack(weights).astype(np.float32)}


def _check_supported(options: GenerationOptions, fed: Collection[str]) -> None:
    """Raise UsageError for what this model is not told of."""
    for name, side in (("time_ids", SIZES), ("pooled", ("pooled_prompt_embeds",))):
        for option in (*side, *(f"negative_{each}" for each in side)):
            if name not in fed and getattr(options, option) is not None:
                raise UsageError(f"{option} is for models such as XL; this one does not take it")


def _encode_prompts(
    encoders: Sequence[PromptEncoder],
    requests: Sequence[Request],
    options: GenerationOptions,
    pooled: bool,
    zeroed: bool,
) -> list[Conditioning]:
    """The context of every picture, and the prompt as a whole if it is `pooled`."""
    prompted = avoided = None
    if options.prompt_embeds is not None:
        prompted = _read_embeddings(options, "", pooled)
    if options.guided and options.negative_prompt_embeds is not None:
        avoided = _read_embeddings(options, "negative_", pooled)

    def reads(negative: str) -> bool:
        return options.guided and avoided is None and not (zeroed and not negative)

    texts = [r.prompt for r in requests] if prompted is None else []
    negatives = [r.negative_prompt for r in requests if reads(r.negative_prompt)]
    reading = EncodedTexts(encoders, texts + negatives, options)

    def told(request: Request) -> Conditioning:
        negative = request.negative_prompt
        if prompted is None:
            count = reading.stretches_of(request.prompt)
            if reads(negative):
                count = max(count, reading.stretches_of(negative))
            wanted = reading.told(request.prompt, count)
        else:
            wanted = _select_row(prompted, request.prompt_index)
            count = -(-len(wanted["context"]) // encoders[0].tokenizer.length)
        if not options.guided:
            return {name: value[None] for name, value in wanted.items()}
        if avoided is not None:
            unwanted = _select_row(avoided, request.prompt_index)
        elif reads(negative):
            unwanted = reading.told(negative, count)
        else:
            unwanted = {name: np.zeros_like(value) for name, value in wanted.items()}
        return _stack_pair(unwanted, wanted)

    return [told(request) for request in requests]


def _stack_pair(unwanted: Conditioning, wanted: Conditioning) -> Conditioning:
    for name, value in wanted.items():
        if unwanted[name].shape != value.shape:
            what = "" if name == "context" else "pooled "
            raise UsageError(
                f"the negative prompt's {what}embeddings are {list(unwanted[name].shape)}, the "
                f"prompt's {list(value.shape)}; give both of one shape"
            )
    return {name: np.stack([unwanted[name], value]) for name, value in wanted.items()}


def _read_embeddings(options: GenerationOptions, side: str, pooled: bool) -> Conditioning:
    """Embeddings instead of a prompt; raises UsageError unless they are all that the model needs.

    side: "" or "negative_"
    """
    name, whole = f"{side}prompt_embeds", f"{side}pooled_prompt_embeds"
    told = {"context": _check_embeddings(name, getattr(options, name), "tokens, width")}
    if pooled:
        if getattr(options, whole) is None:
            raise UsageError(f"{name} without {whole}; this model is told of the whole prompt too")
        told["pooled"] = _check_embeddings(whole, getattr(options, whole), "width")
    return told


def _check_embeddings(name: str, embeddings: np.ndarray, axes: str) -> np.ndarray:
    array = np.asarray(embeddings, np.float32)
    if array.ndim != 2 + axes.count(",") or not len(array) or not np.isfinite(array).all():
        raise UsageError(
            f"{name} are {list(array.shape)}; expected [pictures or 1, {axes}] of finite numbers"
        )
    return array


def _select_row(told: Conditioning, index: int) -> Conditioning:
    """One picture's; one for all is enough."""
    for name, value in told.items():
        if index >= len(value) > 1:
            raise UsageError(
                f"{len(value)} embeddings ({name}) for picture {index + 1}; give one each, or one"
            )
    return {name: value[min(index, len(value) - 1)] for name, value in told.items()}


def group_by_length(told: Mapping[Request, Conditioning], most: int) -> Iterator[list[Request]]:
    """Pictures whose contexts, or texts, are of one length, at most so many together."""
    lengths = {r: next(iter(each.values())).shape[1] if each else 0 for r, each in told.items()}
    for tokens in sorted(set(lengths.values())):
        alike = [request for request, length in lengths.items() if length == tokens]
        for i in range(0, len(alike), most):
            yield alike[i : i + most]


def build_time_ids(options: GenerationOptions, size: tuple[int, int]) -> np.ndarray:
    """The six numbers of sizes that some models are told, [2, 6] float32, those for what is steered
    away from first: Podell et al. 2023 (arXiv:2307.01952), section 2.2. size: (width, height)
    """
    width, height = size
    usual = dict(zip(SIZES, ((height, width), (0, 0), (height, width)), strict=True))
    wanted = {name: getattr(options, name) or usual[name] for name in SIZES}
    unwanted = {name: getattr(options, f"negative_{name}") or wanted[name] for name in SIZES}
    return np.array([[*chain(*each.values())] for each in (unwanted, wanted)], np.float32)
