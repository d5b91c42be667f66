"""Weights that are stored in 8 bits with a scale next to them, as plain float32 weights.

Knows the names under which scales are published: ComfyUI's `scale_weight` and `weight_scale`, the
latter also of other quantizers. A weight is never used without its scale: what is not understood
is refused by name.
"""

import json
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sdrt.errors import CheckpointError

FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
}
FORMATS = ("float8_e4m3fn", "float8_e5m2")
SCALES = (".scale_weight", ".weight_scale")
# They scale activations for products in 8 bits, which are not computed here; and a marker.
NO_WEIGHT = re.compile(r"(.*\.)?(scale_input|input_scale|scaled_fp8|full_precision_matrix_mult)")
FORMAT_OF_LAYER = ".comfy_quant"


def is_float8(dtype: torch.dtype) -> bool:
    return dtype in FLOAT8


def weights_without_scales(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, each multiplied by its scale in float32, and nothing that belongs to scales.

    Args:
        tensors: of any floating dtype; `X.weight` may have an `X.scale_weight` or
            `X.weight_scale`: one number, or one for each row ([rows], [rows, 1]).

    Returns:
        The tensors as they were, weights with a scale as float32 of the same shape.

    Raises:
        CheckpointError: a format or a shape of scales that is not understood, or a scale without
            its weight, by name.
    """
    result = {name: t for name, t in tensors.items() if not _belongs_to_scales(name)}
    for name, tensor in tensors.items():
        if name.endswith(FORMAT_OF_LAYER):
            _check_format(name, tensor)
    for name, scale in tensors.items():
        if weight_name := weight_of_scale(name):
            if weight_name not in result:
                raise CheckpointError(f"the scale {name} has no {weight_name} that it belongs to")
            if not is_float8(result[weight_name].dtype):
                raise CheckpointError(
                    f"{weight_name} has the scale {name} and is "
                    f"{_short(result[weight_name].dtype)}; "
                    "only scales of 8-bit floating-point weights are understood"
                )
            result[weight_name] = _scaled(weight_name, result[weight_name], name, scale)
    return result


def weight_of_scale(name: str) -> str | None:
    """The name of the weight that a scale of this name belongs to; None for other names."""
    for ending in SCALES:
        if name.endswith(ending):
            return name.removesuffix(ending) + ".weight"
    return None


def _belongs_to_scales(name: str) -> bool:
    known = NO_WEIGHT.fullmatch(name) or name.endswith(FORMAT_OF_LAYER)
    return bool(known) or weight_of_scale(name) is not None


def _scaled(name: str, weight: Tensor, scale_name: str, scale: Tensor) -> Tensor:
    factor = scale.to(torch.float32)
    if factor.numel() == 1:
        return weight.to(torch.float32) * factor.reshape(())
    rows = weight.shape[0] if weight.ndim else 0
    if factor.shape[0] != rows or factor.numel() != rows:
        raise CheckpointError(
            f"{scale_name} is {list(scale.shape)} and {name} {list(weight.shape)}; expected one "
            "scale for the whole weight or one for each of its rows"
        )
    return weight.to(torch.float32) * factor.reshape(-1, *[1] * (weight.ndim - 1))


def _check_format(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless a layer's description names a format of one scale."""
    try:
        said = json.loads(bytes(tensor.to(torch.uint8).flatten().tolist()))
        kind = said.get("format")
    except (ValueError, AttributeError, UnicodeDecodeError):
        raise CheckpointError(f"{name} describes no quantization that is understood") from None
    if kind not in FORMATS:
        raise CheckpointError(
            f"{name} says that its weight is quantized as {kind!r}; expected {' or '.join(FORMATS)}"
        )


def check_used(weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise CheckpointError for a weight that is no floating-point number, or none at all."""
    for name, tensor in weights:
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{where}: the weight {name} is stored as {_short(tensor.dtype)}, a quantization "
                "that is not supported; expected float64, 32, 16, bfloat16 or float8"
            )
        narrow = tensor.dtype in (torch.float16, torch.bfloat16)
        wide = tensor if narrow else tensor.to(torch.float32)
        if not torch.isfinite(wide).all():
            raise CheckpointError(f"{where}: the weight {name} holds NaN or infinity")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
