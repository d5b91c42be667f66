"""A bundle's components as torch modules with the checkpoint's weights, in float32.

Knows modules and the names of weights; the architecture is parsed already, in a `ModelSpec`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sdrt.errors import CheckpointError

from .checkpoint import Checkpoint
from .model_spec import ModelSpec
from .pixel_unet import PixelUnet, PixelUnetConfig
from .safety_checker import SafetyChecker, renamed
from .single_file.original_layout import modern_name
from .single_file.quantized import check_used
from .stored_weights import convert_on_use, keep_stored
from .text_encoder import load_text_model
from .tiny_vae import AutoencoderTiny, TinyVaeConfig, TinyVaeDecoder, TinyVaeEncoder
from .unet import Unet
from .vae import AutoencoderKL, VaeDecoder, VaeEncoder


class TextEncoder(nn.Module):
    """transformers' CLIP text model: input_ids [B, N] int32 -> contexts [B, layers, N, width], the
    hidden states after every layer, each through the final norm; the last is the default context.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.model(input_ids=input_ids, output_hidden_states=True).hidden_states
        inner: Any = getattr(self.model, "text_model", self.model)
        contexts: Tensor = inner.final_layer_norm(torch.stack(states[1:], dim=1))
        return contexts


class PairedTextEncoder(nn.Module):
    """A text encoder of models such as SDXL: input_ids [B, N] int32 -> contexts
    [B, layers, N, width], the hidden states before every layer without the final norm, so that the
    last is the penultimate layer's; and from a model with a text projection also its pooled output,
    [B, width].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        output = self.model(input_ids=input_ids, output_hidden_states=True)
        contexts = torch.stack(output.hidden_states[:-1], dim=1)
        pooled: Tensor | None = getattr(output, "text_embeds", None)
        return contexts if pooled is None else (contexts, pooled)


def load_text_encoder(checkpoint: Checkpoint, spec: ModelSpec) -> TextEncoder | PairedTextEncoder:
    paired = len(spec.text_encoders) > 1
    model = _load_clip(checkpoint, spec, "text_encoder", "CLIPTextModel")
    return (PairedTextEncoder if paired else TextEncoder)(model).eval()


def load_text_encoder_2(checkpoint: Checkpoint, spec: ModelSpec) -> PairedTextEncoder:
    model = _load_clip(checkpoint, spec, "text_encoder_2", "CLIPTextModelWithProjection")
    return PairedTextEncoder(model).eval()


def _load_clip(checkpoint: Checkpoint, spec: ModelSpec, part: str, class_name: str) -> Any:
    """One of transformers' text models with its weights."""
    model, weights = load_text_model(checkpoint, part, spec.text_encoders[part], class_name)
    return load_weights(model, weights, part, stored=True)


def load_safety_checker(checkpoint: Checkpoint, spec: ModelSpec) -> SafetyChecker:
    from transformers import CLIPConfig

    config: Any = CLIPConfig(**checkpoint.config("safety_checker"))
    config.vision_config._attn_implementation = "sdpa"
    module = SafetyChecker(config)
    weights = renamed(checkpoint.weights("safety_checker"), set(module.state_dict()))
    checker: SafetyChecker = load_weights(module, weights, "safety_checker")
    return checker


def load_unet(checkpoint: Checkpoint, spec: ModelSpec) -> Unet | PixelUnet:
    weights = checkpoint.weights("unet")
    if isinstance(spec.unet, PixelUnetConfig):
        with torch.device("meta"):
            pixel_unet = PixelUnet(spec.unet)
        weights = {modern_name(name): tensor for name, tensor in weights.items()}
        loaded: PixelUnet = load_weights(pixel_unet, weights, "unet")
        return loaded
    with torch.device("meta"):
        module = Unet(spec.unet)
    unet: Unet = load_weights(module, weights, "unet", stored=True)
    return unet


def load_vae(checkpoint: Checkpoint, spec: ModelSpec) -> AutoencoderKL | AutoencoderTiny:
    weights = checkpoint.weights("vae")
    if isinstance(spec.vae, TinyVaeConfig):
        with torch.device("meta"):
            tiny = AutoencoderTiny(spec.vae)
        loaded: AutoencoderTiny = load_weights(tiny, weights, "vae")
        return loaded
    assert spec.vae is not None
    with torch.device("meta"):
        module = AutoencoderKL(spec.vae)
    weights = {modern_name(name): tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if ".attentions." in name and tensor.ndim == 4:  # early files have 1x1 convolutions
            weights[name] = tensor[:, :, 0, 0]
    vae: AutoencoderKL = load_weights(module, weights, "vae")
    return vae


def load_weights(
    module: Any, weights: dict[str, Tensor], part: str, *, stored: bool = False
) -> Any:
    """The module with its weights, which computes in float32.

    stored: whether large weights stay as they are stored, see `stored_weights`
    Raises CheckpointError for unexpected names or shapes.
    """
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    for what, names in (
        ("lacks", set(expected) - set(weights)),
        ("has an unknown", set(weights) - set(expected)),
    ):
        if names:
            raise CheckpointError(
                f"{part} {what} weight {min(names)} (and {len(names) - 1} others): "
                "its weights do not fit its config.json"
            )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{part}: {name} is {list(weights[name].shape)}, expected {list(shape)}"
            )
    check_used(((name, weights[name]) for name in expected), part)
    # One by one, so that memory never holds both the stored and the converted weights in full.
    state = {}
    for name in expected:
        weight = weights.pop(name)
        stays = stored and keep_stored(name, weight, module)
        state[name] = weight if stays else weight.to(torch.float32)
    module.load_state_dict(state, assign=True)
    convert_on_use(module)
    return module.eval().requires_grad_(False)


def load_vae_decoder(checkpoint: Checkpoint, spec: ModelSpec) -> nn.Module:
    vae = load_vae(checkpoint, spec)
    if isinstance(vae, AutoencoderTiny):
        return TinyVaeDecoder(vae).eval()
    return VaeDecoder(vae).eval()


def load_vae_encoder(checkpoint: Checkpoint, spec: ModelSpec) -> nn.Module:
    vae = load_vae(checkpoint, spec)
    if isinstance(vae, AutoencoderTiny):
        return TinyVaeEncoder(vae).eval()
    return VaeEncoder(vae).eval()
