"""IP-Adapter's networks against diffusers' and transformers', with the same random weights."""

import pytest
import torch
from ip_adapters import ENCODER, KINDS, image_states, ip_adapter_weights, load_reference
from unet_configs import THREE

from sdrt.errors import CheckpointError
from sdrt.export.ip_adapter import build_ip_adapter, read_image_encoder_config

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**THREE).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_the_reference(unet, kind):
    weights = ip_adapter_weights(kind, unet)
    adapter = build_ip_adapter(weights)
    reference = load_reference(unet, weights)
    torch.manual_seed(2)
    image = image_states(adapter.config)
    with torch.no_grad():
        tokens = reference.encoder_hid_proj.image_projection_layers[0](image)
        processors = [p for n, p in reference.attn_processors.items() if "attn2" in n]
        expected = [layer[0](tokens) for p in processors for layer in (p.to_k_ip, p.to_v_ip)]
        actual = adapter(image)
    assert adapter.config.projection == kind
    torch.testing.assert_close(actual, torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)


def test_an_image_encoder_must_be_the_adapters(unet):
    config = build_ip_adapter(ip_adapter_weights("base", unet)).config
    assert read_image_encoder_config(ENCODER, config).projection_dim == config.embedding
    with pytest.raises(CheckpointError, match=r"24.*18"):
        read_image_encoder_config({**ENCODER, "projection_dim": 24}, config)
    with pytest.raises(CheckpointError, match="siglip"):
        read_image_encoder_config({**ENCODER, "model_type": "siglip_vision_model"}, config)


BROKEN = {
    "a UNet's": (lambda w: {"conv_in.weight": torch.zeros(1)}, "no IP-Adapter"),
    "FaceID": (lambda w: {**w, "ip_adapter.1.to_k_lora.down.weight": torch.zeros(1)}, "FaceID"),
    "no value": (lambda w: {n: t for n, t in w.items() if n != LAST}, "to_v_ip"),
    "other shape": (lambda w: {**w, "image_proj.norm.bias": torch.zeros(3)}, "norm.bias"),
    "extra": (lambda w: {**w, "image_proj.more": torch.zeros(3)}, "more"),
    "other width": (lambda w: {**w, LAST: torch.zeros(32, 5)}, "width"),
    "unknown": (lambda w: {**w, "image_proj.proj.weight": None}, "unknown image projection"),
}
LAST = "ip_adapter.11.to_v_ip.weight"


@pytest.mark.parametrize("broken", BROKEN)
def test_files_that_do_not_fit_are_refused_by_name(unet, broken):
    change, message = BROKEN[broken]
    weights = ip_adapter_weights("base", unet)
    changed = {name: tensor for name, tensor in change(weights).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        build_ip_adapter(changed)
