"""stable-diffusion.cpp: an image is one call, and the library tells what its parts took.

Knows the package's interface and what it reads; the package is imported in a worker only.
"""

import io
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from sdrt.bench.timing import PROMPT, Part, Spent, Timed, picture_of
from sdrt.bundle import parse_size
from sdrt.errors import BackendError
from sdrt.process_stats import cpu_count

GUIDANCE = 7.5
SAID = re.compile(
    rb"(get_learned_condition|sampling|decode_first_stage) completed, taking ([\d.]+)s"
)
PARTS = {b"get_learned_condition": "text", b"sampling": "unet", b"decode_first_stage": "decode"}
# Samplers by this project's names. An evaluation a step costs the same by whichever sampler.
CPP_METHODS = {
    "DPM++ 2M": "dpm++2m",
    "Euler": "euler",
    "Euler a": "euler_a",
    "Heun": "heun",
    "DPM2": "dpm2",
    "LCM": "lcm",
}


def stable_diffusion_cpp(wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
    """stable-diffusion.cpp as it comes, on all processors; by DPM++ 2M where no sampler is named.

    It says what it spent in hundredths of a second; what it calls sampling is the UNet's
    evaluations and the arithmetic between them. Raises BackendError for a sampler it has not.
    """
    import stable_diffusion_cpp as library

    method = method_of(wanted["scheduler"] or "DPM++ 2M", CPP_METHODS)
    processors = cpu_count()
    pipe = library.StableDiffusion(
        model_path=wanted["made"], vae_decode_only=True, n_threads=processors, verbose=False
    )

    def listen(_level: int, text: bytes, _data: object) -> None:
        if said := SAID.search(text):
            spent[PARTS[said[1]]] += float(said[2])

    heard = library.sd_log_callback(listen)
    library.sd_set_log_callback(heard, None)
    width, height = parse_size(wanted["size"])
    given = {"width": width, "height": height, "cfg_scale": GUIDANCE, "sample_method": method}

    def picture(count: int, _kept: object = heard) -> None:
        image = pipe.generate_image(prompt=PROMPT, sample_steps=count, **given)[0]
        Timed(image.save, "PNG", spent)(io.BytesIO(), "PNG")

    return {picture_of(count): partial(picture, count) for count in wanted["steps"]}


def method_of(name: str, methods: Mapping[str, str]) -> str:
    if name not in methods:
        raise BackendError(f"it has no sampler {name}; it is measured with {', '.join(methods)}")
    return methods[name]
