"""Own networks against diffusers', with the same random weights."""

import pytest
import torch
from unet_configs import FAMILIES, THREE, XL

from sdrt.errors import CheckpointError
from sdrt.export.tiny_vae import (
    AutoencoderTiny,
    TinyVaeConfig,
    TinyVaeDecoder,
    TinyVaeEncoder,
)
from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig
from sdrt.export.vae import AutoencoderKL, VaeConfig, VaeDecoder, VaeEncoder

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_is_the_reference(family):
    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(**{**THREE, **FAMILIES[family]}).eval()
    own = Unet(UnetConfig.from_json(dict(reference.config)))
    own.load_state_dict(reference.state_dict())
    sample = torch.randn(2, reference.config.in_channels, 8, 12)
    timestep, context = torch.tensor([3.0, 700.0]), torch.randn(2, 7, 12)
    pooled, time_ids = torch.randn(2, 6), torch.tensor([[1024.0, 768, 0, 8, 512, 512]] * 2)
    time_ids[1] += 100.0
    added = {"text_embeds": pooled, "time_ids": time_ids}
    condition = torch.randn(2, 10) if "time_cond_proj_dim" in FAMILIES[family] else None
    with torch.no_grad():
        expected = reference(sample, timestep, context, None, condition, added_cond_kwargs=added)
        extra = (pooled, time_ids) if "addition_embed_type" in FAMILIES[family] else (None, None)
        actual = own(sample, timestep, context, *extra, condition)
        assert relative(actual, expected.sample) <= 1e-5


def test_vae_is_the_reference():
    torch.manual_seed(0)
    reference = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()
    own = AutoencoderKL(VaeConfig.from_json(dict(reference.config)))
    own.load_state_dict(reference.state_dict())
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = reference.encode(image).latent_dist
        scale = reference.config.scaling_factor
        mean, std = VaeEncoder(own)(image)
        assert relative(mean, posterior.mean * scale) <= 1e-5
        assert relative(std, posterior.std * scale) <= 1e-5
        expected = reference.decode(posterior.mean).sample
        assert relative(VaeDecoder(own)(posterior.mean * scale), expected) <= 1e-5


def test_tiny_vae_is_the_reference():
    torch.manual_seed(0)
    reference = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    ).eval()
    own = AutoencoderTiny(TinyVaeConfig.from_json(dict(reference.config)))
    own.load_state_dict(reference.state_dict())
    image, latents = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, 4, 4, 6) * 3
    with torch.no_grad():
        mean, std = TinyVaeEncoder(own)(image)
        assert relative(mean, reference.encode(image).latents) <= 1e-5 and not std.any()
        assert relative(TinyVaeDecoder(own)(latents), reference.decode(latents).sample) <= 1e-5
    with torch.device("meta"):
        full = AutoencoderTiny(TinyVaeConfig())
    assert set(full.state_dict()) == set(diffusers.AutoencoderTiny().state_dict())


# Published configurations, as far as they differ from the first, and what they weigh.
PUBLISHED = {
    "1.5": ({"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964),
    "1.5 inpainting": ({"in_channels": 9}, 859_535_364),
    "2.1": (
        {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
            "sample_size": 96,
        },
        865_910_724,
    ),
    "XL": (
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "upcast_attention": None,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
    ),
    "bk-sdm small": ({"layers_per_block": 1, "mid_block_type": None}, 482_346_884),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_size(name):
    published, weights = PUBLISHED[name]
    with torch.device("meta"):
        unet = Unet(UnetConfig.from_json(published))
        reference = diffusers.UNet2DConditionModel(
            **{"cross_attention_dim": 768, "attention_head_dim": 8, **published}
        )
    assert set(unet.state_dict()) == set(reference.state_dict())
    assert sum(p.numel() for p in unet.parameters()) == weights


@pytest.mark.parametrize(
    "extra",
    [
        {"dual_cross_attention": True},
        {"made_up_key": 1},
        {"addition_embed_type": "image"},
        {**XL, "projection_class_embeddings_input_dim": None},
    ],
)
def test_what_is_not_understood_is_refused_by_name(extra):
    named = "addition_embed_type" if "addition_embed_type" in extra else next(iter(extra))
    with pytest.raises(CheckpointError, match=named):
        UnetConfig.from_json(extra)
