"""Arguments as callers pass them, parsed into the types that the pipeline computes with.

- A parser gets an argument's name and value. It returns the value in its one type, or raises
  UsageError with the name, what was found and what was expected.
- `..._parser` functions build parsers, from bounds or from other parsers.

Knows numpy and what converts to it, such as tensors; imports no other array library.
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
from sdrt.json_validation import check_bounds, shorten

from .images import open_image
from .lora.tags import MAX_WEIGHT, LoraWeight

T = TypeVar("T")
Parser = Callable[[str, Any], T]
WHITE = {"f": 1.0, "b": 1, "u2": 65535}  # by the dtype of an image's array; of others it is 255


def invalid_argument(
    name: str, value: object, expected: str, hint: str | None = None
) -> UsageError:
    """The error for an argument: its name, what was found and what was expected."""
    return UsageError(f"{name} is {describe_value(value)}; expected {expected}", hint=hint)


def describe_value(value: object) -> str:
    """A value in a few words: numbers as they are, arrays by shape, others with their type."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return shorten(value)
    shape = getattr(value, "shape", None)
    text = f"of shape {list(shape)}" if isinstance(shape, tuple) else _safe_repr(value)
    return f"{text} ({type(value).__name__})"


def _safe_repr(value: object) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # integers of thousands of digits inside, for one
        return "a value"


def to_scalar(value: object) -> object:
    """A NumPy or tensor scalar as Python's; anything else as it is."""
    if getattr(value, "ndim", None) != 0:
        return value
    try:
        return value.item()  # type: ignore[attr-defined]
    except Exception:  # of an object that only looks like an array
        return value


def to_array(value: object) -> np.ndarray | None:
    """An array, a tensor on any device or nested sequences as a NumPy array; None for what has no
    numbers.
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


def _to_list(value: object) -> list[Any] | None:
    """The items of a list, tuple, range or array of one axis; None for anything else."""
    if isinstance(value, list | tuple | range):
        return list(value)
    array = to_array(value) if getattr(value, "ndim", None) == 1 else None
    return None if array is None else array.tolist()


def float_parser(low: float, high: float, expected: str | None = None) -> Parser[float]:
    """For a finite number within bounds; bools are not numbers."""
    expectation = expected or f"a number from {low:g} to {high:g}"

    def parse(name: str, value: object) -> float:
        number = to_scalar(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise invalid_argument(name, value, expectation)
        if not low <= number <= high:  # NaN is not
            raise invalid_argument(name, number, expectation)
        return float(number)

    return parse


def int_parser(
    low: int, high: int, expected: str | None = None, hint: str | None = None
) -> Parser[int]:
    """For an integer within bounds, also as an integral float; bools are not numbers."""
    expectation = expected or f"an integer from {low} to {high}"

    def parse(name: str, value: object) -> int:
        number = to_scalar(value)
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
            raise invalid_argument(name, number, expectation, hint)
        return number

    return parse


def parse_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise invalid_argument(name, value, "a string")
    return str(value)  # of a subclass, such as NumPy's, too


def parse_texts(name: str, value: object) -> str | tuple[str, ...]:
    """A string, or one for each prompt."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise invalid_argument(name, value, "a string, or a list of strings")
    return tuple(str(text) for text in value)


def parse_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise invalid_argument(name, value, "True or False")
    return bool(value)


