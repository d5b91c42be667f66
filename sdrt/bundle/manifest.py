"""The manifest, `sdrt.json`: what a bundle contains, and which values are valid.

Knows the fields and their bounds; not the disk. A manifest may come from anywhere: its names reach
paths and terminals, its numbers reach allocations.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sdrt.errors import BundleError
from sdrt.json_validation import (
    Reader,
    array,
    boolean,
    integer,
    mapping,
    number,
    one_of,
    read_json,
    record,
    text,
)

FORMAT = 2
MANIFEST = "sdrt.json"
MAX_MANIFEST = 4_000_000  # bytes
SHALLOW = "unet_shallow"
FEATURE = "feature"  # what the shallow part is given of the whole UNet
CONTROL = "unet_control"
# Its inputs besides the plain ones. The first and the last are numbered: `down_block_residual_0`.
DOWN_RESIDUAL, MID_RESIDUAL = "down_block_residual", "mid_block_residual"
ADAPTER_STATE = "adapter_state"
# Of control bundles, which hold one of these and nothing else.
CONTROLNET, T2I_ADAPTER = "controlnet", "t2i_adapter"
CONTROL_NETS = (CONTROLNET, T2I_ADAPTER)
CONTROL_IMAGE = "control_image"  # what they read, [rows, 3, H, W] in 0..1
UPSCALER = "upscaler"  # the only component of an upscaler's bundle
# Of an IP-Adapter's bundle, and what they give to the UNet's cross-attention layers.
IMAGE_ENCODER, IP_ADAPTER = IP_ADAPTER_PARTS = "image_encoder", "ip_adapter"
IP_ADAPTER_KV, IP_ADAPTER_SCALE = "ip_adapter_kv", "ip_adapter_scale"
# The component with LoRA factors as an input, of every part that LoRA files change.
LORA_PARTS = {part: f"{part}_lora" for part in ("unet", "text_encoder", "text_encoder_2")}
LORA_FACTORS = "lora"  # its input, [rows, P]
COMPONENTS = (
    *("text_encoder", "text_encoder_2", "unet", SHALLOW, CONTROL, "vae_decoder", "vae_encoder"),
    *LORA_PARTS.values(),
    "safety_checker",
    *CONTROL_NETS,
    UPSCALER,
    *IP_ADAPTER_PARTS,
)
DTYPES = ("float32", "float16", "int64", "int32")
MAX_FILES = 1000
MAX_WEIGHTS = 10_000
# What a bundle's safetensors files say of themselves, and how a transposed weight's name ends.
NAMES = {"names": "checkpoint"}
TRANSPOSED = ".T"
FLOAT32_GRAPH = "float32.onnx"
WEIGHTS = "model.safetensors"
# Graphs derived from the UNet's are stored next to it and share its weights.
SHALLOW_GRAPH = "shallow.onnx"
CONTROL_GRAPH = "control.onnx"
LORA_GRAPH = "lora.onnx"  # next to the graph of its part
# A text encoder's graph that reads the embeddings of its tokens, see `token_embeddings.py`.
EMBEDDINGS_GRAPH = "embeddings.onnx"
TOKEN_EMBEDDINGS = "token_embeddings"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# How many numbers models such as XL read besides the prompt: the original's height and width, the
# crop's top and left, the target's height and width; in a refiner an aesthetic score instead.
TIME_IDS, REFINER_TIME_IDS = 6, 5
# All that a bundle may hold besides graphs and their weights.
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
SMALL_FILES = {f"tokenizer{which}/{name}" for which in ("", "_2") for name in TOKENIZER_FILES}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: a name for each dynamic axis, a number for each fixed one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Component:
    """One network: `<name>/model.onnx`, its tensors, its precision and how it was validated.

    `unet_shallow` is `unet/shallow.onnx`, the layers of the UNet nearest to its input and output:
    its input `feature` is an output of the UNet. weights: those that it reads of the UNet's
    `unet_control` is `unet/control.onnx`, the UNet with the residuals of a ControlNet and of a
    T2I-Adapter, and the keys and values of an IP-Adapter, as further inputs; zeros are as none. A
    `controlnet` puts out residuals of the same names, [rows, C, 1, 1] where it pools them, a
    `t2i_adapter` the other ones. `unet_lora` is `unet/lora.onnx`, the UNet with an input `lora`
    [rows, P] of LoRA factors, and a text encoder may have such a graph too; weights: those of the
    layers that have factors, in their order.
    activations: bytes that are alive at once when one row of the first size runs; 0 if unknown
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dtype: str
    parity: Mapping[str, float]
    weights: tuple[str, ...] = ()
    activations: int = 0


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `sdrt.json`.

    sizes: (width, height) in pixels, the first is the default
    preview: [3, latent_channels + 1], colours in [-1, 1] from scaled latents and 1
    multiple: pixels; the sides of images of other sizes are multiples of it
    admitted: lower precisions whose images are near enough to the exact ones, with the PSNR in dB
    zero_empty_prompt: whether an empty negative prompt is zeros rather than what is read of it
    prediction: what the UNet predicts and why that is believed; "" in older bundles. The samplers
        read scheduler_config.json
    family: the models that a control bundle is for; "" for other bundles
    """

    name: str
    source: str
    sizes: tuple[tuple[int, int], ...]
    batch: tuple[int, int, int]
    latent_channels: int
    downscale: int
    max_tokens: int
    opset: int
    components: Mapping[str, Component]
    parity: Mapping[str, float]
    preview: tuple[tuple[float, ...], ...]
    files: Mapping[str, FileRecord]
    admitted: Mapping[str, float] = field(default_factory=dict)
    multiple: int = 64
    zero_empty_prompt: bool = False
    prediction: str = ""
    family: str = ""
    format: int = FORMAT

    @property
    def num_time_ids(self) -> int:
        """How many time ids the UNet reads; 0 for none."""
        unet = self.components.get("unet")
        specs = [spec for spec in (unet.inputs if unet else ()) if spec.name == "time_ids"]
        return int(specs[0].shape[-1]) if specs else 0

    @property
    def is_refiner(self) -> bool:
        """Whether it is a refiner, which continues what another model has begun."""
        return self.num_time_ids == REFINER_TIME_IDS

    @property
    def control_net(self) -> str | None:
        """The component of a control bundle; None for other bundles."""
        return next((name for name in CONTROL_NETS if name in self.components), None)


def json_from_manifest(manifest: Manifest) -> str:
    return json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle's folder; raises BundleError where it cannot be read."""
    path = folder / MANIFEST
    return manifest_from_json(read_json(path, max_bytes=MAX_MANIFEST), path)


