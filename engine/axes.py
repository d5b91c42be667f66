"""The named axes of a bundle's graphs: their lengths at an image size, and arithmetic over them.

Knows manifests and the axes' names; not what computes with them.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence

from sdrt.bundle.manifest import Manifest, TensorSpec

OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


IMAGE_TOKENS = 4  # of an IP-Adapter's image, in the base adapters


def axis_lengths(manifest: Manifest, size: tuple[int, int], rows: int = 1) -> dict[str, int]:
    """The length of every named axis.

    Args:
        manifest: The bundle's manifest.
        size: (width, height) of an image in pixels.
        rows: Rows of the batch.
    """
    width, height = size
    return {
        "rows": rows,
        "tokens": manifest.max_tokens,
        "image_tokens": IMAGE_TOKENS,
        "width": width,
        "height": height,
        "latent_width": width // manifest.downscale,
        "latent_height": height // manifest.downscale,
    }


def tile_size(sides: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """What an autoencoder processes at once: all that fits into one of the bundle's sizes, else
    tiles of the largest.

    Args:
        sides: Of an image or of its latents.
        sizes: The bundle's, in the same order and unit.
    """
    if any(sides[0] <= size[0] and sides[1] <= size[1] for size in sizes):
        return sides
    largest = max(sizes, key=math.prod)
    return min(sides[0], largest[0]), min(sides[1], largest[1])


def spec_shape(spec: TensorSpec, lengths: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input whose axes may be named by expressions.

    Raises:
        ValueError: An axis is not known.
    """
    return tuple(
        axis if isinstance(axis, int) else evaluate_axis(axis, lengths) for axis in spec.shape
    )


def evaluate_axis(expression: str, lengths: Mapping[str, int]) -> int:
    """Evaluate an axis such as `8*((latent_height - 1)//8) + 8`.

    Raises:
        ValueError: It is not +, -, * and // over integers and known names.
    """

    def evaluate(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
        if isinstance(node, ast.Name) and node.id in lengths:
            return lengths[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ValueError(f"unknown axis {expression!r}")

    try:
        return evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError) as error:
        raise ValueError(f"unknown axis {expression!r}") from error
