"""Parts as single files, and single files that lack a part: every layout gives the same modules."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from exports import load_component
from safetensors.torch import load_file, save_file
from single_files import original_text, original_vae_name, single_file, tiny_parts

from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.model_spec import read_model_spec
from sdrt.export.vae import VaeConfig

pytestmark = pytest.mark.integration

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": "conditioner.embedders.1.",
}
PLACES = {
    ("1.x", "text_encoder"): "cond_stage_model.transformer.",
    ("2.x", "text_encoder"): "cond_stage_model.model.",
    ("XL", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("XL", "text_encoder_2"): "conditioner.embedders.1.model.",
}
BARE = {
    "unet": ("", "diffusion_model.", "model.diffusion_model.", "unet."),
    "vae": ("", "vae.", "first_stage_model."),
}


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """By family: the parts, the file of all, and the same as a folder in the hub's layout."""
    vocabulary = len(json.loads((tiny / "tokenizer" / "vocab.json").read_text()))
    base = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny / "tokenizer", base / "tokenizer")
    result = {}
    for name in ("1.x", "2.x", "XL"):
        family, parts = tiny_parts(name, vocabulary)
        tensors = single_file(family, parts)
        save_file(tensors, base / f"{name}.safetensors")
        result[name] = (parts, tensors, find_checkpoint(str(base / f"{name}.safetensors")))
    return result


def in_layouts(family, part, parts, tensors):
    """A part's file in every layout, by a name for each."""
    weights = parts[part][1]
    place = PLACES.get((family, part)) or PREFIXES[part]
    own = {k.removeprefix(place): t for k, t in tensors.items() if k.startswith(place)}
    if part in BARE:
        return {
            **{f"original, {prefix!r}": {prefix + k: t for k, t in own.items()}
               for prefix in BARE[part]},
            "diffusers": weights,
        }  # fmt: skip
    bare = {name.removeprefix("text_model."): t for name, t in weights.items()}
    projected = {**weights, "logit_scale": torch.ones(()), "vision_model.x": torch.ones(1)}
    return {"original": {place + k: t for k, t in own.items()}, "original, bare": own,
            "transformers": projected, "transformers 5": bare,
            "OpenCLIP": original_text(weights)}  # fmt: skip


CASES = [(f, p) for f in ("1.x", "2.x", "XL") for p in ("unet", "vae", "text_encoder")]
CASES += [("XL", "text_encoder_2")]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "part"), CASES)
def test_a_part_as_a_file_is_that_of_the_model_in_every_layout(family, part, models, tmp_path):
    parts, tensors, model = models[family]
    lacking = {k: t for k, t in tensors.items() if not k.startswith(PREFIXES[part])}
    shutil.copytree(model.folder / "tokenizer", tmp_path / "tokenizer")
    save_file(lacking, tmp_path / "lacking.safetensors")
    expected = load_component(part, model).state_dict()
    for name, stored in in_layouts(family, part, parts, tensors).items():
        file = tmp_path / f"{part} {name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in stored.items()}, file)
        # A folder that has the part, and a file that lacks it.
        for base in (model.folder, tmp_path / "lacking.safetensors"):
            checkpoint = find_checkpoint(str(base), parts={part: str(file)})
            read_model_spec(checkpoint)
            actual = load_component(part, checkpoint).state_dict()
            assert actual.keys() == expected.keys(), name
            assert all(torch.equal(actual[key], expected[key]) for key in expected), name
            own = {k: v for k, v in checkpoint.config(part).items() if k != "_class_name"}
            assert own == model.config(part), name


@pytest.mark.parametrize(("family", "part"), CASES)
def test_a_part_may_be_a_folder_and_its_model_a_file_without_it(family, part, models, tmp_path):
    _, tensors, model = models[family]
    lacking = {k: t for k, t in tensors.items() if not k.startswith(PREFIXES[part])}
    shutil.copytree(model.folder / "tokenizer", tmp_path / "tokenizer")
    save_file(lacking, tmp_path / "lacking.safetensors")
    for where in (model.folder, model.folder / part):
        parts = {part: str(where)}
        checkpoint = find_checkpoint(str(tmp_path / "lacking.safetensors"), parts=parts)
        read_model_spec(checkpoint)
        assert set(checkpoint.parts) == set(model.parts)
        for item in model.parts:
            assert checkpoint.config(item) == model.config(item)
    option = part.replace("_", "-")
    with pytest.raises(CheckpointError, match=rf"no {part}: .*--{option} FILE"):
        find_checkpoint(str(tmp_path / "lacking.safetensors"))


def test_a_folder_without_a_part_takes_it_from_a_file(models, tmp_path):
    for family in ("1.x", "XL"):
        _, tensors, model = models[family]
        folder = shutil.copytree(model.folder, tmp_path / family)
        shutil.rmtree(folder / "vae")
        save_file(
            {k: t for k, t in tensors.items() if k.startswith("first_stage")},
            tmp_path / "vae.safetensors",
        )
        checkpoint = find_checkpoint(str(folder), parts={"vae": str(tmp_path / "vae.safetensors")})
        assert checkpoint.config("vae") == model.config("vae")
        with pytest.raises(CheckpointError, match=r"vae/config\.json is missing"):
            find_checkpoint(str(folder))


