"""The network of unconditional pipelines against diffusers', same random weights."""

import pytest
import torch
from pixel_configs import DDPM, SMALL

from sdrt.errors import CheckpointError
from sdrt.export.pixel_unet import PixelUnet, PixelUnetConfig

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")

FAMILIES = {
    "ddpm": DDPM,
    "trained with today's defaults": {"attention_head_dim": 8},
    "several heads": {"attention_head_dim": 4, "layers_per_block": 1},
    "no attention in the middle": {"add_attention": False},
    "no middle": {"mid_block_type": None},
    "attention at both ends": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
    "grey": {"in_channels": 1, "out_channels": 1},
}
# The published configurations beyond `DDPM`, and the side of their images.
CAT = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
PUBLISHED = {
    "google/ddpm-cat-256": (CAT, 113_673_219),
    "google/ddpm-celebahq-256": (CAT, 113_673_219),
    "google/ddpm-cifar10-32": (
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * 2),
            "up_block_types": (*["UpBlock2D"] * 2, "AttnUpBlock2D", "UpBlock2D"),
        },
        35_746_307,
    ),
}


def largest_error(options, batch):
    torch.manual_seed(0)
    reference = diffusers.UNet2DModel(**options).eval()
    own = PixelUnet(PixelUnetConfig.from_json(dict(reference.config)))
    own.load_state_dict(reference.state_dict())
    side = reference.config.sample_size
    sample = torch.randn(batch, reference.config.in_channels, side, side)
    timestep = torch.tensor([700.0, 3.0])[:batch]
    with torch.no_grad():
        expected = reference(sample, timestep).sample
        actual = own(sample, timestep)
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_reference(family):
    assert largest_error({**SMALL, **FAMILIES[family]}, batch=2) <= 1e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_size(name):
    options, weights = PUBLISHED[name]
    with torch.device("meta"):
        reference = diffusers.UNet2DModel(**DDPM, **options)
        own = PixelUnet(PixelUnetConfig.from_json(dict(reference.config)))
    assert set(own.state_dict()) == set(reference.state_dict())
    assert sum(p.numel() for p in own.parameters()) == weights


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_reference(name):
    assert largest_error({**DDPM, **PUBLISHED[name][0]}, batch=1) <= 1e-5


@pytest.mark.parametrize(
    "extra",
    [
        {"time_embedding_type": "fourier"},
        {"num_class_embeds": 10},
        {"down_block_types": ["SkipDownBlock2D"]},
        {"out_channels": 6},
        {"made_up_key": 1},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_is_not_understood_is_refused_by_name(extra):
    expected = {"down_block_types": "SkipDownBlock2D", "out_channels": "6 out"}
    key = next(iter(extra))
    with pytest.raises(CheckpointError, match=expected.get(key, key)):
        PixelUnetConfig.from_json(extra)