def choice_parser(*allowed: str) -> Parser[str]:
    def parse(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise invalid_argument(name, value, " or ".join(allowed))
        return str(value)

    return parse


def parse_callable(name: str, value: object) -> Any:
    if not callable(value):
        raise invalid_argument(name, value, "a function")
    return value


def sequence_parser(
    item: Parser[T], expected: str, length: int | None = None
) -> Parser[tuple[T, ...]]:
    """For one or more items of one kind; length: how many, where that is fixed."""

    def parse(name: str, value: object) -> tuple[T, ...]:
        items = _to_list(value)
        if not items or len(items) != (length or len(items)):
            raise invalid_argument(name, value, expected)
        return tuple(item(name, element) for element in items)

    return parse


def numbers_parser(low: float, high: float) -> Parser[float | tuple[float, ...]]:
    """For a number within bounds, or one for each of several things."""
    one = float_parser(low, high)
    many = sequence_parser(one, f"a number from {low:g} to {high:g}, or several")

    def parse(name: str, value: object) -> float | tuple[float, ...]:
        return many(name, value) if _to_list(value) is not None else one(name, value)

    return parse


def parse_names(name: str, value: object) -> tuple[str, ...]:
    """One name or several."""
    parsed = parse_texts(name, value)
    names = (parsed,) if isinstance(parsed, str) else parsed
    if not names:
        raise invalid_argument(name, value, "a name, or a list of names")
    return names


def parse_paths(name: str, value: object) -> tuple[str | os.PathLike[str], ...]:
    """Names or paths: one, several or none."""
    items = value if isinstance(value, list | tuple) else [value]
    if invalid := [item for item in items if not isinstance(item, str | os.PathLike)]:
        raise invalid_argument(name, invalid[0], "a name or a folder, or a list of them")
    return tuple(items)


def seed_parser(limit: int) -> Parser[int | tuple[int, ...]]:
    """For the seed of the first image, or one for each."""
    expected = f"an integer from 0 to {limit - 1}"
    one = int_parser(0, limit - 1, expected, "leave it out for a random seed")
    many = sequence_parser(one, "an integer, or one for each image")

    def parse(name: str, value: object) -> int | tuple[int, ...]:
        if hasattr(value, "initial_seed"):
            raise invalid_argument(name, value, "an integer, such as generator.initial_seed()")
        return many(name, value) if _to_list(value) is not None else one(name, value)

    return parse


def parse_size_option(name: str, value: object) -> str:
    """`"WIDTHxHEIGHT"`, also from (width, height)."""
    if isinstance(value, str):
        width, height = parse_size(value, name)
    else:
        expected = '"WIDTHxHEIGHT" or (width, height)'
        width, height = sequence_parser(int_parser(1, 99_999), expected, length=2)(name, value)
        parse_size(f"{width}x{height}", name)
    return f"{width}x{height}"


def parse_device(name: str, value: object) -> tuple[int, str | None]:
    """A GPU's number, and the kind of device where a string such as "cpu" or "cuda:1" names it."""
    if isinstance(value, str):
        kind, colon, index = value.partition(":")
        if kind == "cuda" and (index.isdecimal() if colon else True) and len(index) < 4:
            return int(index or 0), kind
        if value == "cpu":
            return 0, value
        raise invalid_argument(name, value, 'the number of a GPU, "cpu", "cuda" or "cuda:1"')
    return int_parser(0, 1023, 'the number of a GPU, "cpu" or "cuda"')(name, value), None


def parse_interval(name: str, value: object) -> tuple[float, float]:
    """The start and the end of a part of the run."""
    expected = "two numbers from 0 to 1 in ascending order"
    low, high = sequence_parser(float_parser(0.0, 1.0), expected, length=2)(name, value)
    if low > high:
        raise invalid_argument(name, value, expected)
    return low, high


def parse_lora_weights(value: object) -> dict[str | os.PathLike[str], LoraWeight]:
    """Weights of LoRA files by name or path."""
    expected = 'a mapping of names or paths to weights, such as {"name": 0.8}'
    if not isinstance(value, Mapping):
        raise invalid_argument("loras", value, expected)
    if invalid := [key for key in value if not isinstance(key, str | os.PathLike)]:
        raise invalid_argument("loras", invalid[0], expected)
    return {
        key: _parse_lora_weight(f"LoRA weight of {key}", weight) for key, weight in value.items()
    }


def _parse_lora_weight(name: str, value: object) -> LoraWeight:
    """One weight for the text encoders and the UNet, or a `LoraWeight` with one for each."""
    weights = (value.text_encoder, value.unet) if isinstance(value, LoraWeight) else (value, value)
    parse = float_parser(-MAX_WEIGHT, MAX_WEIGHT)
    return LoraWeight(*(parse(name, weight) for weight in weights))


def parse_scheduler_config(name: str, value: object) -> dict[str, Any]:
    """A scheduler's configuration, of values that JSON has."""
    if not isinstance(value, Mapping):
        raise invalid_argument(name, value, "a name, or a scheduler's configuration")

    def plain(item: object) -> object:
        if (array := to_array(item)) is None:
            raise TypeError(f"{describe_value(item)} has no JSON form")
        return array.tolist()

    try:
        config: dict[str, Any] = json.loads(json.dumps(dict(value), default=plain))
        check_bounds(config, name)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"invalid scheduler configuration: {error}") from error
    return config


