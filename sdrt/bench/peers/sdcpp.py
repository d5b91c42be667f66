"""stable-diffusion.cpp: an image is one call, and the library logs what its parts took.

Knows the package's interface and what it reads; the package is imported in a worker only.
"""

import io
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from sdrt.bench.timing import PROMPT, Part, Seconds, image_part, timed
from sdrt.bundle import parse_size
from sdrt.errors import BackendError
from sdrt.process_stats import cpu_count

GUIDANCE = 7.5
LOG_LINE = re.compile(
    rb"(get_learned_condition|sampling|decode_first_stage) completed, taking ([\d.]+)s"
)
PARTS = {b"get_learned_condition": "text", b"sampling": "unet", b"decode_first_stage": "decode"}
# By this project's sampler names. A step costs one evaluation with any of them.
CPP_METHODS = {
    "DPM++ 2M": "dpm++2m",
    "Euler": "euler",
    "Euler a": "euler_a",
    "Heun": "heun",
    "DPM2": "dpm2",
    "LCM": "lcm",
}


def load(job: Mapping[str, Any], seconds: Seconds) -> dict[str, Part]:
    """stable-diffusion.cpp by default, on all processors; with DPM++ 2M if no sampler is named.

    It reports hundredths of a second; its "sampling" is the UNet's evaluations and the arithmetic
    between them. Raises BackendError for a sampler that it lacks.
    """
    import stable_diffusion_cpp as library

    method = get_method(job["scheduler"] or "DPM++ 2M", CPP_METHODS)
    processors = cpu_count()
    pipe = library.StableDiffusion(
        model_path=job["made"], vae_decode_only=True, n_threads=processors, verbose=False
    )

    def read_log(_level: int, text: bytes, _data: object) -> None:
        if match := LOG_LINE.search(text):
            seconds[PARTS[match[1]]] += float(match[2])

    callback = library.sd_log_callback(read_log)
    library.sd_set_log_callback(callback, None)
    width, height = parse_size(job["size"])
    options = {"width": width, "height": height, "cfg_scale": GUIDANCE, "sample_method": method}

    def image(count: int, _referenced: object = callback) -> None:
        image = pipe.generate_image(prompt=PROMPT, sample_steps=count, **options)[0]
        with timed("PNG", seconds):
            image.save(io.BytesIO(), "PNG")

    return {image_part(count): partial(image, count) for count in job["steps"]}


def get_method(name: str, methods: Mapping[str, str]) -> str:
    if name not in methods:
        raise BackendError(f"no sampler {name} there; measured with {', '.join(methods)}")
    return methods[name]
