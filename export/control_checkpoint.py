"""Where a ControlNet or T2I-Adapter comes from: the hub, a folder, a single file; and its network.

Knows files and configuration. No pickle is ever read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdrt.bundle.embedded import MODELS
from sdrt.bundle.manifest import CONTROLNET, T2I_ADAPTER
from sdrt.errors import CheckpointError

from .controlnet import ControlNet, ControlNetConfig, rgb_weights
from .hub import HUB_ID, fetched
from .modules import load_weights
from .single_file.control import (
    SUPPORTED,
    folder_from_control_file,
    refuse_unsupported,
)
from .single_file.quantized import weights_without_scales
from .t2i_adapter import XL, T2IAdapter, T2IAdapterConfig, unfolded_weights
from .weights import PICKLES, STEMS, TO_CONVERT, read_config, read_safetensors, weight_files

SUFFIX = ".safetensors"
EMBEDDED = "outline"  # the ControlNet of the embedded model
KINDS = {"ControlNetModel": CONTROLNET, "T2IAdapter": T2I_ADAPTER}
SD2_CONTEXT_WIDTH = 1024
ADAPTER_DOWNSCALE = 8  # pixels along one side of a latent of the models that adapters are for


@dataclass(frozen=True, slots=True)
class ControlCheckpoint:
    """A net's folder, its kind and its configuration.

    Attributes:
        name: What to call it.
        source: As it was asked for.
        kind: `controlnet` or `t2i_adapter`, as its component is called.
    """

    name: str
    source: str
    folder: Path
    kind: str
    config: ControlNetConfig | T2IAdapterConfig

    @property
    def family(self) -> str:
        """Of the models that it is for: Stable Diffusion 1.x, 2.x or XL; or the embedded model."""
        return "shapes" if self.source == EMBEDDED else f"Stable Diffusion {self._version}"

    @property
    def _version(self) -> str:
        if isinstance(self.config, T2IAdapterConfig):
            return "XL" if self.config.adapter_type == XL else "1.x or 2.x"
        if self.config.unet.pooled_width:
            return "XL"
        return "2.x" if self.config.unet.cross_attention_dim == SD2_CONTEXT_WIDTH else "1.x"

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels of the images that its family is trained on."""
        side = 1024 if self._version == "XL" else 512
        return side, side

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent."""
        config = self.config
        return ADAPTER_DOWNSCALE if isinstance(config, T2IAdapterConfig) else config.downscale

    @property
    def latent_channels(self) -> int:
        config = self.config
        return 4 if isinstance(config, T2IAdapterConfig) else config.unet.in_channels

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of every image are multiples of."""
        config = self.config
        if isinstance(config, T2IAdapterConfig):
            return self.downscale * int(2 ** (len(config.channels) - 1))
        return self.downscale * int(2 ** (len(config.unet.block_out_channels) - 1))

    def load(self) -> Any:
        """The torch module with its weights in float32; raises CheckpointError where they do not
        fit its configuration.
        """
        weights: dict[str, torch.Tensor] = {}
        for path in weight_files(self.folder):
            weights |= read_safetensors(path)
        refuse_unsupported(weights, self.source)
        weights = weights_without_scales(weights)
        config = self.config
        if isinstance(config, T2IAdapterConfig):
            weights = unfolded_weights(weights, config)
        else:
            weights = rgb_weights(weights, config.controlnet_conditioning_channel_order)
        return load_weights(_new_module(config), weights, self.kind)


def _new_module(config: ControlNetConfig | T2IAdapterConfig) -> ControlNet | T2IAdapter:
    with torch.device("meta"):
        if isinstance(config, T2IAdapterConfig):
            return T2IAdapter(config)
        return ControlNet(config)


def find_control_checkpoint(where: str, revision: str | None = None) -> ControlCheckpoint:
    """The net behind a hub id, folder or file.

    Args:
        where: What `sdrt build --controlnet` takes, or the name of the embedded net.
        revision: A branch, tag or commit of a repository on the hub.

    Raises:
        CheckpointError: Nothing there, a pickle, no net, or one of a design that is not supported.
    """
    if where == EMBEDDED:
        return _read(MODELS / where, where, where)
    path = Path(where).expanduser()
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{where} is a pickle, which is refused: {TO_CONVERT}")
    is_file = path.suffix.lower() == SUFFIX and not path.is_dir()
    if revision and (is_file or path.is_dir()):
        raise CheckpointError(f"revision {revision!r} of {where}: only the hub has any")
    if is_file:
        return _read(_folder_of_file(path), path.stem, where)
    if path.is_dir():
        return _read(path, path.resolve().name, where)
    if re.fullmatch(HUB_ID, where):
        source = f"{where}@{revision}" if revision else where
        return _read(fetched(where, (CONTROLNET,), revision), where.split("/")[-1], source)
    raise CheckpointError(
        f"no ControlNet at {where!r}",
        hint="give a hub id (org/name), a folder with config.json and weights, or a .safetensors "
        "file",
    )


def _folder_of_file(path: Path) -> Path:
    """A folder in the hub's layout; the file's own if it is the weights of one."""
    config = path.parent / "config.json"
    if path.is_file() and path.name.split(".")[0] in STEMS and config.is_file():
        return path.parent
    return folder_from_control_file(path)


def _read(root: Path, name: str, source: str) -> ControlCheckpoint:
    places = (root, root / CONTROLNET, root / "adapter")
    folder = next((place for place in places if (place / "config.json").is_file()), None)
    if folder is None:
        raise CheckpointError(f"{source} has no config.json, neither in {CONTROLNET}/ nor itself")
    raw = read_config(folder / "config.json")
    kind = KINDS.get(str(raw.get("_class_name")))
    if kind is None:
        raise CheckpointError(
            f"{source} is a {raw.get('_class_name')!r:.60}, expected {' or '.join(KINDS)}",
            hint=SUPPORTED,
        )
    config: ControlNetConfig | T2IAdapterConfig
    if kind == CONTROLNET:
        config = ControlNetConfig.from_json(raw)
    else:
        config = T2IAdapterConfig.from_json(raw)
    return ControlCheckpoint(name, source, folder, kind, config)