def parse_array(name: str, value: object) -> np.ndarray:
    """An array of any shape and numeric dtype."""
    array = to_array(value)
    if array is None or array.dtype.kind == "b" or array.ndim == 0:
        raise invalid_argument(name, value, "an array of numbers")
    return array


def parse_image(name: str, value: object) -> Image.Image:
    """An image.

    Args:
        name: Of the argument.
        value: A PIL image, a file's path or an array: [H, W], [H, W, C] or [C, H, W], also with a
            first axis of one image; C is 1, 3 or 4. Integers are 0 to 255, floats 0 to 1.
    """
    return _parse_image(name, value, scaled=True)


def parse_images(name: str, value: object) -> tuple[Image.Image, ...]:
    """One image or several, each as for `parse_image`."""
    if isinstance(value, list | tuple) and len(value):
        return tuple(parse_image(name, item) for item in value)
    return (parse_image(name, value),)


def parse_depth_map(name: str, value: object) -> Image.Image:
    """An image whose floats have any range: depth maps are rescaled to one range."""
    return _parse_image(name, value, scaled=False)


def _parse_image(name: str, value: object, scaled: bool) -> Image.Image:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Image.Image):
        if value.mode == "F" and scaled:
            return _image_from_array(name, np.asarray(value), value, scaled)
        return value
    if isinstance(value, str | os.PathLike):
        return open_image(Path(value))
    array = to_array(value) if hasattr(value, "shape") else None
    if array is None:
        many = isinstance(value, list | tuple) and len(value) > 1
        hint = "all images of a call start from one image; make a call for each" if many else None
        raise invalid_argument(name, value, "a PIL image, a file's path or an array", hint)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    return _image_from_array(name, _channels_last(array, value), value, scaled)


def _channels_last(array: np.ndarray, value: object) -> np.ndarray:
    """[C, H, W] -> [H, W, C], and one channel -> [H, W]. Where both layouts fit, tensors have their
    channels first, arrays last.
    """
    if array.ndim == 3:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, 2))
        if first and (hasattr(value, "detach") or not last):
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1:
            array = array[:, :, 0]
    return array


def _image_from_array(name: str, array: np.ndarray, value: object, scaled: bool) -> Image.Image:
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise invalid_argument(
            name, value, "one image, [H, W], [H, W, C] or [C, H, W] with C 1, 3 or 4"
        )
    if not np.isfinite(array).all():
        raise UsageError(f"{name} holds NaN or infinity")
    kind = array.dtype.kind
    if not scaled and array.ndim == 2 and kind != "b":
        return Image.fromarray(array.astype(np.float32))
    white = WHITE.get(kind, WHITE.get(array.dtype.str[1:], 255))
    low, high = array.min(), array.max()
    if kind != "b" and not 0 <= low <= high <= white:
        numbers = "floats" if kind == "f" else "integers"
        raise UsageError(
            f"{name} holds {low:g} to {high:g}; expected {numbers} from 0 (black) to {white:g} "
            "(white)"
        )
    unit = array.astype(np.float64) * (255.0 / white)
    return Image.fromarray(np.rint(unit).astype(np.uint8))
