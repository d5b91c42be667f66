"""What users would run instead, on the bundle's own checkpoint, and the parts that can be timed.

Knows the peers' interfaces; imported in a worker only, and a peer only where it is installed.
"""

import io
import json
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdrt.bench.worker import PROMPT, Part, Spent, Timed, picture_of
from sdrt.bundle import Bundle, open_bundle, parse_size
from sdrt.engine.cpu import has_bf16
from sdrt.engine.selection import installed
from sdrt.runtime.samplers.registry import config_from_name

TEXT_TO_IMAGE = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
CPP = "pip install stable-diffusion-cpp-python"
GENAI = "pip install openvino-genai openvino-tokenizers diffusers torch"
CPP_WIDTHS = [320, 640, 1280, 1280]
OPTIMUM = "pip install 'optimum-onnx[onnxruntime]' 'diffusers<0.36'"


def checkpoint_folder(bundle: Bundle) -> Path | None:
    """Where the bundle's checkpoint lies, if it is a folder that the reference library reads."""
    source = bundle.manifest.source
    shipped = Path(__file__).parents[2] / "models" / source
    for folder in (shipped, Path(source).expanduser()):
        if (folder / "model_index.json").is_file():
            return folder
    return None


def peers(bundle: Bundle, compiled: bool) -> dict[str, tuple[str, str, str | None]]:
    """Every peer's name: its backend and precision, and why it is left out, or None."""
    found = checkpoint_folder(bundle)
    away = None if found else f"its checkpoint {bundle.manifest.source} is away"
    library = away or (None if installed("diffusers") else "pip install diffusers torch")
    lower = library or (None if has_bf16() else "this processor has no bf16")
    slow = lower or (None if compiled else "takes minutes; --compiled measures it")
    both = installed("optimum") and find_spec("optimum.onnxruntime") is not None
    exported = away or (None if both else OPTIMUM)
    return {
        "reference fp32": ("reference", "float32", library),
        "reference bf16": ("reference", "bfloat16", lower),
        "reference bf16 compiled": ("reference", "compiled", slow),
        "optimum onnxruntime": ("optimum", "exact", exported),
        "stable-diffusion.cpp": ("stable-diffusion.cpp", "stored", away or _not_cpp(found)),
        "OpenVINO GenAI": ("openvino-genai", "preferred", away or _not_genai(found)),
    }


def _not_cpp(folder: Path | None) -> str | None:
    """Why stable-diffusion.cpp cannot run a checkpoint, if one is here."""
    config = json.loads((folder / "unet" / "config.json").read_text()) if folder else {}
    if config.get("block_out_channels") != CPP_WIDTHS:
        return "it takes every UNet for one of the published widths, which this has not"
    return _not_native(folder) or (None if installed("stable_diffusion_cpp") else CPP)


def _not_genai(folder: Path | None) -> str | None:
    """Why OpenVINO GenAI, or the export for it, cannot run a checkpoint, if one is here."""
    needed = ("openvino_genai", "openvino_tokenizers", "diffusers", "torch")
    return _not_native(folder) or (None if all(map(installed, needed)) else GENAI)


def _not_native(folder: Path | None) -> str | None:
    index = json.loads((folder / "model_index.json").read_text()) if folder else {}
    kind = index.get("_class_name")
    return None if kind == TEXT_TO_IMAGE[0] else f"it is measured with {TEXT_TO_IMAGE[0]} only"


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
    return _parts(pipe, kind, wanted, spent)


def _checks(checkpoint: Path) -> bool:
    return "safety_checker" in json.loads((checkpoint / "model_index.json").read_text())


def optimum(folder: str, wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
    """Optimum's pipeline over ONNX Runtime, of its own export."""
    import torch
    from optimum.onnxruntime import ORTPipelineForText2Image

    pipe = ORTPipelineForText2Image.from_pretrained(str(checkpoint_of(folder)), export=True)
    return _parts(pipe, torch.float32, wanted, spent)


def _parts(pipe: Any, kind: Any, wanted: Mapping[str, Any], spent: Spent) -> dict[str, Part]:
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
