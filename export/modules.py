"""A checkpoint's parts as torch modules: the components of a bundle, with weights, in float32."""

from typing import Any

import torch
from torch import Tensor, nn

from sdrt.errors import CheckpointError, UsageError

from .checkpoint import Checkpoint
from .pixel_unet import PixelUnet, PixelUnetConfig
from .safety_checker import SafetyChecker, renamed
from .single_file.original_layout import modern_name
from .single_file.parts import OPTIONS
from .single_file.quantized import check_used
from .text_encoder import load_text_model, prompt_length, text_config
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


class PairedTextEncoder(nn.Module):
    """One of two text encoders, as XL reads them: input_ids [B, N] int32 -> contexts
    [B, layers, N, width], the hidden states before every layer without the final norm, so that the
    last is the last layer but one's; and from a model with a projection the prompt as a whole,
    pooled [B, width].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        found = self.model(input_ids=input_ids, output_hidden_states=True)
        contexts = torch.stack(found.hidden_states[:-1], dim=1)
        pooled: Tensor | None = getattr(found, "text_embeds", None)
        return contexts if pooled is None else (contexts, pooled)


def text_encoder(checkpoint: Checkpoint) -> TextEncoder | PairedTextEncoder:
    paired = len(checkpoint.text_encoders) > 1
    model = _clip(checkpoint, "text_encoder", "CLIPTextModel")
    return (PairedTextEncoder if paired else TextEncoder)(model).eval()


def text_encoder_2(checkpoint: Checkpoint) -> PairedTextEncoder:
    model = _clip(checkpoint, "text_encoder_2", "CLIPTextModelWithProjection")
    return PairedTextEncoder(model).eval()


def _clip(checkpoint: Checkpoint, part: str, kind: str) -> Any:
    """One of transformers' text models, filled."""
    return _filled(*load_text_model(checkpoint, part, kind), part)


def safety_checker(checkpoint: Checkpoint) -> SafetyChecker:
    from transformers import CLIPConfig

    config: Any = CLIPConfig(**checkpoint.config("safety_checker"))
    config.vision_config._attn_implementation = "sdpa"
    module = SafetyChecker(config)
    weights = renamed(checkpoint.weights("safety_checker"), set(module.state_dict()))
    filled: SafetyChecker = _filled(module, weights, "safety_checker")
    return filled


def unet(checkpoint: Checkpoint) -> Unet | PixelUnet:
    if checkpoint.unconditional:
        with torch.device("meta"):
            pixels = PixelUnet(PixelUnetConfig.from_json(checkpoint.config("unet")))
        weights = {modern_name(name): t for name, t in checkpoint.weights("unet").items()}
        drawing: PixelUnet = _filled(pixels, weights, "unet")
        return drawing
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
    weights = {modern_name(name): t for name, t in checkpoint.weights("vae").items()}
    for name, tensor in weights.items():
        if ".attentions." in name and tensor.ndim == 4:  # linear layers once were 1x1 convolutions
            weights[name] = tensor[:, :, 0, 0]
    filled: AutoencoderKL = _filled(module, weights, "vae")
    return filled


def latent_shape(checkpoint: Checkpoint) -> tuple[int, int]:
    """Channels of the latents, and how many pixels are one of theirs."""
    if checkpoint.unconditional:
        return PixelUnetConfig.from_json(checkpoint.config("unet")).in_channels, 1
    raw = checkpoint.config("vae")
    if raw.get("_class_name") == "AutoencoderTiny":
        tiny = TinyVaeConfig.from_json(raw)
        return tiny.latent_channels, 2 ** (len(tiny.num_encoder_blocks) - 1)
    config = VaeConfig.from_json(raw)
    return config.latent_channels, 2 ** (len(config.block_out_channels) - 1)


def native_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Width and height in pixels that the model was trained on."""
    config = unet_config(checkpoint)
    if isinstance(config, PixelUnetConfig):
        return config.size
    sides, scale = config.sample_size or 64, latent_shape(checkpoint)[1]
    height, width = (sides, sides) if isinstance(sides, int) else sides
    return width * scale, height * scale


def unet_config(checkpoint: Checkpoint) -> UnetConfig | PixelUnetConfig:
    kind = PixelUnetConfig if checkpoint.unconditional else UnetConfig
    return kind.from_json(checkpoint.config("unet"))


def check_fit(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the parts were made for one another."""
    if checkpoint.unconditional:
        return
    prompt_length(checkpoint, checkpoint.tokenizers())
    unet = UnetConfig.from_json(checkpoint.config("unet"))
    encoders = [text_config(checkpoint, part) for part in checkpoint.text_encoders]
    if unet.pooled_width and len(encoders) < 2:
        raise CheckpointError(
            f"this UNet is told of the prompt as a whole, and {checkpoint.folder} has no "
            "text_encoder_2 to do so; give --text-encoder-2, or the UNet is another model's"
        )
    if not unet.pooled_width and len(encoders) > 1:
        raise CheckpointError(
            "this UNet is not told of the prompt as a whole, and the model has a text_encoder_2; "
            f"the UNet is another model's{_advice(checkpoint)}"
        )
    pooled = encoders[-1].get("projection_dim", 512) if unet.pooled_width else 0
    for what, found, wanted in (
        ("context", sum(e.get("hidden_size", 512) for e in encoders), unet.cross_attention_dim),
        ("whole prompt", pooled, unet.pooled_width),
        ("latent", latent_shape(checkpoint)[0], unet.out_channels),
    ):
        if found != wanted:
            raise CheckpointError(
                f"the UNet's {what} is {wanted} wide, the other parts' {found}; "
                f"one of them is another model's{_advice(checkpoint)}"
            )


def _advice(checkpoint: Checkpoint) -> str:
    """Which options to look at where parts do not fit; nothing if none were given."""
    options = [OPTIONS[part] for part in checkpoint.others if part in OPTIONS]
    return f": give {' and '.join(options)} parts of its family" if options else ""


def check_branch(checkpoint: Checkpoint, branch: int | None) -> None:
    """Raise UsageError unless the UNet has this branch at its first resolution, or it is None."""
    if branch is None:
        return
    if checkpoint.unconditional:
        raise UsageError("--feature-reuse is for models of latents; this one draws pixels")
    most = UnetConfig.from_json(checkpoint.config("unet")).layers_per_block
    if not 0 <= branch <= most:
        raise UsageError(f"--feature-reuse {branch}; this UNet has the branches 0 to {most}")


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
    check_used(((name, weights[name]) for name in wanted), part)
    # One by one, so that what is stored and what is made of it are not both whole in memory.
    full = {name: weights.pop(name).to(torch.float32) for name in wanted}
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
