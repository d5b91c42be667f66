"""IP-Adapter: images as prompts (Ye et al. 2023, arXiv:2308.06721).

Knows the adapter's components and what the UNet reads of them; not how prompts are encoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import (
    CONTROL,
    IMAGE_ENCODER,
    IP_ADAPTER,
    IP_ADAPTER_KV,
    IP_ADAPTER_SCALE,
    Manifest,
    TensorSpec,
)
from sdrt.engine import Engine
from sdrt.errors import UsageError

from .conditioning_schedule import ConditioningSchedule
from .options import GenerationOptions
from .safety_checker import clip_pixels


@dataclass(frozen=True, slots=True)
class IpAdapter:
    """An adapter of a bundle of its own.

    Attributes:
        name: Of its bundle.
        layers: How many cross-attention layers of the UNet read it.
        reads_hidden_states: Whether it reads the image encoder's hidden states, not its embedding.
    """

    name: str
    layers: int
    reads_hidden_states: bool


def load_ip_adapter(base: Manifest, bundles: Sequence[Bundle]) -> IpAdapter | None:
    """The IP-Adapter among bundles; None without.

    Raises:
        UsageError: For several, and for one that does not fit the base model.
    """
    manifests = [of.manifest for of in bundles if IP_ADAPTER in of.manifest.components]
    if not manifests:
        return None
    if len(manifests) > 1:
        names = ", ".join(manifest.name for manifest in manifests)
        raise UsageError(f"several IP-Adapters: {names}", hint="pass one of them")
    (adapter,) = manifests
    component = adapter.components[IP_ADAPTER]
    unet = _control_inputs(base)
    if IP_ADAPTER_KV not in unet:
        raise UsageError(
            f"{base.name} was built without inputs for an IP-Adapter",
            hint=f"run `sdrt build --model {base.source.split(',')[0]} --force`",
        )
    produced, expected = component.outputs[0].shape[-1], unet[IP_ADAPTER_KV].shape[-1]
    if produced != expected:
        raise UsageError(
            f"IP-Adapter {adapter.name} gives {produced} keys and values for each token; "
            f"{base.name} reads {expected}",
            hint="use one that was trained for this model's family",
        )
    layers = unet[IP_ADAPTER_SCALE].shape[-1]
    return IpAdapter(adapter.name, int(layers), len(component.inputs[0].shape) == 3)


def _control_inputs(base: Manifest) -> dict[str, TensorSpec]:
    component = base.components.get(CONTROL)
    return {spec.name: spec for spec in component.inputs} if component else {}


def check_is_ip_adapter(manifest: Manifest) -> None:
    """Raise UsageError for a bundle of another kind."""
    if IP_ADAPTER in manifest.components:
        return
    hint = "build one with `sdrt build --ip-adapter FILE`"
    if manifest.control_net is not None:
        hint = "pass it as a ControlNet: `--control`, or sdrt.load(..., controlnet=NAME)"
    raise UsageError(f"{manifest.name} is not an IP-Adapter", hint=hint)


def check_ip_adapter(options: GenerationOptions, adapter: IpAdapter | None) -> None:
    """Raise UsageError unless a call's image prompt fits the pipeline and its other options."""
    if options.ip_adapter_image is None:
        return
    if adapter is None:
        raise UsageError(
            "ip_adapter_image without an IP-Adapter",
            hint="load one: sdrt.load(..., ip_adapter=NAME)",
        )
    scale = options.ip_adapter_scale
    if not isinstance(scale, float) and len(scale) != adapter.layers:
        raise UsageError(
            f"ip_adapter_scale has {len(scale)} numbers; expected one, or one for each of the "
            f"{adapter.layers} cross-attention layers"
        )
    if options.feature_reuse > 1:
        raise UsageError(
            "feature_reuse with ip_adapter_image is unsupported", hint="leave one of them out"
        )


def add_image_prompt(
    conditioning: Sequence[ConditioningSchedule],
    engines: Mapping[str, Engine],
    options: GenerationOptions,
    adapter: IpAdapter | None,
) -> list[ConditioningSchedule]:
    """The conditioning of a call's images with its image prompt.

    At a scale of 0 nothing is added, so that the images have the bytes of a pipeline without.

    Args:
        conditioning: Of every image.
        engines: By component.
        options: Of the call, checked.
        adapter: Of the pipeline.
    """
    scales = np.asarray(options.ip_adapter_scale, np.float32)
    if options.ip_adapter_image is None or adapter is None or not scales.any():
        return list(conditioning)
    positive, negative = _encode(engines, options.ip_adapter_image, adapter)
    by_layer = np.broadcast_to(scales, (adapter.layers,))
    return [
        schedule.with_input(IP_ADAPTER_KV, positive, negative).with_input(
            IP_ADAPTER_SCALE, by_layer
        )
        for schedule in conditioning
    ]


def _encode(
    engines: Mapping[str, Engine], images: Sequence[Image], adapter: IpAdapter
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [T, K] of images, whose tokens follow each other, and of no image.

    What stands for no image is diffusers' choice: a zero embedding, or the hidden states of zeros.
    """
    encoder = engines[IMAGE_ENCODER]
    side = int(encoder.inputs[0].shape[2])
    pixels = [clip_pixels(image, side) for image in images]
    states = [encoder({"pixels": one})["image"] for one in pixels]
    if adapter.reads_hidden_states:
        nothing = encoder({"pixels": np.zeros_like(pixels[0])})["image"]
    else:
        nothing = np.zeros_like(states[0])
    tokens = [engines[IP_ADAPTER]({"image": one})[IP_ADAPTER_KV][0] for one in (*states, nothing)]
    return np.concatenate(tokens[:-1]), np.concatenate(tokens[-1:] * len(images))
