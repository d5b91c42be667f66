"""Configurations as the installed diffusers writes them, and what training leaves in them."""

import inspect
import json
import logging
import shutil

import diffusers
import pytest
import torch

from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.model_spec import read_model_spec
from sdrt.export.pixel_unet import PixelUnetConfig
from sdrt.export.tiny_vae import TinyVaeConfig
from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig
from sdrt.export.vae import VaeConfig
from sdrt.runtime.samplers.registry import SAMPLERS
from sdrt.runtime.samplers.table import sampler_table

NETWORKS = {
    "UNet2DConditionModel": UnetConfig,
    "UNet2DModel": PixelUnetConfig,
    "AutoencoderKL": VaeConfig,
    "AutoencoderTiny": TinyVaeConfig,
}


def defaults(kind):
    parameters = inspect.signature(kind.__init__).parameters.items()
    inputs = {k: p.default for k, p in parameters if p.default is not inspect.Parameter.empty}
    return json.loads(json.dumps(inputs))


@pytest.mark.reference
@pytest.mark.parametrize("name", NETWORKS)
def test_every_default_of_a_network_is_accepted(name):
    """All together, and each alone, as files of other releases leave some away."""
    inputs = defaults(getattr(diffusers, name))
    NETWORKS[name].from_json({**inputs, "_use_default_values": list(inputs)})
    for key, value in inputs.items():
        NETWORKS[name].from_json({key: value})


@pytest.mark.reference
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_default_of_a_scheduler_is_accepted(name, caplog):
    config = dict(getattr(diffusers, name)().config)
    sampler_table({**json.loads(json.dumps(config)), "_class_name": name}, 4)
    assert "ignored scheduler options" not in caplog.text


@pytest.mark.reference
def test_what_is_off_may_be_false_or_null_and_dropout_is_for_training():
    stages = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    stages |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    stages |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "dropout": 0.1}
    stages |= {"only_cross_attention": (False, False), "mid_block_only_cross_attention": False}
    stages |= {"dual_cross_attention": None, "resnet_skip_time_act": None}
    reference = diffusers.UNet2DConditionModel(**stages)
    actual = UnetConfig.from_json(json.loads(reference.to_json_string()))
    assert Unet(actual).state_dict().keys() == reference.state_dict().keys()
    for key in ("only_cross_attention", "mid_block_only_cross_attention"):
        for value in (True, (False, True)):
            with pytest.raises(CheckpointError, match=key):
                UnetConfig.from_json({key: value})


@pytest.mark.reference
@pytest.mark.parametrize("name", NETWORKS)
def test_what_training_leaves_is_ignored_and_said(name, caplog):
    from diffusers.training_utils import EMAModel  # seconds, which the other workers do not need

    caplog.set_level(logging.DEBUG, "sdrt.build")
    left = EMAModel([torch.nn.Parameter(torch.zeros(1))], use_ema_warmup=True).state_dict()
    del left["shadow_params"]
    left |= {"_name_or_path": "x", "_commit_hash": None, "torch_dtype": "float16"}
    NETWORKS[name].from_json(left)
    assert all(key in caplog.text for key in left)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("key", ["quantization_config", "a_new_layer"])
def test_what_is_unknown_is_refused_by_name(name, key):
    with pytest.raises(CheckpointError, match=key):
        NETWORKS[name].from_json({key: {"bits": 8}})


@pytest.mark.parametrize(
    ("written", "size"), [(4, (32, 32)), ([4, 6], (48, 32)), (None, (512, 512))]
)
def test_sample_size_is_a_side_or_two_or_not_said(tiny, tmp_path, written, size):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": written}))
    assert read_model_spec(find_checkpoint(str(folder))).native_size == size
