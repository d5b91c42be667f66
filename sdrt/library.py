"""Building bundles and listing them, as `sdrt build` and `sdrt inspect` do.

Knows the arguments and manifests; what exports is imported when a build begins.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundle import Bundle, open_bundle, parse_size
from .bundle.manifest import Manifest, read_manifest
from .bundle.store import list_bundles
from .errors import BundleError, SdrtError, UsageError
from .signatures import explain_arguments

PRECISIONS = {"fp32": "float32", "fp16": "float16"}
# What users of diffusers pass, and what to do here.
INSTEAD = {
    **dict.fromkeys(("torch_dtype", "dtype", "variant", "fp16", "half"), 'use precision="fp16"'),
    **dict.fromkeys(("size", "width", "height", "resolution"), 'use sizes=["512x768"]'),
    **dict.fromkeys(("lora", "adapter"), 'use loras=["style.safetensors:0.8"]'),
    "use_safetensors": "leave it out: only safetensors files are read",
}
SD2_CONTEXT_WIDTH = 1024


@dataclass(frozen=True, slots=True)
class BundleInfo:
    """A bundle as its manifest describes it.

    family: sd1, sd2, sdxl or unconditional, by the UNet's inputs
    precision: fp32 or fp16, of the UNet
    sizes: validated sizes, width and height in pixels; the first is the default
    """

    name: str
    path: Path
    family: str
    precision: str
    sizes: tuple[tuple[int, int], ...]


@explain_arguments(INSTEAD)
def build(
    model: str,
    *,
    output: str | os.PathLike[str] | None = None,
    name: str | None = None,
    precision: str = "fp32",
    sizes: Sequence[str] = (),
    batch: tuple[int, int, int] | None = (1, 1, 4),
    backend: str = "auto",
    force: bool = False,
    vae: str | None = None,
    unet: str | None = None,
    text_encoder: str | None = None,
    text_encoder_2: str | None = None,
    prediction_type: str | None = None,
    zero_snr: bool = False,
    loras: Sequence[str] = (),
    revision: str | None = None,
    safety_checker: bool = False,
    feature_reuse: int | None = None,
    lora_rank: int | None = None,
) -> Bundle:
    """Build a bundle from a checkpoint and validate it, as `sdrt build` does.

    Args:
        model: A well-known name, Hub id, local folder or single `.safetensors` file.
        output: The bundle's folder; by default one in `$SDRT_HOME/bundles`.
        name: The bundle's name; by default the model's, and how the build differs from it.
        precision: `fp32` or `fp16`.
        sizes: Image sizes such as `"512x768"`; the first is the default. By default the size that
            the model was trained on.
        batch: Images at once: minimum, optimum and maximum. None for as many as fit.
        backend: The backend that validates the bundle.
        force: Whether to replace a bundle that exists.
        vae: Another autoencoder: a Hub id, folder or file.
        unet: Another UNet.
        text_encoder: Another text encoder.
        text_encoder_2: Another second text encoder.
        prediction_type: `epsilon`, `v_prediction` or `sample`, where the checkpoint is wrong.
        zero_snr: Whether to rescale the betas to zero terminal SNR.
        loras: LoRA files to merge, each `FILE` or `FILE:WEIGHT`.
        revision: Branch, tag or commit of a model on the Hub.
        safety_checker: Whether to include the checkpoint's safety checker.
        feature_reuse: The branch of the UNet for DeepCache; None for none.
        lora_rank: The largest rank of LoRA files that share calls of the model with others in
            `InflightBatcher` and `sdrt serve`; None for none.

    Returns:
        The bundle.

    Raises:
        UsageError: An argument is out of range.
        CheckpointError: The model cannot be found, read or understood.
        ParityError: A component differs too much from torch; nothing is published.
        BundleError: The folder exists already.
        StorageError: The disk is full, or the folder cannot be written.
        SdrtError: A package that builds need is not installed.
    """
    _check_precision(precision)
    try:
        from .export.build import BuildPlan, build_bundle
    except ImportError as error:
        raise _lacking(error) from error
    plan = BuildPlan(
        model=model,
        output=None if output is None else Path(output),
        name=name,
        dtype=PRECISIONS[precision],
        sizes=tuple(parse_size(size) for size in sizes),
        batch=batch,
        backend=backend,
        force=force,
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        prediction_type=prediction_type,
        zero_snr=zero_snr,
        loras=tuple(loras),
        revision=revision,
        safety_checker=safety_checker,
        feature_reuse=feature_reuse,
        lora_rank=lora_rank,
    )
    return open_bundle(build_bundle(plan))


def build_controlnet(
    controlnet: str,
    *,
    output: str | os.PathLike[str] | None = None,
    name: str | None = None,
    precision: str = "fp32",
    sizes: Sequence[str] = (),
    batch: tuple[int, int, int] = (1, 1, 4),
    backend: str = "auto",
    force: bool = False,
    revision: str | None = None,
) -> Bundle:
    """Build the control bundle of a ControlNet or T2I-Adapter, as `sdrt build --controlnet` does.

    Args:
        controlnet: A Hub id, local folder or single `.safetensors` file.
        output: The bundle's folder; by default one in `$SDRT_HOME/bundles`.
        name: The bundle's name, by which calls select it; by default the net's.
        precision: `fp32` or `fp16`.
        sizes: Image sizes that it is validated with; by default that of its model family.
        batch: Images at once: minimum, optimum and maximum.
        backend: The backend that validates the bundle.
        force: Whether to replace a bundle that exists.
        revision: Branch, tag or commit of a net on the Hub.

    Returns:
        The bundle.

    Raises:
        UsageError: An argument is out of range.
        CheckpointError: The net cannot be found, read or understood.
        ParityError: It differs too much from torch; nothing is published.
        BundleError: The folder exists already.
        SdrtError: A package that builds need is not installed, or the disk is full.
    """
    _check_precision(precision)
    try:
        from .export.control_build import ControlBuildPlan, build_control_bundle
    except ImportError as error:
        raise _lacking(error) from error
    plan = ControlBuildPlan(
        controlnet=controlnet,
        output=None if output is None else Path(output),
        name=name,
        dtype=PRECISIONS[precision],
        sizes=tuple(parse_size(size) for size in sizes),
        batch=batch,
        backend=backend,
        force=force,
        revision=revision,
    )
    return open_bundle(build_control_bundle(plan))


def build_upscaler(
    upscaler: str,
    *,
    output: str | os.PathLike[str] | None = None,
    name: str | None = None,
    precision: str = "fp32",
    backend: str = "auto",
    force: bool = False,
    revision: str | None = None,
) -> Bundle:
    """Build an upscaler's bundle from ESRGAN weights, as `sdrt build --upscaler` does.

    Args:
        upscaler: A `.safetensors` file, a folder with one, or a Hub id.
        output: The bundle's folder; by default one in `$SDRT_HOME/bundles`.
        name: The bundle's name; by default the file's.
        precision: `fp32` or `fp16`.
        backend: The backend that validates the bundle.
        force: Whether to replace a bundle that exists.
        revision: Branch, tag or commit of a repository on the Hub.

    Raises:
        UsageError: An argument is out of range.
        CheckpointError: The weights cannot be found, read or understood.
        ParityError: The network differs too much from torch; nothing is published.
        BundleError: The folder exists already.
        SdrtError: A package that builds need is not installed.
    """
    _check_precision(precision)
    try:
        from .export.upscaler_build import UpscalerBuildPlan, build_upscaler_bundle
    except ImportError as error:
        raise _lacking(error) from error
    folder = None if output is None else Path(output)
    dtype = PRECISIONS[precision]
    plan = UpscalerBuildPlan(upscaler, folder, name, dtype, backend, force, revision)
    return open_bundle(build_upscaler_bundle(plan))


def build_ip_adapter(
    ip_adapter: str | os.PathLike[str],
    *,
    image_encoder: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    name: str | None = None,
    precision: str = "fp32",
    backend: str = "auto",
    force: bool = False,
) -> Bundle:
    """Build the bundle of an IP-Adapter, as `sdrt build --ip-adapter` does.

    Args:
        ip_adapter: A `.safetensors` file.
        image_encoder: The folder of the image encoder that it was trained with.
        output: The bundle's folder; by default one in `$SDRT_HOME/bundles`.
        name: The bundle's name; by default the file's.
        precision: `fp32` or `fp16`.
        backend: The backend that validates the bundle.
        force: Whether to replace a bundle that exists.

    Raises:
        UsageError: An argument is out of range, or there is no image encoder.
        CheckpointError: The files cannot be read, or do not fit each other.
        ParityError: The networks differ too much from torch; nothing is published.
        BundleError: The folder exists already.
        SdrtError: A package that builds need is not installed.
    """
    _check_precision(precision)
    try:
        from .export.ip_adapter_bundle import IpAdapterBuildPlan, build_ip_adapter_bundle
    except ImportError as error:
        raise _lacking(error) from error
    encoder = None if image_encoder is None else Path(image_encoder)
    folder = None if output is None else Path(output)
    dtype = PRECISIONS[precision]
    plan = IpAdapterBuildPlan(Path(ip_adapter), encoder, folder, name, dtype, backend, force)
    return open_bundle(build_ip_adapter_bundle(plan))


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}; expected {' or '.join(PRECISIONS)}")


def _lacking(error: ImportError) -> SdrtError:
    return SdrtError(
        f"building needs {error.name}, which is not installed",
        hint="run `pip install 'sdrt[build]'`",
    )


def bundles() -> list[BundleInfo]:
    """The bundles of models in `$SDRT_HOME`, the newest first.

    Only manifests are read; one that is damaged or of another version is not listed.
    """
    described = []
    for folder in list_bundles():
        try:
            manifest = read_manifest(folder)
        except BundleError:
            continue
        if "unet" in manifest.components:
            described.append(_describe(folder, manifest))
    return described


def _describe(folder: Path, manifest: Manifest) -> BundleInfo:
    unet = manifest.components["unet"]
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == unet.dtype)
    inputs = {spec.name: spec.shape for spec in unet.inputs}
    return BundleInfo(manifest.name, folder, _family(inputs), precision, manifest.sizes)


def _family(inputs: dict[str, tuple[int | str, ...]]) -> str:
    if "context" not in inputs:
        return "unconditional"
    if "pooled" in inputs:
        return "sdxl"
    return "sd2" if inputs["context"][-1] == SD2_CONTEXT_WIDTH else "sd1"
