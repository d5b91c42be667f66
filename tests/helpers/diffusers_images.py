"""diffusers' own images of a tiny checkpoint, and how far ours are from them."""

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

PROMPT = "a red circle on a blue background"
STEPS, SIDE = 6, 32
BLOCKS = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
PADS = {"text_encoder": "<|endoftext|>", "text_encoder_2": "!"}


def load_parts(checkpoint):
    """The parts of a pipeline by their names, of one text encoder or of two."""
    vae = diffusers.AutoencoderKL.from_config(
        BLOCKS | diffusers.AutoencoderKL.load_config(checkpoint / "vae")
    )
    vae.load_state_dict(load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors"))
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    parts = {"vae": vae.eval(), "unet": unet.eval()}
    for name in (name for name in ENCODERS if (checkpoint / name).is_dir()):
        tokenizer = name.replace("text_encoder", "tokenizer")
        parts[name] = getattr(transformers, ENCODERS[name]).from_pretrained(checkpoint / name)
        parts[name].eval()
        parts[tokenizer] = transformers.CLIPTokenizer.from_pretrained(
            str(checkpoint / tokenizer), pad_token=PADS[name], model_max_length=32
        )
    return parts


def diffusers_image(kind, parts, own, seed, *, nets, **arguments):
    """[H, W, 3] in [0, 1] of a pipeline of this class, with the scheduler of ours."""
    unchecked = dict.fromkeys(("safety_checker", "feature_extractor"))
    unchecked["requires_safety_checker"] = False
    options = {} if "text_encoder_2" in parts else unchecked
    config = own.scheduler_config
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipe = getattr(diffusers, kind)(**parts, **options, scheduler=scheduler, **nets)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": PROMPT, "num_inference_steps": STEPS, **arguments}
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(generator=generator, output_type="np", **arguments).images[0]


def decibels(own, reference, seed, prompt=PROMPT, **options):
    """Of our image against diffusers', peak signal to noise."""
    *_, last = own.steps(prompt, **{"num_inference_steps": STEPS, "seed": seed, **options})
    actual = np.clip(own.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)
    return 10 * np.log10(1.0 / max(np.mean((actual.astype(np.float64) - reference) ** 2), 1e-12))


def noise(seed, side=SIDE):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8))


def left_half(side=SIDE):
    """A mask."""
    light = np.zeros((side, side), np.uint8)
    light[side // 4 : -side // 4, : side // 2] = 255
    return Image.fromarray(light)
