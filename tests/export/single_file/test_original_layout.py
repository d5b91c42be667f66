"""Single files in the original layout: names, values and configuration against the published ones.

The way into the layout is written here on its own, and diffusers' conversion agrees.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from single_files import (
    PREFIX,
    UNETS,
    original_unet_name,
    original_vae_name,
    single_file,
    tiny_parts,
)

from sdrt.errors import CheckpointError
from sdrt.export import modules
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.model_spec import read_model_spec
from sdrt.export.single_file.original_layout import converted, unet_name, vae_name
from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig
from sdrt.export.vae import AutoencoderKL, VaeConfig
from sdrt.runtime.lora.adapters import parse_changes
from sdrt.runtime.text.tokenizer import END

pytestmark = pytest.mark.integration


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


def test_every_vae_name_is_converted():
    with torch.device("meta"):
        published = set(AutoencoderKL(VaeConfig()).state_dict())
    assert {vae_name(original_vae_name(name)) for name in published} == published


@pytest.mark.parametrize("case", UNETS)
def test_there_and_back_is_the_same(case, written, vocabulary):
    family, parts = tiny_parts(case, vocabulary)
    checkpoint = find_checkpoint(str(written(single_file(family, parts))))
    assert set(checkpoint.parts) == set(parts)
    spec = read_model_spec(checkpoint)  # checks that the parts fit each other
    for part, (config, weights) in parts.items():
        actual = checkpoint.weights(part)
        assert actual.keys() == weights.keys()
        assert all(torch.equal(actual[name], weights[name]) for name in weights)
        reported = checkpoint.config(part)
        if part == "unet":
            own, expected = UnetConfig.from_json(reported), UnetConfig(**config)
            if family == "1.x" or isinstance(expected.transformer_layers_per_block, int):
                expected = dataclasses.replace(expected, transformer_layers_per_block=(1, 1))
            assert own == expected
        elif part == "vae":
            assert VaeConfig.from_json(reported) == VaeConfig.from_json(config)
        else:
            assert {key: reported[key] for key in config} == config
        getattr(modules, f"load_{part}")(checkpoint, spec)
    pads = [item.roles["pad_token"] for item in checkpoint.tokenizers().values()]
    expected = {"1.x": [END], "2.x": ["!"], "XL": [END, "!"], "refiner": ["!"]}
    assert pads == expected[family]
    assert spec.reads_aesthetic_score == (family == "refiner")
    assert spec.zero_empty_prompt == (family == "XL")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["XL", "refiner"])
def test_a_build_from_a_file_is_that_from_the_folder(case, written, vocabulary, tmp_path):
    family, parts = tiny_parts(case, vocabulary)
    file = written(single_file(family, parts))
    folder = tmp_path / "folder"
    converted_folder = find_checkpoint(str(file)).folder
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        if (converted_folder / name).is_dir():
            shutil.copytree(converted_folder / name, folder / name)
    if case == "refiner":
        shutil.copy(converted_folder / "model_index.json", folder)
    for part, (config, weights) in parts.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / part / "model.safetensors")
    built = [
        build_bundle(BuildPlan(str(model), tmp_path / name, sizes=((32, 32),)))
        for name, model in (("a", file), ("b", folder))
    ]
    texts = [part for part in parts if part.startswith("text")]
    for part in ("unet", "vae_decoder", "vae_encoder", *texts):
        one, other = (bundle / part / "model.safetensors" for bundle in built)
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("case", "metadata", "marks", "expected"),
    [
        ("1.x", None, (), "epsilon"),
        ("2.x", None, (), "v_prediction"),
        ("2.x", {"modelspec.prediction_type": "epsilon"}, (), "epsilon"),
        ("XL", None, (), "epsilon"),
        ("XL", None, ("v_pred", "ztsnr"), "v_prediction"),
    ],
)
def test_what_a_file_says_of_its_prediction(
    case, metadata, marks, expected, written, vocabulary, monkeypatch
):
    family, parts = tiny_parts(case, vocabulary)
    tensors = single_file(family, parts) | {mark: torch.zeros(1) for mark in marks}
    checkpoint = find_checkpoint(str(written(tensors, metadata=metadata)))
    scheduler = checkpoint.scheduler_config()
    assert scheduler["prediction_type"] == expected
    assert scheduler.get("rescale_betas_zero_snr", False) == bool(marks)
    if case == "2.x":
        assert checkpoint.config("unet")["sample_size"] == (64 if metadata else 96)


@pytest.mark.reference
@pytest.mark.parametrize("case", ["2.x", "XL", "refiner"])
def test_the_references_conversion_agrees(case, vocabulary):
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    family, parts = tiny_parts(case, vocabulary)
    tensors = single_file(family, parts)
    _, own = converted(tensors)
    part = "text_encoder" if family == "2.x" else "text_encoder_2"
    prefix = PREFIX[family, part]
    model = type("Model", (), {"config": None})()
    model.config = type("Config", (), {"hidden_size": parts[part][0]["hidden_size"]})()
    # It takes the width of the fused projection from that of the prompt as a whole.
    cached = {k: v for k, v in tensors.items() if not k.endswith("text_projection")}
    expected = utilities.convert_open_clip_checkpoint(model, cached, prefix=prefix)
    actual = {n: t for n, t in own[part].items() if not n.startswith("text_projection")}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    vae = utilities.convert_ldm_vae_checkpoint(
        dict(tensors), {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    )
    assert own["vae"].keys() == vae.keys()


XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.reference
def test_every_name_of_the_published_xl_is_the_references():
    """On weights without values: the reference's conversion and the one here give the same ones."""
    utilities = pytest.importorskip("diffusers.loaders.single_file_utils")
    with torch.device("meta"):
        published = Unet(UnetConfig(**XL)).state_dict()
    tensors = {original_unet_name(name, published): t for name, t in published.items()}
    assert len(tensors) == len(published) == 1680
    file = {PREFIX["unet"] + name: tensor for name, tensor in tensors.items()}
    expected = utilities.convert_ldm_unet_checkpoint(dict(file), {"layers_per_block": 2, **XL})
    actual = {unet_name(name): tensor for name, tensor in tensors.items()}
    assert actual.keys() == expected.keys() == published.keys()
    assert all(actual[name] is expected[name] is published[name] for name in published)


