"""Control bundles: every engine's outputs are diffusers', and what a user sees of them."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from control_nets import tiny_adapter, tiny_controlnet
from exports import built_control

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.store import bundles_folder, find_bundle
from sdrt.cli.main import main
from sdrt.engine import select_backend
from sdrt.errors import BundleError, ParityError
from sdrt.export.controlnet import ControlNet
from sdrt.runtime.reference_outputs import component_inputs

pytestmark = pytest.mark.exports
BACKENDS = ("onnxruntime", "openvino", "torch")


@pytest.fixture(scope="module")
def nets(tiny, home):
    """diffusers' nets by the names of their bundles."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny, subfolder="unet")
    nets = {
        "edges": tiny_controlnet(unet, controlnet_conditioning_channel_order="bgr"),
        "mixed": tiny_controlnet(unet, 1, global_pool_conditions=True),
        "sketch": tiny_adapter((8, 16)),
    }
    for name, net in nets.items():
        net.save_pretrained(home / "nets" / name)
        built_control(str(home / "nets" / name), name=name, sizes=((48, 32),))
    yield nets
    for name in nets:
        main(["remove", name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["edges", "mixed", "sketch"])
def test_every_engine_is_diffusers(nets, name, backend):
    bundle = open_bundle(name)
    exact = replace(bundle, manifest=replace(bundle.manifest, admitted={}))
    part = exact.manifest.control_net
    feeds = component_inputs(exact.manifest, part)
    actual = select_backend(backend).load(exact, part)(feeds)
    tensors = {key: torch.from_numpy(value.copy()) for key, value in feeds.items()}
    with torch.no_grad():
        image = tensors.pop("control_image")
        if name == "sketch":
            expected = nets[name](image)
        else:
            inputs = (tensors[key] for key in ("sample", "timestep", "context"))
            down, mid = nets[name](*inputs, image, return_dict=False)
            expected = [*down, mid]
    assert len(actual) == len(expected)
    for own, reference in zip(actual.values(), expected, strict=True):
        assert own.shape == tuple(reference.shape)
        assert np.abs(own - reference.numpy()).max() <= 2e-5 * float(reference.abs().max())


def test_its_outputs_are_named_and_shaped_as_the_unets_inputs(nets, tiny_bundle):
    unet = open_bundle(tiny_bundle).manifest.components["unet_control"]
    inputs = {spec.name: spec.shape for spec in unet.inputs}
    for name, pooled in (("edges", False), ("mixed", True), ("sketch", False)):
        manifest = open_bundle(name).manifest
        for spec in manifest.components[manifest.control_net].outputs:
            assert spec.shape[:2] == inputs[spec.name][:2]
            assert (spec.shape[2:] == (1, 1)) == pooled


def test_it_is_listed_and_verified_but_makes_no_image_alone(nets, capsys):
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["edges"]["control"] == "controlnet" and rows["sketch"]["control"] == "t2i_adapter"
    assert rows["edges"]["family"] == "Stable Diffusion 1.x"
    assert main(["list"]) == 0
    assert "T2I-Adapter for Stable Diffusion 1.x or 2.x" in capsys.readouterr().out
    assert main(["verify", "--bundle", "edges"]) == 0
    assert main(["inspect", "--bundle", "sketch"]) == 0
    assert "t2i_adapter" in capsys.readouterr().out
    assert main(["use", "edges"]) != 0
    assert main(["run", "a red circle", "--bundle", "edges"]) != 0
    assert "is a control bundle" in capsys.readouterr().err
    assert not {info.name for info in sdrt.bundles()} & set(nets)
    assert find_bundle(None).name not in nets
    assert (bundles_folder() / "edges").is_dir()


def test_options_of_models_are_refused(capsys):
    for option in (["--vae", "x"], ["--lora", "x"], ["--feature-reuse"], ["--batch", "auto"]):
        assert main(["build", "--controlnet", "nowhere", *option]) == 2
    assert main(["build", "--controlnet", "nowhere"]) != 0
    assert "no ControlNet at" in capsys.readouterr().err


@pytest.mark.slow
def test_a_net_that_is_not_torchs_is_not_published(nets, home, tmp_path, monkeypatch):
    complete = ControlNet.forward

    def forward(self, **inputs):
        return tuple(1.01 * residual for residual in complete(self, **inputs))

    built_control(str(home / "nets" / "edges"), tmp_path / "good", sizes=((48, 32),))
    monkeypatch.setattr(ControlNet, "forward", forward)
    with pytest.raises(ParityError, match="controlnet differs from torch"):
        built_control(str(home / "nets" / "edges"), tmp_path / "bad", sizes=((48, 32),))
    assert not (tmp_path / "bad").exists()


def test_a_net_is_no_model(nets):
    with pytest.raises(BundleError, match="makes no image alone"):
        sdrt.load("edges")
