"""OpenVINO GenAI: an image is one call, and the library reports what its parts took.

Knows the package's interface; the package is imported in a worker only.
"""

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdrt.bench.timing import PROMPT, Part, Seconds, image_part, timed
from sdrt.bundle import parse_size

from .sdcpp import GUIDANCE, get_method

GENAI_METHODS = {
    "DPM++ 2M": "EULER_DISCRETE",  # not available there
    "Euler": "EULER_DISCRETE",
    "Euler a": "EULER_ANCESTRAL_DISCRETE",
    "DDIM": "DDIM",
    "PLMS": "PNDM",
    "LCM": "LCM",
}


def load(job: Mapping[str, Any], seconds: Seconds) -> dict[str, Part]:
    """OpenVINO GenAI, compiled for one guided image of the size, which is faster than by default,
    in the precision that it prefers on this processor, or in float32 if it has to be exact.

    It reports what each evaluation took. Raises BackendError for a sampler that it lacks.
    """
    import openvino_genai as library
    from PIL import Image

    pipe = library.Text2ImagePipeline(job["made"])
    if job["scheduler"]:
        kind = getattr(library.Scheduler.Type, get_method(job["scheduler"], GENAI_METHODS))
        config = Path(job["made"]) / "scheduler" / "scheduler_config.json"
        pipe.set_scheduler(library.Scheduler.from_config(config, kind))
    width, height = parse_size(job["size"])
    pipe.reshape(1, height, width, GUIDANCE)
    precision = {"INFERENCE_PRECISION_HINT": "f32"} if job["precision"] == "exact" else {}
    pipe.compile("CPU", **precision)
    options = {"width": width, "height": height, "guidance_scale": GUIDANCE}

    def image(count: int) -> None:
        pixels = pipe.generate(PROMPT, num_inference_steps=count, **options).data[0]
        metrics = pipe.get_performance_metrics()
        seconds["text"] += sum(metrics.get_text_encoder_infer_duration().values()) / 1e3
        seconds["unet"] += sum(metrics.raw_metrics.unet_inference_durations) / 1e6
        seconds["decode"] += metrics.get_vae_decoder_infer_duration() / 1e3
        with timed("PNG", seconds):
            Image.fromarray(pixels).save(io.BytesIO(), "PNG")

    return {image_part(count): partial(image, count) for count in job["steps"]}
