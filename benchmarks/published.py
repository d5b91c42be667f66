"""Published configurations, checkpoints and bundles of them with random weights, whose values do
not change the speed, and diffusers' pipeline of a checkpoint.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdrt.bundle import open_bundle

TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
XL_TEXT_2 = {
    **TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
XL_UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
XL_REFINER_UNET = {
    **XL_UNET,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}

RESIDUAL = ("to_out.0.weight", "ff.net.2.weight", "proj_out.weight", "conv2.weight")

PARTS = {
    "scheduler": "PNDMScheduler",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}


def write_checkpoint(folder: Path, divisor: int = 1, xl: bool = False) -> None:
    """Stable Diffusion 1.5 with random fp16 weights of a scale that keeps activations tame, as the
    reference library writes a folder. The words of its tokenizer are those of `shapes`.

    divisor: of all widths but the text encoder's, such as 4 for a model of a sixteenth of the work
    xl: SDXL instead
    """
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    import sdrt
    from sdrt.export.single_file.config import FAMILIES
    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig
    from sdrt.export.vae import AutoencoderKL, VaeConfig

    torch.manual_seed(0)
    shapes = Path(sdrt.__file__).parent / "models" / "shapes"
    shutil.copytree(shapes / "tokenizer", folder / "tokenizer")
    said = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer" / "tokenizer_config.json", {**said, "model_max_length": 77})
    words = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    unused = {f"<{number}>": number for number in range(len(words), TEXT["vocab_size"])}
    write_json(folder / "tokenizer" / "vocab.json", {**words, **unused})
    index: dict[str, Any] = {name: [library_of(kind), kind] for name, kind in PARTS.items()}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    write_json(folder / "model_index.json", index)
    scheduler = {**FAMILIES[0].scheduler, "_class_name": PARTS["scheduler"]}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    CLIPTextModel(CLIPTextConfig(**TEXT)).half().save_pretrained(folder / "text_encoder")
    for part, config, kind, configured in (
        ("unet", xl_unet_config(divisor) if xl else unet_config(divisor), Unet, UnetConfig),
        ("vae", vae_config(divisor), AutoencoderKL, VaeConfig),
    ):
        write_json(folder / part / "config.json", config)
        with torch.device("meta"):
            module = kind(configured.from_json(config)).half()
        weights = module.to_empty(device="cpu").state_dict()
        for name, weight in weights.items():
            if weight.ndim > 1:
                scale = weight[0].numel() ** -0.5
                if xl and name.endswith(RESIDUAL):  # 70 blocks' sums, in which errors grow too
                    scale /= 4.0
                weight.uniform_(-1.0, 1.0).mul_(scale)
            else:  # engines drop what only adds zeros or multiplies by one
                middle = float("norm" in name and name.endswith("weight"))
                weight.uniform_(middle - 0.05, middle + 0.05)
        save_file(weights, folder / part / "diffusion_pytorch_model.safetensors")
    if xl:
        _add_second_text_encoder(folder)


def _add_second_text_encoder(folder: Path) -> None:
    """Make a folder that of SDXL, whose text encoders and tokenizers are two."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    second = CLIPTextModelWithProjection(CLIPTextConfig(**XL_TEXT_2)).half()
    second.save_pretrained(folder / "text_encoder_2")
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | {"_class_name": "StableDiffusionXLPipeline"}
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    index["tokenizer_2"] = index["tokenizer"]
    write_json(path, {**index, "force_zeros_for_empty_prompt": True})


def library_of(kind: str) -> str:
    return "transformers" if kind.startswith("CLIP") else "diffusers"


def unet_config(divisor: int = 1) -> dict[str, Any]:
    return {
        "_class_name": PARTS["unet"],
        "cross_attention_dim": 768,
        "sample_size": 64,
        "block_out_channels": [width // divisor for width in (320, 640, 1280, 1280)],
        "norm_num_groups": 32 // divisor,
    }


def xl_unet_config(divisor: int = 1) -> dict[str, Any]:
    return {
        **XL_UNET,
        "_class_name": PARTS["unet"],
        "block_out_channels": [width // divisor for width in (320, 640, 1280)],
        "norm_num_groups": 32 // divisor,
    }


def vae_config(divisor: int = 1) -> dict[str, Any]:
    return {
        "_class_name": PARTS["vae"],
        "block_out_channels": [width // divisor for width in (128, 256, 512, 512)],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32 // divisor,
        "sample_size": 512,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def made_checkpoint(folder: Path, divisor: int = 1, xl: bool = False) -> Path:
    """A checkpoint in `model`, made once for a folder, in a process of its own so that this one
    stays small.
    """
    model = folder / "model"
    if not (model / "vae" / "diffusion_pytorch_model.safetensors").exists():
        write = [sys.executable, __file__, str(model), str(divisor), *(["xl"] if xl else [])]
        subprocess.run(write, check=True)
    return model


def made_bundle(
    folder: Path, sizes: Sequence[str], *options: str, divisor: int = 1, xl: bool = False
) -> Path:
    """That checkpoint's bundle in `bundle`, made once for a folder."""
    model, bundle = made_checkpoint(folder, divisor, xl), folder / "bundle"
    if not (bundle / "sdrt.json").exists():
        command = [sys.executable, "-m", "sdrt", "build", "--model", str(model)]
        command += [*options, "--output", str(bundle)]
        for size in sizes:
            command += ["--size", size]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    kind = open_bundle(bundle).manifest.components["unet"].dtype
    if (kind == "float16") != ("--fp16" in options):
        sys.exit(f"{bundle} is of {kind}, which is not what is measured here: name another folder")
    return bundle


def reference_pipeline(checkpoint: Path, dtype: str) -> Any:
    """diffusers' pipeline of a checkpoint's folder, as its users load it; it shows no
    progress.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(checkpoint).to(dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), int(sys.argv[2]), "xl" in sys.argv[3:])
