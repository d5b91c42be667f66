"""Values as callers pass them, parsed into the types that the pipeline computes with.

A parser takes an argument's name and its value; it returns the value in its one type, or raises
UsageError with the name, what was found and what was expected. Parsers are made of parsers. Knows
numpy and whatever converts to it, such as tensors; imports no other array library.
"""

import json
import os
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from sdrt.bundle import parse_size
from sdrt.errors import UsageError
from sdrt.json_validation import bounded, shortened

from .images import open_image
from .lora.tags import MAX_WEIGHT, LoraWeight

T = TypeVar("T")
Parser = Callable[[str, Any], T]
WHITE = {"f": 1.0, "b": 1, "u2": 65535}  # by the dtype of an image's array; of others it is 255


def refusal(name: str, value: object, expected: str) -> UsageError:
    """The error for an argument: its name, what was found and what was expected."""
    return UsageError(f"{name} {described(value)}; expected {expected}")


def described(value: object) -> str:
    """A value in a few words: numbers as they are, others with their type, arrays by shape."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return shortened(value)
    shape = getattr(value, "shape", None)
    what = f"of shape {list(shape)}" if isinstance(shape, tuple) else _shown(value)
    return f"{what} ({type(value).__name__})"


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # integers of thousands of digits inside, for one
        return "a value"


def scalar(value: object) -> object:
    """A NumPy or tensor scalar as Python's; anything else as it is."""
    if getattr(value, "ndim", None) != 0:
        return value
    try:
        return value.item()  # type: ignore[attr-defined]
    except Exception:  # of an object that only looks like an array
        return value


def array_from(value: object) -> np.ndarray | None:
    """An array, a tensor on any device, or nested sequences as a NumPy array; None for what holds
    no numbers.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
        try:
            array = np.asarray(value)
        except TypeError:  # a dtype that NumPy lacks, such as bfloat16
            array = np.asarray(value.float())  # type: ignore[attr-defined]
    except Exception:  # of objects whose conversion fails in ways of its own
        return None
    return array if array.dtype.kind in "fiub" else None


def _listed(value: object) -> list[Any] | None:
    """The items of a list, tuple, range or array of one axis; None for anything else."""
    if isinstance(value, list | tuple | range):
        return list(value)
    array = array_from(value) if getattr(value, "ndim", None) == 1 else None
    return None if array is None else array.tolist()


def real(low: float, high: float, expected: str | None = None) -> Parser[float]:
    """A finite number within bounds; bools are not numbers."""
    wanted = expected or f"a number from {low:g} to {high:g}"

    def parse(name: str, value: object) -> float:
        number = scalar(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise refusal(name, value, wanted)
        if not low <= number <= high:  # NaN is not
            raise refusal(name, number, wanted)
        return float(number)

    return parse


def whole(low: int, high: int, expected: str | None = None) -> Parser[int]:
    """An integer within bounds, also as an integral float; bools are not numbers."""
    wanted = expected or f"a whole number from {low} to {high}"

    def parse(name: str, value: object) -> int:
        number = scalar(value)
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            raise refusal(name, number, wanted)
        return number

    return parse


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise refusal(name, value, "text")
    return str(value)  # of a subclass, such as NumPy's, too


def texts(name: str, value: object) -> str | tuple[str, ...]:
    """A text, or one for each prompt."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise refusal(name, value, "text, or a list of texts")
    return tuple(str(each) for each in value)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise refusal(name, value, "True or False")
    return bool(value)


