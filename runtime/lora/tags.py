"""LoRA tags in prompts: `<lora:name:0.8>`, as the AUTOMATIC1111 web UI reads them.

Knows text; not files, nor whether there is a LoRA of a name. Every `<word:arguments>` is an extra
network's tag there: of those, `lora` and its other name `lyco` are read here, and the rest is
refused by name. Everything else (`<3`, `a <b> c`, `<lora>`) is text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sdrt.errors import UsageError

MAX_WEIGHT = 10.0
MAX_LORAS = 32  # files of one prompt
TAG = re.compile(r"<(\w+):([^>]+)>")
LORA_KINDS = ("lora", "lyco")
OTHER_KINDS = ("hypernet",)
LITERAL = "to have it read as text, turn the weighting syntax off (--literal, weighting=False)"


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """How much of a LoRA's change is added to the text encoders, and how much to the UNet."""

    text_encoder: float = 1.0
    unet: float = 1.0

    def of(self, part: str) -> float:
        """The weight for a component of the bundle."""
        return self.unet if part == "unet" else self.text_encoder

    def __add__(self, other: "LoraWeight") -> "LoraWeight":
        return LoraWeight(self.text_encoder + other.text_encoder, self.unet + other.unet)

    def __str__(self) -> str:
        """As a tag has it: `0.8`, or `1:0.5` where the two differ."""
        unet = _shortest(self.unet)
        if self.text_encoder == self.unet:
            return unet
        return f"{_shortest(self.text_encoder)}:{unet}"


def parse_weight(weight: "float | LoraWeight") -> LoraWeight:
    """A weight for both parts, or one for each; raises UsageError outside -10 to 10."""
    both = weight if isinstance(weight, LoraWeight) else LoraWeight(weight, weight)
    for value in (both.text_encoder, both.unet):
        if not -MAX_WEIGHT <= value <= MAX_WEIGHT:
            raise UsageError(f"LoRA weight {value:g}; expected -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return both


def _shortest(value: float) -> str:
    """Without a needless `.0`, and all the digits that give the same number again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


@dataclass(frozen=True, slots=True)
class LoraTag:
    """One tag: the name as it is written, and its weight."""

    name: str
    weight: LoraWeight

    def __str__(self) -> str:
        return f"<lora:{self.name}:{self.weight}>"


def parse_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """A prompt's text without its tags, and the tags in their order.

    Args:
        prompt: As the user writes it. `<lora:NAME>`, `<lora:NAME:WEIGHT>` and
            `<lora:NAME:TEXT_ENCODER:UNET>` are read, also with `te=` and `unet=`.

    Returns:
        The text, in which nothing but the tags is missing (the spaces around them stay), and the
        tags. The time is linear in the prompt's length.

    Raises:
        UsageError: For a tag of another kind, an argument that is not understood, and a weight
            that is not a number from -10 to 10.

    Source: the web UI's `modules/extra_networks.py` and its extension `Lora`.
    """
    # All that ends in ">" can match at once; in what follows the last one nothing can.
    end = prompt.rfind(">") + 1
    tags = tuple(_tag(match) for match in TAG.finditer(prompt, 0, end))
    return TAG.sub("", prompt[:end]) + prompt[end:], tags


def check_untagged(prompt: str, what: str, instead: str) -> None:
    """Raise UsageError for an extra network's tag in a text where none is applied.

    Args:
        prompt: The text.
        what: What the text is, such as `negative prompt`.
        instead: What to do instead.
    """
    for match in TAG.finditer(prompt, 0, prompt.rfind(">") + 1):
        if match[1] in (*LORA_KINDS, *OTHER_KINDS):
            tag = _quoted(match)
            raise UsageError(
                f"The tag {tag} in the {what} is not applied", hint=f"{instead}; {LITERAL}"
            )


def _tag(match: re.Match[str]) -> LoraTag:
    kind, (name, *arguments) = match[1], match[2].split(":")
    if kind not in LORA_KINDS:
        raise UsageError(
            f"The tag {_quoted(match)} names an extra network of the kind {kind[:40]!r}; only "
            "<lora:NAME:WEIGHT> is supported",
            hint=LITERAL,
        )
    if not name.strip():
        raise UsageError(f"The tag {_quoted(match)} has no name; expected <lora:NAME:WEIGHT>")
    return LoraTag(name, _weight(match, arguments))


def _weight(match: re.Match[str], arguments: list[str]) -> LoraWeight:
    """One weight is for both; the UNet's is the text encoder's where it is not given."""
    values = dict(_arguments(match, arguments))
    try:
        text_encoder = float(values.get("te", "1"))
        unet = float(values["unet"]) if "unet" in values else text_encoder
    except ValueError:
        raise UsageError(
            f"The weight in the tag {_quoted(match)} is not a number; expected one such as "
            "<lora:NAME:0.8>"
        ) from None
    try:
        return parse_weight(LoraWeight(text_encoder, unet))
    except UsageError as error:
        raise UsageError(f"{error.message}, in the tag {_quoted(match)}") from None


def _arguments(match: re.Match[str], arguments: list[str]) -> Iterator[tuple[str, str]]:
    """The positional ones by name, then those given by name, which have the last word."""
    places = ("te", "unet")
    positional = [text for text in arguments if text.count("=") != 1]
    if len(positional) > len(places):
        raise UsageError(
            f"The tag {_quoted(match)} has {len(positional)} values after its name; expected at "
            "most two weights, the text encoder's and the UNet's (a rank, dyn, is not supported)"
        )
    yield from zip(places, positional, strict=False)
    for text in arguments:
        key, _, value = text.partition("=")
        if text.count("=") != 1:
            continue
        if key not in places:
            raise UsageError(
                f"The argument {key[:40]!r} in the tag {_quoted(match)} is not supported; expected "
                "te= or unet="
            )
        yield key, value


def _quoted(match: re.Match[str]) -> str:
    return match[0] if len(match[0]) <= 80 else f"{match[0][:76]}...>"
