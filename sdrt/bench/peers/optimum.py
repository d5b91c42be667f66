"""Optimum's pipeline over ONNX Runtime. Imported in a worker only."""

from collections.abc import Mapping
from typing import Any

from sdrt.bench.timing import Part, Seconds

from .diffusers import find_checkpoint, pipeline_parts


def load(job: Mapping[str, Any], seconds: Seconds) -> dict[str, Part]:
    """Optimum's pipeline over ONNX Runtime, of its own export."""
    import torch
    from optimum.onnxruntime import ORTPipelineForText2Image

    pipe = ORTPipelineForText2Image.from_pretrained(
        str(find_checkpoint(job["folder"])), export=True
    )
    return pipeline_parts(pipe, torch.float32, job, seconds)
