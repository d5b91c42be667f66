"""What a bundle is proven by: made-up inputs of its components and a picture, all from seeds, and
what torch answered at the build, so that any machine can ask its own engines the same.

Knows numpy, the engines' interface and the runtime's own loop; not torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import COMPONENTS, Manifest
from sdrt.engine import Feeds
from sdrt.errors import BundleError
from sdrt.json_validation import Reader, mapping, number, one_of, record, row, text

from .denoising import DenoisingState, Guidance, denoise, get_history_layout
from .noise import randn
from .options import GenerationOptions
from .pipeline import Pipeline
from .requests import parse_requests
from .samplers.table import sampler_table
from .text.conditioning import build_time_ids

PROMPT = "a red circle on a blue background"
SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False}
STEPS, GUIDED_STEPS = 2, 4
TIMESTEP = 500.0
REFERENCE_FILE = "proof.json"
SAMPLES = 256  # of an answer are kept, evenly spread
DIGITS = 6  # of each
Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """Samples of torch's answers.

    components: of each component's outputs to `reference_inputs` inputs, by their names
    picture: of what `drawn` draws in the first size
    """

    components: Mapping[str, Mapping[str, Sequence[float]]]
    picture: Sequence[float]


NUMBERS = row(number(), 1, SAMPLES)
OUTPUTS = mapping(NUMBERS, text(r"\w{1,64}", "an output's name"), 32)
READ: Reader[ReferenceOutputs] = record(
    ReferenceOutputs,
    {
        "components": mapping(OUTPUTS, one_of(COMPONENTS), len(COMPONENTS)),
        "picture": NUMBERS,
    },
)


def reference_inputs(
    shapes: Mapping[str, tuple[int, ...]], ids: np.ndarray | None, size: Size
) -> Feeds:
    """Inputs of a component of the given names and shapes; ids: of a prompt, where it reads one."""
    fixed = {
        "input_ids": ids,
        "time_ids": build_time_ids(GenerationOptions(), size)[1:],
        "timestep": np.full(1, TIMESTEP, np.float32),
    }
    feeds = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        value = fixed[name] if name in fixed else randn(seed, shape)
        assert value is not None
        feeds[name] = np.clip(value / 2, -1, 1) if name == "image" else value
    return feeds


def take_samples(answer: np.ndarray) -> np.ndarray:
    """At most SAMPLES numbers of an array, evenly spread over it."""
    flat = answer.ravel()
    return flat[np.unique(np.linspace(0, flat.size - 1, SAMPLES).astype(np.int64))]


def round_samples(answer: np.ndarray) -> list[float]:
    """Samples as they are kept."""
    return [float(f"{value:.{DIGITS}g}") for value in take_samples(answer)]


def reference_outputs_to_json(answers: ReferenceOutputs) -> str:
    return json.dumps(asdict(answers), indent=1, sort_keys=True) + "\n"


def read_reference_outputs(bundle: Bundle) -> ReferenceOutputs:
    """What a bundle's build kept; raises BundleError where it kept none."""
    if REFERENCE_FILE not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.folder} has no {REFERENCE_FILE}: it was built before proofs were kept; build "
            "it again with --force"
        )
    try:
        return READ(bundle.json(REFERENCE_FILE), "it")
    except ValueError as error:
        raise BundleError(f"{bundle.folder / REFERENCE_FILE} holds no answers: {error}") from error


def latent_shape(manifest: Manifest, size: Size) -> tuple[int, int, int, int]:
    """[1, C, H/8, W/8] of a picture's size."""
    scale = manifest.downscale
    return 1, manifest.latent_channels, size[1] // scale, size[0] // scale


def reference_extra_channels(manifest: Manifest, size: Size, channels: int) -> np.ndarray:
    """What some models are fed beside the latents, made up: [1, E, H/8, W/8], E mostly 0.

    channels: of the model's input
    """
    _, latents, *sides = latent_shape(manifest, size)
    return randn(1, (1, channels, *sides))[:, latents:]


def generate_reference_image(
    pipe: Pipeline,
    size: Size,
    steps: int = STEPS,
    guidance_scale: float = 1.0,
    seeds: Sequence[int] = (0,),
) -> np.ndarray:
    """The proof's picture of each seed, made together, [B, 3, H, W], by a bundle's engines."""
    manifest = pipe.manifest
    scale = guidance_scale if pipe.accepts_prompt else 1.0
    options = GenerationOptions(size=f"{size[0]}x{size[1]}", guidance_scale=scale)
    requests = parse_requests(PROMPT, options)
    (conditioning,) = pipe.encode_conditioning(requests, options, size)
    table = sampler_table(SCHEDULER, steps)
    guidance = Guidance(np.full(steps, 1.0 if pipe.guidance_embedding_width else scale))
    extra = reference_extra_channels(manifest, size, pipe.in_channels)[0]
    layout, shape = get_history_layout(table, guidance), latent_shape(manifest, size)
    states = [
        DenoisingState(table, guidance, layout, [randn(seed, shape)[0]], conditioning, extra)
        for seed in seeds
    ]
    *_, last = denoise(pipe.engines, states)
    return pipe.decode_to_array(last.latents)
