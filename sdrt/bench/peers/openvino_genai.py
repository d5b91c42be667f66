"""OpenVINO GenAI: an image is one call, and the library tells what its parts took.

Knows the package's interface; the package is imported in a worker only.
"""

import io
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdrt.bench.timing import PROMPT, Part, Spent, Timed, picture_of
from sdrt.bundle import parse_size

from .sdcpp import GUIDANCE, method_of

GENAI_METHODS = {
    "DPM++ 2M": "EULER_DISCRETE",  # which it has not
    "Euler": "EULER_DISCRETE",
    "Euler a": "EULER_ANCESTRAL_DISCRETE",
    "DDIM": "DDIM",
    "PLMS": "PNDM",
    "LCM": "LCM",
}


def openvino_genai(wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
    """OpenVINO GenAI as it comes: it computes in what it prefers on this processor.

    It tells what each evaluation took. Raises BackendError for a sampler it has not.
    """
    import openvino_genai as library
    from PIL import Image

    pipe = library.Text2ImagePipeline(wanted["made"], "CPU")
    if wanted["scheduler"]:
        kind = getattr(library.Scheduler.Type, method_of(wanted["scheduler"], GENAI_METHODS))
        config = Path(wanted["made"]) / "scheduler" / "scheduler_config.json"
        pipe.set_scheduler(library.Scheduler.from_config(config, kind))
    width, height = parse_size(wanted["size"])
    given = {"width": width, "height": height, "guidance_scale": GUIDANCE}

    def picture(count: int) -> None:
        pixels = pipe.generate(PROMPT, num_inference_steps=count, **given).data[0]
        told = pipe.get_performance_metrics()
        spent["text"] += sum(told.get_text_encoder_infer_duration().values()) / 1e3
        spent["unet"] += sum(told.raw_metrics.unet_inference_durations) / 1e6
        spent["decode"] += told.get_vae_decoder_infer_duration() / 1e3
        Timed(Image.fromarray(pixels).save, "PNG", spent)(io.BytesIO(), "PNG")

    return {picture_of(count): partial(picture, count) for count in wanted["steps"]}
