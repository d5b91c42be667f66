"""`sdrt build --ip-adapter`: bundles of tiny adapters against diffusers and transformers."""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from ip_adapters import KINDS, load_reference, write_ip_adapter
from safetensors.torch import load_file
from unet_configs import THREE

from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import IP_ADAPTER_KV
from sdrt.cli.main import main
from sdrt.engine import select_backend
from sdrt.errors import CheckpointError, UsageError
from sdrt.export.ip_adapter_bundle import IpAdapterBuildPlan, build_ip_adapter_bundle

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**THREE).eval()


def build(file, encoder, output):
    return build_ip_adapter_bundle(IpAdapterBuildPlan(file, encoder, output))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_becomes_keys_and_values_as_in_diffusers(unet, kind, tmp_path):
    file, encoder = write_ip_adapter(tmp_path, kind, unet)
    bundle = open_bundle(build(file, encoder, tmp_path / "bundle"))
    pixels = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
    load = select_backend("onnxruntime").load
    image = load(bundle, "image_encoder")({"pixels": pixels})["image"]
    actual = load(bundle, "ip_adapter")({"image": image})[IP_ADAPTER_KV]
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(encoder).eval()
    reference = load_reference(unet, load_file(file))
    with torch.no_grad():
        output = model(torch.from_numpy(pixels), output_hidden_states=True)
        states = output.image_embeds if kind == "base" else output.hidden_states[-2]
        tokens = reference.encoder_hid_proj.image_projection_layers[0](states)
        processors = [p for n, p in reference.attn_processors.items() if "attn2" in n]
        expected = [layer[0](tokens) for p in processors for layer in (p.to_k_ip, p.to_v_ip)]
    np.testing.assert_allclose(actual, torch.cat(expected, dim=-1), atol=2e-5)


@pytest.mark.parametrize("option", ["--size", "--batch"])
@pytest.mark.parametrize("source", ["--ip-adapter", "--upscaler"])
def test_options_of_models_are_refused_by_name(capsys, source, option):
    value = {"--size": "64x64", "--batch": "auto"}[option]
    assert main(["build", source, "file.safetensors", option, value]) == UsageError.exit_code
    assert f"{option} is an option of models" in capsys.readouterr().err


def test_bad_input_leaves_nothing_behind(unet, tmp_path):
    file, encoder = write_ip_adapter(tmp_path, "base", unet)
    output = tmp_path / "bundle"
    with pytest.raises(UsageError, match="image encoder"):
        build(file, None, output)
    pickle = file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="pickle"):
        build(pickle, encoder, output)
    assert not output.exists()
