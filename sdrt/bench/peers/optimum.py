"""Optimum's pipeline over ONNX Runtime. Imported in a worker only."""

from collections.abc import Mapping
from typing import Any

from sdrt.bench.timing import Part, Spent

from .diffusers import checkpoint_of, parts_of


def optimum(folder: str, wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
    """Optimum's pipeline over ONNX Runtime, of its own export."""
    import torch
    from optimum.onnxruntime import ORTPipelineForText2Image

    pipe = ORTPipelineForText2Image.from_pretrained(str(checkpoint_of(folder)), export=True)
    return parts_of(pipe, torch.float32, wanted, spent)