def test_lora_files_may_name_modules_as_in_the_original_layout():
    with torch.device("meta"):
        names = Unet(UnetConfig(**XL)).state_dict()
    for name in (name for name, weight in names.items() if weight.ndim > 1):
        flat = name.rpartition(".")[0].replace(".", "_")
        original = original_unet_name(name, names).rpartition(".")[0].replace(".", "_")
        for module in (flat, original):
            key = f"lora_unet_{module}.lora_down.weight"
            assert list(parse_changes({key: np.zeros((1, 1))}, {})) == [("unet", flat)]


def test_lora_files_may_change_every_weight_and_bias_of_the_original_layout_of_1x():
    for name in original_unet_names():
        module, _, kind = name.rpartition(".")
        published = unet_name(name).rpartition(".")[0].replace(".", "_")
        diff, end, shape = ("diff_b", ".bias", 1) if kind == "bias" else ("diff", "", (1, 1))
        for head in (f"lora_unet_{module.replace('.', '_')}", f"diffusion_model.{module}"):
            actual = parse_changes({f"{head}.{diff}": np.zeros(shape)}, {})
            assert list(actual) == [("unet", published + end)]


def test_a_file_of_another_make_is_refused(tmp_path):
    save_file({"x.y": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no unet: .* recognised nothing, keys begin with x;"
    ):
        find_checkpoint(str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("case", "lost", "message"),
    [
        ("1.x", "cond_stage_model.", "no text_encoder: no key begins with cond_stage_model.trans"),
        ("XL", "conditioner.embedders.1.", "no text_encoder_2: .*recognised its unet"),
        ("XL", "conditioner.embedders.0.", "no text_encoder: .*embedders.0"),
        ("2.x", "model.diffusion_model.input_blocks.0.", "lacks conv_in.weight"),
    ],
)
def test_a_file_that_lacks_a_part_is_refused(case, lost, message, written, vocabulary):
    family, parts = tiny_parts(case, vocabulary)
    tensors = {k: t for k, t in single_file(family, parts).items() if not k.startswith(lost)}
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(str(written(tensors)))


def test_a_file_without_a_tokenizer_says_where_to_put_one(tmp_path, vocabulary):
    family, parts = tiny_parts("1.x", vocabulary)
    save_file(single_file(family, parts), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt into"):
        find_checkpoint(str(tmp_path / "model.safetensors"))