def choice(*allowed: str) -> Parser[str]:
    def parse(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise refusal(name, value, " or ".join(allowed))
        return str(value)

    return parse


def function(name: str, value: object) -> Any:
    if not callable(value):
        raise refusal(name, value, "a function")
    return value


def sequence(item: Parser[T], expected: str, length: int | None = None) -> Parser[tuple[T, ...]]:
    """Items that are parsed alike, at least one; length: how many, where that is fixed."""

    def parse(name: str, value: object) -> tuple[T, ...]:
        items = _listed(value)
        if not items or len(items) != (length or len(items)):
            raise refusal(name, value, expected)
        return tuple(item(name, each) for each in items)

    return parse


def seeds(limit: int) -> Parser[int | tuple[int, ...]]:
    """A seed for the first image, or one for each."""
    one = whole(0, limit - 1, f"a whole number from 0 to {limit - 1}, or none: drawn")
    many = sequence(one, "a whole number, or one for each image")

    def parse(name: str, value: object) -> int | tuple[int, ...]:
        if hasattr(value, "initial_seed"):
            raise refusal(name, value, "a whole number, such as generator.initial_seed()")
        return many(name, value) if _listed(value) is not None else one(name, value)

    return parse


def size(name: str, value: object) -> str:
    """`"WIDTHxHEIGHT"`, also from (width, height)."""
    if isinstance(value, str):
        width, height = parse_size(value)
    else:
        expected = '"WIDTHxHEIGHT" or (width, height)'
        width, height = sequence(whole(1, 99_999), expected, length=2)(name, value)
        parse_size(f"{width}x{height}")
    return f"{width}x{height}"


def interval(name: str, value: object) -> tuple[float, float]:
    """Two shares of a run that do not fall."""
    expected = "two numbers from 0 to 1 that do not fall"
    low, high = sequence(real(0.0, 1.0), expected, length=2)(name, value)
    if low > high:
        raise refusal(name, value, expected)
    return low, high


def lora_weights(value: object) -> dict[str | os.PathLike[str], LoraWeight]:
    """The weight of every LoRA by its file's name or path."""
    expected = 'a mapping of names or paths to weights, such as {"name": 0.8}'
    if not isinstance(value, Mapping):
        raise refusal("loras", value, expected)
    if wrong := [key for key in value if not isinstance(key, str | os.PathLike)]:
        raise refusal("loras", wrong[0], expected)
    return {key: _lora_weight(f"LoRA weight of {key}:", each) for key, each in value.items()}


def _lora_weight(name: str, value: object) -> LoraWeight:
    """One weight for the text encoders and the UNet, or a `LoraWeight` with one for each."""
    both = (value.text_encoder, value.unet) if isinstance(value, LoraWeight) else (value, value)
    return LoraWeight(*(real(-MAX_WEIGHT, MAX_WEIGHT)(name, each) for each in both))


def configuration(name: str, value: object) -> dict[str, Any]:
    """A scheduler's configuration, of what JSON can hold."""
    if not isinstance(value, Mapping):
        raise refusal(name, value, "a name, or a scheduler's configuration")

    def plain(each: object) -> object:
        if (array := array_from(each)) is None:
            raise TypeError(f"{described(each)} is no value of JSON")
        return array.tolist()

    try:
        config: dict[str, Any] = json.loads(json.dumps(dict(value), default=plain))
        bounded(config, name)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the configuration of the scheduler: {error}") from error
    return config


def numbers(name: str, value: object) -> np.ndarray:
    """An array of any shape and numeric dtype."""
    array = array_from(value)
    if array is None or array.dtype.kind == "b" or array.ndim == 0:
        raise refusal(name, value, "an array of numbers")
    return array


def image(name: str, value: object) -> Image.Image:
    """A PIL image, a file's path, or an array: [H, W], [H, W, C] or, as tensors are laid out,
    [C, H, W], also with an axis of one image before; C is 1, 3 or 4. Integers are 0 to 255, floats
    0 to 1.
    """
    return _image(name, value, scaled=True)


def depth_map(name: str, value: object) -> Image.Image:
    """The same, with floats of any range: depth maps are stretched to one range anyhow."""
    return _image(name, value, scaled=False)


def _image(name: str, value: object, scaled: bool) -> Image.Image:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Image.Image):
        if value.mode == "F" and scaled:
            return _image_from_array(name, np.asarray(value), value, scaled)
        return value
    if isinstance(value, str | os.PathLike):
        return open_image(Path(value))
    array = array_from(value) if hasattr(value, "shape") else None
    if array is None:
        many = isinstance(value, list | tuple) and len(value) > 1
        hint = "; all images of a call start from one, so make a call for each" if many else ""
        raise refusal(name, value, f"a PIL image, a file's path or an array{hint}")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    return _image_from_array(name, _channels_last(array, value), value, scaled)


def _channels_last(array: np.ndarray, given: object) -> np.ndarray:
    """[C, H, W] -> [H, W, C], and one channel -> [H, W]. Where both fit, tensors have their
    channels first, arrays last.
    """
    if array.ndim == 3:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, 2))
        if first and (hasattr(given, "detach") or not last):
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1:
            array = array[:, :, 0]
    return array


def _image_from_array(name: str, array: np.ndarray, given: object, scaled: bool) -> Image.Image:
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise refusal(name, given, "one image, [H, W], [H, W, C] or [C, H, W] with C 1, 3 or 4")
    if not np.isfinite(array).all():
        raise UsageError(f"{name} holds NaN or infinity")
    kind = array.dtype.kind
    if not scaled and array.ndim == 2 and kind != "b":
        return Image.fromarray(array.astype(np.float32))
    white = WHITE.get(kind, WHITE.get(array.dtype.str[1:], 255))
    low, high = array.min(), array.max()
    if kind != "b" and not 0 <= low <= high <= white:
        numbers = "floats" if kind == "f" else "whole numbers"
        raise UsageError(
            f"{name} holds {low:g} to {high:g}; expected {numbers} from 0 (black) to {white:g} "
            "(white)"
        )
    unit = array.astype(np.float64) * (255.0 / white)
    return Image.fromarray(np.rint(unit).astype(np.uint8))