def test_a_broken_part_that_is_replaced_is_not_read(models, tmp_path):
    _, tensors, model = models["1.x"]
    shutil.copytree(model.folder / "tokenizer", tmp_path / "tokenizer")
    broken = {
        key: torch.full_like(t, torch.nan) if key.startswith("first_stage_model.") else t
        for key, t in tensors.items()
    }
    save_file(broken, tmp_path / "broken.safetensors")
    assert find_checkpoint(str(tmp_path / "broken.safetensors"), parts={"vae": str(model.folder)})
    with pytest.raises(CheckpointError, match="holds NaN"):
        find_checkpoint(str(tmp_path / "broken.safetensors"))


def test_a_tiny_autoencoder_may_be_a_file(models, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.AutoencoderTiny().eval()
    file = tmp_path / "taesd.safetensors"
    save_file(reference.state_dict(), file)
    for family in ("1.x", "XL"):
        checkpoint = find_checkpoint(str(models[family][2].folder), parts={"vae": str(file)})
        latents = torch.randn(1, 4, 8, 8)
        actual = load_component("vae_decoder", checkpoint)(latents)
        with torch.no_grad():
            expected = reference.decode(latents).sample
        assert torch.allclose(actual, expected, atol=1e-5)
        # A whole one in place of a tiny one has the scale of its family again.
        full = {
            "vae": str(models[family][2].folder / "vae" / "diffusion_pytorch_model.safetensors")
        }
        assert checkpoint.with_parts(full).config("vae") == models[family][2].config("vae")


def test_a_file_in_the_hubs_layout_has_its_configuration_next_to_it(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert find_checkpoint(str(tiny), parts={"vae": str(file)}).part_folder("vae") == file.parent
    other = Path(shutil.copyfile(file, file.with_suffix(".fp16.safetensors")))
    checkpoint = find_checkpoint(str(tiny), parts={"vae": str(other)})
    ours, theirs = (VaeConfig.from_json(c.config("vae")) for c in (
        checkpoint, find_checkpoint(str(tiny))))  # fmt: skip
    assert ours == theirs


@pytest.mark.parametrize(
    ("part", "keys", "message"),
    [
        ("vae", ["lora_unet_mid.lora_up.weight"], "holds no vae: it seems to be a LoRA"),
        ("unet", ["control_model.x"], "holds no unet: it seems to be a ControlNet"),
        ("unet", ["encoder.down.0.block.0.norm1.weight"], "no unet: it seems to be an autoencoder"),
        ("text_encoder", ["emb_params"], "no text_encoder: it seems to be a textual inversion"),
        ("text_encoder", ["x"], "expected for --text-encoder a file with a text_encoder"),
    ],
)
def test_a_part_of_another_kind_is_refused(part, keys, message, tiny, tmp_path):
    save_file({key: torch.ones(1) for key in keys}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(str(tiny), parts={part: str(tmp_path / "part.safetensors")})


def test_a_part_of_another_family_is_refused(models, tmp_path):
    _, tensors, model = models["1.x"]
    unet = tmp_path / "unet.safetensors"
    save_file({k: t for k, t in models["XL"][1].items() if "diffusion_model" in k}, unet)
    checkpoint = find_checkpoint(str(model.folder), parts={"unet": str(unet)})
    with pytest.raises(CheckpointError, match="has no text_encoder_2\nhint: pass --text-encoder-2"):
        read_model_spec(checkpoint)
    vae = tmp_path / "vae.safetensors"
    save_file(of_more_channels(tensors), vae)
    with pytest.raises(CheckpointError, match=r"have 16 channels, those of the model 4;.*--vae"):
        find_checkpoint(str(model.folder), parts={"vae": str(vae)})
    text = tmp_path / "text.safetensors"
    wide = load_file(models["XL"][2].folder / "text_encoder_2" / "model.safetensors")
    save_file(wide, text)
    checkpoint = find_checkpoint(str(model.folder), parts={"text_encoder": str(text)})
    with pytest.raises(
        CheckpointError,
        match=r"context of 64 channels, the other .* 128(.|\n)*--text-",
    ):
        read_model_spec(checkpoint)


def test_an_autoencoder_from_a_model_of_another_family_is_refused(models, tmp_path):
    for family, other in (("1.x", "XL"), ("XL", "2.x")):
        file = tmp_path / f"{family}.safetensors"
        save_file(models[family][1], file)
        assert find_checkpoint(str(models[family][2].folder), parts={"vae": str(file)})
        with pytest.raises(CheckpointError, match=r"give --vae an autoencoder of the same family"):
            find_checkpoint(str(models[other][2].folder), parts={"vae": str(file)})


@pytest.mark.parametrize("family", ["1.x", "2.x", "XL"])
def test_a_whole_model_may_be_in_the_layout_of_diffusers(family, models, tmp_path):
    parts, _, model = models[family]
    shutil.copytree(model.folder / "tokenizer", tmp_path / "tokenizer")
    tensors = {f"{part}.{n}": t for part, (_, ws) in parts.items() for n, t in ws.items()}
    save_file(tensors, tmp_path / "whole.safetensors")
    actual = find_checkpoint(str(tmp_path / "whole.safetensors"))
    assert actual.parts == model.parts
    for part in model.parts:
        assert actual.config(part) == model.config(part)
        expected = model.weights(part)
        assert all(torch.equal(t, expected[n]) for n, t in actual.weights(part).items())
    assert actual.tokenizers() == model.tokenizers()


def test_what_xl_has_left_of_a_clip_model_is_passed_over(models, tmp_path):
    _, tensors, model = models["XL"]
    shutil.copytree(model.folder / "tokenizer", tmp_path / "tokenizer")
    left = {
        f"conditioner.embedders.0.{name}": torch.eye(4)
        for name in ("text_projection", "logit_scale")
    }
    save_file({**tensors, **left}, tmp_path / "model.safetensors")
    actual = find_checkpoint(str(tmp_path / "model.safetensors"))
    assert actual.config("text_encoder") == model.config("text_encoder")
    assert "conditioner.embedders.0.text_projection" in actual.passed_over()[0]


def test_2x_may_be_in_the_layout_of_xl(models, tmp_path):
    _, tensors, model = models["2.x"]
    shutil.copytree(model.folder / "tokenizer", tmp_path / "tokenizer")
    later = "conditioner.embedders.0.model."
    moved = {k.replace("cond_stage_model.model.", later): t for k, t in tensors.items()}
    save_file(moved, tmp_path / "whole.safetensors")
    actual = find_checkpoint(str(tmp_path / "whole.safetensors"))
    assert actual.parts == model.parts
    assert actual.prediction.kind == actual.scheduler_config()["prediction_type"] == "epsilon"
    assert read_model_spec(actual).native_size == (512, 512)
    for part in model.parts:
        assert {**actual.config(part), "sample_size": 0} == {**model.config(part), "sample_size": 0}
        expected = model.weights(part)
        assert all(torch.equal(t, expected[n]) for n, t in actual.weights(part).items())
    moved = {k: t for k, t in moved.items() if not k.startswith("first_stage_model.")}
    save_file(moved, tmp_path / "lacking.safetensors")
    with pytest.raises(CheckpointError, match=r"text_encoder \(conditioner.*with --vae FILE"):
        find_checkpoint(str(tmp_path / "lacking.safetensors"))


@pytest.mark.parametrize(
    ("part", "broken", "message"),
    [
        ("vae", lambda k, t: {} if k.startswith("encoder.") else {k: t}, "lacks encoder.down_bl"),
        ("unet", lambda k, t: {} if k.startswith("input_bl") else {k: t}, "lacks down_blocks.0"),
        ("unet", lambda k, t: {k: t.flatten() if "input_blocks.0.0" in k else t}, "expected a mat"),
        ("text_encoder", lambda k, t: {k: t[0] if "token_emb" in k else t}, "expected a mat"),
    ],
)
def test_a_part_that_is_not_whole_is_refused(part, broken, message, models, tmp_path):
    _, tensors, model = models["1.x"]
    prefix = PLACES.get(("1.x", part)) or PREFIXES[part]
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    cached = {new: tensor for k, t in own.items() for new, tensor in broken(k, t).items()}
    save_file(cached, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(str(model.folder), parts={part: str(tmp_path / "part.safetensors")})


def of_more_channels(tensors):
    """The file's autoencoder with latents of 16 channels, and no convolutions next to them."""
    own = {k: t for k, t in tensors.items() if k.startswith("first_stage_model.")}
    own = {k.removeprefix("first_stage_model."): t for k, t in own.items() if "quant" not in k}
    first = own["decoder.conv_in.weight"]
    return {**own, "decoder.conv_in.weight": first.repeat(1, 4, 1, 1)}


@pytest.mark.reference
@pytest.mark.parametrize("family", ["1.x", "2.x"])
def test_the_reference_reads_the_same_from_a_file(family, models, tmp_path):
    """Components of diffusers' own reading of the file, with the configuration given."""
    diffusers = pytest.importorskip("diffusers")
    _, tensors, model = models[family]
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        folder = tmp_path / part
        folder.mkdir()
        config = {**model.config(part), "_class_name": kind}
        if part == "vae":
            widths = config["block_out_channels"]
            config["down_block_types"] = ["DownEncoderBlock2D"] * len(widths)
            config["up_block_types"] = ["UpDecoderBlock2D"] * len(widths)
        (folder / "config.json").write_text(json.dumps(config))
        reference = getattr(diffusers, kind).from_single_file(
            str(file), config=str(tmp_path), subfolder=part, local_files_only=True
        )
        actual, expected = load_component(part, model).state_dict(), reference.state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_original_names_of_an_autoencoder_go_both_ways(models):
    """What the tests' own way into the layout names is in the file."""
    parts, tensors, _ = models["1.x"]
    names = {f"first_stage_model.{original_vae_name(name)}" for name in parts["vae"][1]}
    assert names <= set(tensors)
