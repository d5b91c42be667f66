"""Tiny pipelines of every family, saved by the installed diffusers and transformers."""

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.attention_processor import Attention

PROMPT, NEGATIVE = "a red <zorb> circle on blue!", "an orange triangle, blurry!"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KNOWN = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def text_encoder(kind="CLIPTextModel", **options):
    config = {"vocab_size": 609, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    config |= {"bos_token_id": 606, "eos_token_id": 607, "pad_token_id": 607, **options}
    torch.manual_seed(0)  # parts alike of several families are exported once
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**config))


def unet(**options):
    config = {"sample_size": 4, "block_out_channels": (8, 16), "layers_per_block": 1}
    config |= {"norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2}
    config |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    config |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **options}
    torch.manual_seed(0)
    result = diffusers.UNet2DConditionModel(**config)
    for layer in result.modules():  # so that what the prompt says is seen
        if isinstance(layer, Attention) and layer.is_cross_attention:
            layer.to_out[0].weight.data *= 40
    if result.time_embedding.cond_proj is not None:
        result.time_embedding.cond_proj.weight.data *= 20
    return result


def vae():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=32,
    )


def tiny_vae():
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
    counts = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    result = diffusers.AutoencoderTiny(**widths, **counts)
    result.decoder.layers[-1].weight.data *= 8  # else its images are nearly one grey
    return result


def tokenizer(embedded, pad="<|endoftext|>"):
    """The embedded model's, with a word that textual inversion might have added."""
    result = transformers.CLIPTokenizer.from_pretrained(str(embedded / "tokenizer"), pad_token=pad)
    result.add_tokens(["<zorb>"])
    return result


def pipeline(embedded, kind="StableDiffusionPipeline", pad="<|endoftext|>", **parts):
    usual = {"tokenizer": tokenizer(embedded, pad), "vae": vae()}
    usual |= {"unet": unet(), "text_encoder": text_encoder()}
    usual["scheduler"] = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, kind)(**{**usual, **none, **parts})


def first(embedded):
    return pipeline(embedded)


def second(embedded):
    """As 2.x at 768 pixels: OpenCLIP's encoder, which pads with a mark, and v-prediction."""
    return pipeline(
        embedded,
        pad="!",
        text_encoder=text_encoder(hidden_act="gelu", num_hidden_layers=3),
        unet=unet(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True),
        scheduler=diffusers.DDIMScheduler(**BETAS, **KNOWN, prediction_type="v_prediction"),
    )


def distilled(embedded, **parts):
    return pipeline(
        embedded,
        "LatentConsistencyModelPipeline",
        **parts,
        unet=unet(time_cond_proj_dim=32),
        scheduler=diffusers.LCMScheduler(**BETAS, original_inference_steps=50),
    )


def xl(embedded):
    wide = {"hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu", "num_hidden_layers": 3}
    result = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=40,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=68,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder("CLIPTextModelWithProjection", **wide),
        tokenizer=tokenizer(embedded),
        tokenizer_2=tokenizer(embedded, "!"),
        unet=result,
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1),
        add_watermarker=False,
    )


def with_tiny_vae(embedded):
    return pipeline(embedded, vae=tiny_vae())


FAMILIES = {"1.x": first, "2.x": second, "LCM": distilled, "XL": xl, "tiny VAE": with_tiny_vae}


def saved(embedded, folder, family, **parts):
    """The reference pipeline, and the folder that it saves itself in."""
    reference = FAMILIES[family](embedded, **parts)
    reference.save_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return reference


def psnr(one, other):
    difference = (np.asarray(one, np.float64) - np.asarray(other, np.float64)) / 255
    return 10 * np.log10(1 / max((difference**2).mean(), 1e-12))


def generate_image(reference, seed, **options):
    if isinstance(reference, diffusers.LatentConsistencyModelPipeline):
        options.pop("negative_prompt", None)  # it takes none
    generator = torch.Generator().manual_seed(seed)
    return reference(PROMPT, generator=generator, **options).images[0]
