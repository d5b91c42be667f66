"""The reference that a bundle is validated against: synthetic inputs of its components and an
image, all from seeds, with samples of torch's outputs at the build.

Any machine can compare its own engines with them. Knows numpy, the engines' interface and the
runtime's own loop; not torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import COMPONENTS, CONTROL_IMAGE, Manifest
from sdrt.engine import Feeds
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.errors import BundleError
from sdrt.json_validation import Reader, array, mapping, number, one_of, record, text

from .denoising import DenoisingState, Guidance, denoise, get_history_layout
from .noise import randn
from .options import GenerationOptions
from .pipeline import Pipeline
from .prompt_timeline import build_constant_timeline
from .requests import parse_requests
from .samplers.table import sampler_table
from .text.conditioning import build_time_ids

PROMPT = "a red circle on a blue background"
SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False}
STEPS, GUIDED_STEPS = 2, 4
TIMESTEP = 500.0
REFERENCE_FILE = "proof.json"
SAMPLES = 256  # of each output, evenly spaced
DIGITS = 6  # of each
Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True, slots=True)
class ReferenceOutputs:
    """Samples of torch's outputs, the contents of `proof.json`.

    Attributes:
        components: Of each component's outputs by name, for the inputs of `reference_inputs`.
        picture: Of the image of `generate_reference_image` in the first size; none of a control
            bundle.
    """

    components: Mapping[str, Mapping[str, Sequence[float]]]
    picture: Sequence[float]


NUMBERS = array(number(), 1, SAMPLES)
OUTPUTS = mapping(NUMBERS, text(r"\w{1,64}", "an output's name"), 32)
READ: Reader[ReferenceOutputs] = record(
    ReferenceOutputs,
    {
        "components": mapping(OUTPUTS, one_of(COMPONENTS), len(COMPONENTS)),
        "picture": array(number(), 0, SAMPLES),
    },
)


def reference_inputs(
    shapes: Mapping[str, tuple[int, ...]], ids: np.ndarray | None, size: Size
) -> Feeds:
    """Inputs of a component, from seeds.

    Args:
        shapes: By input name.
        ids: Token ids of a prompt, where the component reads one.
        size: (width, height) of an image.
    """
    fixed = {
        "input_ids": ids,
        "time_ids": build_time_ids(GenerationOptions(), size, *shapes.get("time_ids", ())[1:])[1:],
        "timestep": np.full(1, TIMESTEP, np.float32),
    }
    feeds = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        value = fixed[name] if name in fixed else randn(seed, shape)
        assert value is not None
        feeds[name] = value
        if name == "image":
            feeds[name] = np.clip(value / 2, -1, 1)
        elif name == CONTROL_IMAGE:
            feeds[name] = np.clip(value / 4 + 0.5, 0, 1)
    return feeds


def component_inputs(manifest: Manifest, name: str, ids: np.ndarray | None = None) -> Feeds:
    """The same for a component of a bundle, of one image of the first size."""
    size = manifest.sizes[0]
    lengths = axis_lengths(manifest, size)
    inputs = manifest.components[name].inputs
    return reference_inputs({spec.name: spec_shape(spec, lengths) for spec in inputs}, ids, size)


def take_samples(output: np.ndarray) -> np.ndarray:
    """At most SAMPLES numbers of an array, evenly spaced."""
    flat = output.ravel()
    return flat[np.unique(np.linspace(0, flat.size - 1, SAMPLES).astype(np.int64))]


def round_samples(output: np.ndarray) -> list[float]:
    """Samples of an array as they are stored."""
    return [float(f"{value:.{DIGITS}g}") for value in take_samples(output)]


def reference_outputs_to_json(outputs: ReferenceOutputs) -> str:
    return json.dumps(asdict(outputs), indent=1, sort_keys=True) + "\n"


def read_reference_outputs(bundle: Bundle) -> ReferenceOutputs:
    """The reference outputs of a bundle; raises BundleError if it has none."""
    if REFERENCE_FILE not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.folder} has no {REFERENCE_FILE}",
            hint="build it again with --force",
        )
    try:
        return READ(bundle.json(REFERENCE_FILE), "it")
    except ValueError as error:
        raise BundleError(
            f"{bundle.folder / REFERENCE_FILE} holds no reference outputs: {error}"
        ) from error


def latent_shape(manifest: Manifest, size: Size) -> tuple[int, int, int, int]:
    """[1, C, H/8, W/8] of an image's size."""
    scale = manifest.downscale
    return 1, manifest.latent_channels, size[1] // scale, size[0] // scale


def reference_extra_channels(manifest: Manifest, size: Size, channels: int) -> np.ndarray:
    """Synthetic extra channels, [1, E, H/8, W/8]; E is 0 for most models.

    channels: of the UNet's input
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
    """The reference image of each seed, generated in one batch by a bundle's engines.

    Returns:
        [B, 3, H, W] float32 about [-1, 1].
    """
    manifest = pipe.manifest
    scale = guidance_scale if pipe.accepts_prompt else 1.0
    options = GenerationOptions(size=f"{size[0]}x{size[1]}", guidance_scale=scale)
    requests = parse_requests(PROMPT, options)
    timelines = [build_constant_timeline(PROMPT, "")]
    (conditioning,) = pipe.encode_conditioning(requests, timelines, options, size)
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
