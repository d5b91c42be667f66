"""The reference library, on the bundle's own checkpoint. Imported in a worker only."""

import io
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdrt.bench.timing import PROMPT, Part, Spent, Timed, picture_of
from sdrt.bundle import open_bundle, parse_size
from sdrt.runtime.samplers.registry import config_from_name

from . import TEXT_TO_IMAGE, checkpoint_folder


def checkpoint_of(folder: str) -> Path:
    found = checkpoint_folder(open_bundle(folder))
    assert found is not None  # `peers` has looked
    return found


def reference(folder: str, wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
    """The reference library: fp32 as it comes, bf16 with channels last, and that compiled."""
    import diffusers
    import torch

    checkpoint = checkpoint_of(folder)
    precision = wanted["precision"]
    kind = torch.float32 if precision == "float32" else torch.bfloat16
    without = {"safety_checker": None} if _checks(checkpoint) else {}
    kinds: Any = diffusers.DiffusionPipeline
    pipe = kinds.from_pretrained(checkpoint, **without)
    pipe.to(dtype=kind)
    if precision != "float32":
        for module in (pipe.unet, pipe.vae):
            module.to(memory_format=torch.channels_last)
    if precision == "compiled":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        pipe.unet = torch.compile(pipe.unet)
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return parts_of(pipe, kind, wanted, spent)


def _checks(checkpoint: Path) -> bool:
    return "safety_checker" in json.loads((checkpoint / "model_index.json").read_text())


def parts_of(pipe: Any, kind: Any, wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
    """The parts of a pipeline with the reference library's interface."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    if wanted["scheduler"]:
        pipe.scheduler = _scheduler(wanted["scheduler"], pipe.scheduler.config)
    width, height = parse_size(wanted["size"])
    unet, vae, texts = pipe.unet, pipe.vae, _texts(pipe)
    for encoder, _ in texts:
        encoder.forward = Timed(encoder.forward, "text", spent)
    unet.forward = Timed(unet.forward, "unet", spent)
    vae.decode = Timed(vae.decode, "decode", spent)
    sides = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    latents = torch.randn(2, unet.config.in_channels, *sides).to(kind)
    latent = latents[:1, : vae.config.latent_channels] / vae.config.scaling_factor
    pipe.scheduler.set_timesteps(20)
    timestep, told = pipe.scheduler.timesteps[10], _told(pipe, kind)

    def guarded(part: Part) -> object:
        with torch.no_grad():
            return part()

    def picture(count: int) -> None:
        given = {"num_inference_steps": count, "width": width, "height": height}
        image = pipe(PROMPT, **given).images[0]
        Timed(image.save, "PNG", spent)(io.BytesIO(), "PNG")

    parts: dict[str, Part] = {
        "text": lambda: [encoder(ids) for encoder, ids in texts],
        "unet": lambda: unet(latents, timestep, **told),
        "decode": lambda: vae.decode(latent, return_dict=False, generator=None),
    }
    if type(pipe).__name__.removeprefix("ORT") in TEXT_TO_IMAGE:
        parts |= {picture_of(count): partial(picture, count) for count in wanted["steps"]}
    return {name: partial(guarded, part) for name, part in parts.items()}


def _scheduler(name: str, base: Mapping[str, Any]) -> Any:
    """The reference library's sampler of a name that this project knows."""
    import diffusers

    config = config_from_name(name, dict(base))
    kinds: Any = getattr(diffusers, config["_class_name"])
    return kinds.from_config(config)


def _texts(pipe: Any) -> list[tuple[Any, Any]]:
    """Every text encoder with the ids of two prompts."""
    reading = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return [
        (encoder, getattr(pipe, f"tokenizer{end}")(["", PROMPT], **reading).input_ids)
        for end in ("", "_2")
        if (encoder := getattr(pipe, f"text_encoder{end}", None)) is not None
    ]


def _told(pipe: Any, kind: Any) -> dict[str, Any]:
    """Noise in place of what two prompts say, and the rest as in a picture: what is compiled for
    that would otherwise be compiled again.
    """
    import torch

    config, tokens = pipe.unet.config, pipe.tokenizer.model_max_length
    told: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, tokens, config.cross_attention_dim).to(kind),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
        "return_dict": False,
    }
    if width := getattr(config, "time_cond_proj_dim", None):
        told["timestep_cond"] = torch.ones(2, width, dtype=kind)
    if getattr(config, "addition_embed_type", None) == "text_time":
        ids = 6 * config.addition_time_embed_dim
        pooled = torch.randn(2, config.projection_class_embeddings_input_dim - ids).to(kind)
        sizes = torch.ones(2, 6, dtype=kind)
        told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return told
