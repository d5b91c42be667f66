"""A checkpoint's parts as torch modules: the components of a bundle, with weights, in float32."""

from typing import Any

import torch
from torch import Tensor, nn

from sdrt.errors import CheckpointError

from .checkpoint import Checkpoint
from .tiny_vae import AutoencoderTiny, TinyVaeConfig, TinyVaeDecoder, TinyVaeEncoder
from .unet import Unet, UnetConfig
from .vae import AutoencoderKL, VaeConfig, VaeDecoder, VaeEncoder


class TextEncoder(nn.Module):
    """transformers' CLIP text model: input_ids [B, N] int32 -> contexts [B, layers, N, width], the
    hidden states after every layer, each through the final norm; the last is the usual context.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.model(input_ids=input_ids, output_hidden_states=True).hidden_states
        inner: Any = getattr(self.model, "text_model", self.model)
        contexts: Tensor = inner.final_layer_norm(torch.stack(states[1:], dim=1))
        return contexts


def text_encoder(checkpoint: Checkpoint) -> TextEncoder:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**checkpoint.config("text_encoder"))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = CLIPTextModel(config)
    # transformers has had this network with and without the prefix.
    names = set(model.state_dict())
    weights = {}
    for name, tensor in checkpoint.weights("text_encoder").items():
        bare = name.removeprefix("text_model.")
        chosen = next((n for n in (name, bare, f"text_model.{name}") if n in names), name)
        if not name.endswith("position_ids"):
            weights[chosen] = tensor
    model = _filled(CLIPTextModel(config), weights, "text_encoder")
    return TextEncoder(model).eval()


def unet(checkpoint: Checkpoint) -> Unet:
    config = UnetConfig.from_json(checkpoint.config("unet"))
    with torch.device("meta"):
        module = Unet(config)
    filled: Unet = _filled(module, checkpoint.weights("unet"), "unet")
    return filled


def vae(checkpoint: Checkpoint) -> AutoencoderKL | AutoencoderTiny:
    raw = checkpoint.config("vae")
    if raw.get("_class_name") == "AutoencoderTiny":
        with torch.device("meta"):
            tiny = AutoencoderTiny(TinyVaeConfig.from_json(raw))
        small: AutoencoderTiny = _filled(tiny, checkpoint.weights("vae"), "vae")
        return small
    with torch.device("meta"):
        module = AutoencoderKL(VaeConfig.from_json(raw))
    weights = {_modern(name): t for name, t in checkpoint.weights("vae").items()}
    for name, tensor in weights.items():
        if ".attentions." in name and tensor.ndim == 4:  # linear layers once were 1x1 convolutions
            weights[name] = tensor[:, :, 0, 0]
    filled: AutoencoderKL = _filled(module, weights, "vae")
    return filled


def latent_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """Channels of the latents, and how many pixels are one of theirs."""
    raw = checkpoint.config("vae")
    if raw.get("_class_name") == "AutoencoderTiny":
        tiny = TinyVaeConfig.from_json(raw)
        return tiny.latent_channels, 2 ** (len(tiny.num_encoder_blocks) - 1)
    config = VaeConfig.from_json(raw)
    return config.latent_channels, 2 ** (len(config.block_out_channels) - 1)


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _modern(name: str) -> str:
    """Early checkpoints call the VAE's attention layers query, key, value and proj_attn."""
    head, _, tail = name.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{OLD_ATTENTION[last]}.{tail}" if last in OLD_ATTENTION else name


def _filled(module: Any, weights: dict[str, Tensor], part: str) -> Any:
    """The module with float32 weights; raises CheckpointError for a name or shape that misfits."""
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    for what, names in (
        ("lacks", set(wanted) - set(weights)),
        ("has an unknown", set(weights) - set(wanted)),
    ):
        if names:
            raise CheckpointError(
                f"{part} {what} weight {min(names)} (and {len(names) - 1} others): "
                "its weights do not fit its config.json"
            )
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{part}: {name} is {list(weights[name].shape)}, expected {list(shape)}"
            )
    full = {name: tensor.to(torch.float32) for name, tensor in weights.items()}
    module.load_state_dict(full, assign=True)
    return module.eval().requires_grad_(False)


def vae_decoder(checkpoint: Checkpoint) -> nn.Module:
    loaded = vae(checkpoint)
    if isinstance(loaded, AutoencoderTiny):
        return TinyVaeDecoder(loaded).eval()
    return VaeDecoder(loaded).eval()


def vae_encoder(checkpoint: Checkpoint) -> nn.Module:
    loaded = vae(checkpoint)
    if isinstance(loaded, AutoencoderTiny):
        return TinyVaeEncoder(loaded).eval()
    return VaeEncoder(loaded).eval()
