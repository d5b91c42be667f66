"""Large weights that stay as a checkpoint stores them, usually mapped from its file, and are
float32 only while their layer runs.

The results are those of a module in float32; the memory is half of its weights, or none of it where
they are mapped. Knows torch's modules; not which network it is given.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MIN_BYTES = 1 << 20  # smaller weights are converted when they are loaded
LAYERS = (nn.Linear, nn.Conv2d)
NARROW = (torch.float16, torch.bfloat16)
HANDLES, STORED = "_stored_weight_handles", "_stored_weight"


def keep_stored(name: str, weight: Tensor, module: nn.Module) -> bool:
    """Whether a weight of a module stays as it is stored: a large one in half precision, of a layer
    that reads it in its own call alone.

    name: in the module's state dict
    """
    owner, _, parameter = name.rpartition(".")
    return (
        parameter == "weight"
        and weight.dtype in NARROW
        and weight.nbytes >= MIN_BYTES
        and type(module.get_submodule(owner)) in LAYERS
    )


def convert_on_use(module: nn.Module) -> None:
    """Have the layers whose weights are in half precision compute in float32."""
    handles: list[RemovableHandle] = []
    for layer in module.modules():
        if type(layer) in LAYERS and layer.weight.dtype in NARROW:
            handles.append(layer.register_forward_pre_hook(_widen))
            handles.append(layer.register_forward_hook(_restore, always_call=True))
    setattr(module, HANDLES, handles)


def convert(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with all its weights in one dtype, to be exported."""
    for part in module.modules():
        for handle in vars(part).pop(HANDLES, ()):
            handle.remove()
    return module.to(dtype)


def _widen(layer: nn.Module, _: Any) -> None:
    weight = layer._parameters["weight"]
    assert weight is not None
    vars(layer)[STORED] = weight
    layer._parameters["weight"] = nn.Parameter(weight.float(), requires_grad=False)


def _restore(layer: nn.Module, *_: Any) -> None:
    layer._parameters["weight"] = vars(layer).pop(STORED)
