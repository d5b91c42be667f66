"""Names of the original layout against the published ones, over all of Stable Diffusion 1.x."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.original_layout import PREFIXES, converted, unet_name, vae_name
from sdrt.export.unet import Unet, UnetConfig
from sdrt.export.vae import AutoencoderKL, VaeConfig


def original_unet_names():
    """Every weight name of the original UNet, spelled out from its configuration."""
    resnet = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    block = [f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")]
    transformer = ["norm", "proj_in", "proj_out"]
    transformer += [f"transformer_blocks.0.{p}" for p in (*block, "ff.net.0.proj", "ff.net.2")]
    transformer += [f"transformer_blocks.0.norm{i}" for i in (1, 2, 3)]
    layers = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    for n in range(1, 12):
        if n % 3 == 0:
            layers.append(f"input_blocks.{n}.0.op")
            continue
        layers += [f"input_blocks.{n}.0.{p}" for p in resnet]
        layers += [f"input_blocks.{n}.0.skip_connection"] if n in (4, 7) else []
        layers += [f"input_blocks.{n}.1.{p}" for p in transformer] if n < 9 else []
    layers += [f"middle_block.{n}.{p}" for n in (0, 2) for p in resnet]
    layers += [f"middle_block.1.{p}" for p in transformer]
    for n in range(12):
        layers += [f"output_blocks.{n}.0.{p}" for p in (*resnet, "skip_connection")]
        layers += [f"output_blocks.{n}.1.{p}" for p in transformer] if n > 2 else []
        layers += [f"output_blocks.{n}.{1 if n == 2 else 2}.conv"] if n in (2, 5, 8) else []
    bare = tuple(f"attn{i}.to_{p}" for i in (1, 2) for p in "qkv")
    return [f"{x}.weight" for x in layers] + [f"{x}.bias" for x in layers if not x.endswith(bare)]


def test_every_unet_name_is_converted():
    with torch.device("meta"):
        published = set(Unet(UnetConfig()).state_dict())
    assert {unet_name(name) for name in original_unet_names()} == published


def original_vae_name(name):
    """The other direction, written independently of the code under test."""
    if "quant_conv" in name:
        return name
    side, _, rest = name.partition(".")
    rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for i in range(4):
        for j in range(3):
            rest = rest.replace(f"down_blocks.{i}.resnets.{j}", f"down.{i}.block.{j}")
            rest = rest.replace(f"up_blocks.{i}.resnets.{j}", f"up.{3 - i}.block.{j}")
        rest = rest.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
        rest = rest.replace(f"up_blocks.{i}.upsamplers.0", f"up.{3 - i}.upsample")
    rest = rest.replace("mid_block.resnets.0", "mid.block_1").replace(
        "mid_block.resnets.1", "mid.block_2"
    )
    for new, old in {
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "group_norm": "norm",
    }.items():
        rest = rest.replace(f"mid_block.attentions.0.{new}", f"mid.attn_1.{old}")
    return f"{side}.{rest}"


def test_every_vae_name_is_converted():
    with torch.device("meta"):
        published = set(AutoencoderKL(VaeConfig()).state_dict())
    assert {vae_name(original_vae_name(name)) for name in published} == published


def test_a_file_becomes_a_checkpoint(tiny, tmp_path):
    """The parts of a file in the original layout come out under their published names."""
    vae = load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors")
    tensors = {}
    for name, tensor in vae.items():
        square = ".attentions." in name and tensor.ndim == 2
        tensors[PREFIXES["vae"] + original_vae_name(name)] = (
            tensor[:, :, None, None].contiguous() if square else tensor
        )
    tensors[PREFIXES["unet"] + "input_blocks.0.0.weight"] = torch.ones(3)
    tensors[PREFIXES["text_encoder"] + "text_model.final_layer_norm.weight"] = torch.ones(2)
    tensors["model_ema.decay"] = torch.ones(1)
    parts = converted(tensors)
    assert parts["vae"].keys() == vae.keys()
    assert all(torch.equal(parts["vae"][name], vae[name]) for name in vae)
    assert list(parts["unet"]) == ["conv_in.weight"]

    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copytree(tiny / "tokenizer", tmp_path / "tokenizer")
    checkpoint = find_checkpoint(str(tmp_path / "model.safetensors"))
    assert checkpoint.name == "model" and checkpoint.weights("vae").keys() == vae.keys()


def test_a_file_of_another_make_is_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no unet"):
        find_checkpoint(str(tmp_path / "other.safetensors"))


def test_a_file_without_a_tokenizer_says_where_to_put_one(tmp_path):
    names = ("unet", "input_blocks.0.0.weight"), ("vae", "encoder.conv_in.weight")
    tensors = {PREFIXES[part] + name: torch.ones(1) for part, name in names}
    tensors[PREFIXES["text_encoder"] + "text_model.x"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt into"):
        find_checkpoint(str(tmp_path / "model.safetensors"))