def manifest_from_json(raw: Mapping[str, Any], path: Path) -> Manifest:
    """Raises BundleError for another format, unknown or missing fields, and values out of bounds,
    all by name.
    """
    if raw.get("format") != FORMAT:
        raise BundleError(
            f"{path} has format {raw.get('format')!r:.60}, this version reads {FORMAT}",
            hint="build the bundle again with --force",
        )
    try:
        manifest = MANIFEST_READER(raw, "it")
        _check_consistency(manifest)
    except ValueError as error:
        raise BundleError(f"{path} is not a manifest: {error}") from error
    return manifest


def _check_consistency(manifest: Manifest) -> None:
    """Raise ValueError for what is wrong between fields."""
    if not 1 <= manifest.batch[0] <= manifest.batch[1] <= manifest.batch[2]:
        raise ValueError(f"batch {manifest.batch} does not grow")
    if any(len(colours) != manifest.latent_channels + 1 for colours in manifest.preview):
        raise ValueError(f"its preview is not of {manifest.latent_channels} channels")
    for name, component in manifest.components.items():
        specs = [spec.name for spec in (*component.inputs, *component.outputs)]
        if len(set(specs)) < len(specs):
            raise ValueError(f"{name} has two inputs or outputs of one name")


def _axis(value: Any, where: str) -> int | str:
    return AXIS_NAME(value, where) if isinstance(value, str) else LENGTH(value, where)


FILE_NAME = text(r"\w[\w.-]*(/\w[\w.-]*){0,3}", "a file inside, none outside the bundle")
AXIS_NAME = text(r"[\w ()+*/-]{1,128}", "an axis")  # of outputs, an expression

WEIGHT_NAME = text(r"[\w.]{1,300}", "a weight's name")

ONE_LINE = text(r"[^\x00-\x1f\x7f-\x9f]{0,4000}", "one line")
LENGTH = integer(1, 2**31 - 1)
SIDE = integer(8, 8192)
MEASURES = mapping(number(), text(r"[\w .-]{1,64}", "a measure"), 64)
SPEC = record(
    TensorSpec,
    {
        "name": text(r"\w{1,64}", "a tensor's name"),
        "dtype": one_of(DTYPES),
        "shape": array(_axis, 0, 8),
    },
)
COMPONENT = record(
    Component,
    {
        "inputs": array(SPEC, 1, 64),
        "outputs": array(SPEC, 1, 64),
        "dtype": one_of(DTYPES),
        "parity": MEASURES,
        "weights": array(WEIGHT_NAME, 0, MAX_WEIGHTS),
        "activations": integer(0, 2**44),
    },
)
RECORD = record(
    FileRecord,
    {
        "size": integer(0, 2**44),
        "sha256": text(r"[0-9a-f]{64}", "64 hexadecimal digits"),
    },
)
MANIFEST_READER: Reader[Manifest] = record(
    Manifest,
    {
        # It becomes a folder's name.
        "name": text(r"[^\W_][^/\\\x00-\x1f\x7f-\x9f]{0,199}", "a name of a file"),
        "source": ONE_LINE,
        "sizes": array(array(SIDE, 2, 2), 1, 64),
        "batch": array(integer(1, 1024), 3, 3),
        "latent_channels": integer(1, 128),
        "downscale": integer(1, 64),
        "max_tokens": integer(0, 4096),
        "opset": integer(1, 99),
        "components": mapping(COMPONENT, one_of(COMPONENTS), len(COMPONENTS)),
        "parity": MEASURES,
        "preview": array(array(number(-1e6, 1e6), 2, 129), 0, 3),
        "files": mapping(RECORD, FILE_NAME, MAX_FILES),
        "admitted": MEASURES,
        "multiple": integer(1, 8192),
        "zero_empty_prompt": boolean,
        "prediction": ONE_LINE,
        "family": ONE_LINE,
        "format": integer(FORMAT, FORMAT),
    },
)


SMALL_FILES |= {"scheduler/scheduler_config.json", "proof.json"}
