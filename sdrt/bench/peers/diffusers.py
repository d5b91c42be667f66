"""diffusers, on the bundle's own checkpoint. Imported in a worker only."""

import io
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sdrt.bench.timing import PROMPT, Part, Seconds, image_part, time_calls, timed
from sdrt.bundle import open_bundle, parse_size
from sdrt.runtime.samplers.registry import config_from_name

from . import TEXT_TO_IMAGE, checkpoint_folder


def find_checkpoint(folder: str) -> Path:
    """The checkpoint of the bundle in a folder."""
    checkpoint = checkpoint_folder(open_bundle(folder))
    assert checkpoint is not None  # `list_peers` checks this
    return checkpoint


def load(job: Mapping[str, Any], seconds: Seconds) -> dict[str, Part]:
    """diffusers: fp32 by default, bf16 with channels last, and the latter compiled."""
    import diffusers
    import torch

    checkpoint = find_checkpoint(job["folder"])
    precision = job["precision"]
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
    return pipeline_parts(pipe, kind, job, seconds)


def _checks(checkpoint: Path) -> bool:
    return "safety_checker" in json.loads((checkpoint / "model_index.json").read_text())


def pipeline_parts(
    pipe: Any, kind: Any, job: Mapping[str, Any], seconds: Seconds
) -> dict[str, Part]:
    """The parts of a pipeline with diffusers' interface."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    if job["scheduler"]:
        pipe.scheduler = _scheduler(job["scheduler"], pipe.scheduler.config)
    width, height = parse_size(job["size"])
    unet, vae, texts = pipe.unet, pipe.vae, _texts(pipe)
    for encoder, _ in texts:
        encoder.forward = time_calls(encoder.forward, "text", seconds)
    unet.forward = time_calls(unet.forward, "unet", seconds)
    vae.decode = time_calls(vae.decode, "decode", seconds)
    sides = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    latents = torch.randn(2, unet.config.in_channels, *sides).to(kind)
    latent = latents[:1, : vae.config.latent_channels] / vae.config.scaling_factor
    pipe.scheduler.set_timesteps(20)
    timestep, conditioning = pipe.scheduler.timesteps[10], _conditioning(pipe, kind)

    def without_grad(part: Part) -> object:
        with torch.no_grad():
            return part()

    def image(count: int) -> None:
        options = {"num_inference_steps": count, "width": width, "height": height}
        image = pipe(PROMPT, **options).images[0]
        with timed("PNG", seconds):
            image.save(io.BytesIO(), "PNG")

    parts: dict[str, Part] = {
        "text": lambda: [encoder(ids) for encoder, ids in texts],
        "unet": lambda: unet(latents, timestep, **conditioning),
        "decode": lambda: vae.decode(latent, return_dict=False, generator=None),
    }
    if type(pipe).__name__.removeprefix("ORT") in TEXT_TO_IMAGE:
        parts |= {image_part(count): partial(image, count) for count in job["steps"]}
    return {name: partial(without_grad, part) for name, part in parts.items()}


def _scheduler(name: str, base: Mapping[str, Any]) -> Any:
    """diffusers' scheduler for one of this project's sampler names."""
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


def _conditioning(pipe: Any, kind: Any) -> dict[str, Any]:
    """Noise in place of two prompts, and all else as for an image: otherwise a compiled UNet would
    be compiled a second time.
    """
    import torch

    config, tokens = pipe.unet.config, pipe.tokenizer.model_max_length
    conditioning: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(2, tokens, config.cross_attention_dim).to(kind),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
        "return_dict": False,
    }
    if width := getattr(config, "time_cond_proj_dim", None):
        conditioning["timestep_cond"] = torch.ones(2, width, dtype=kind)
    if getattr(config, "addition_embed_type", None) == "text_time":
        ids = 6 * config.addition_time_embed_dim
        pooled = torch.randn(2, config.projection_class_embeddings_input_dim - ids).to(kind)
        sizes = torch.ones(2, 6, dtype=kind)
        conditioning["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return conditioning
