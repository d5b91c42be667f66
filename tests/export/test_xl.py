"""Checkpoints with two text encoders: parts that do not fit, LoRA files, padding, the manifest."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdrt
from sdrt.bundle import open_bundle
from sdrt.errors import CheckpointError
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.hub import needed_names
from sdrt.export.model_spec import read_model_spec


@pytest.fixture
def copy(tiny_xl, tmp_path):
    return shutil.copytree(tiny_xl, tmp_path / "model")


def change_config(folder, **options):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "text_encoder_2"), "has no text_encoder_2"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "context of 40 channels, .* 24"),
        (
            lambda f: (f / "text_encoder_2" / "config.json").unlink(),
            "text_encoder_2/config.json is",
        ),
        (
            lambda f: (f / "tokenizer_2" / "merges.txt").unlink(),
            "tokenizer_2/merges.txt is missing",
        ),
        (lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(), "has no weights"),
        (
            lambda f: change_config(f / "text_encoder_2", hidden_size=32),
            "context of 40 channels, .* 48",
        ),
        (
            lambda f: change_config(f / "text_encoder_2", projection_dim=8),
            "prompt of 20 channels, .* 8",
        ),
        (lambda f: change_config(f / "vae", latent_channels=16), "latent of 4 channels, .* 16"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(copy, tmp_path, damage, message):
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        build_bundle(BuildPlan(str(copy), tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_a_score_that_the_unet_does_not_read_is_refused(copy, tmp_path):
    (copy / "model_index.json").write_text('{"requires_aesthetics_score": true}')
    with pytest.raises(CheckpointError, match=r"score=True, .* reads 6"):
        build_bundle(BuildPlan(str(copy), tmp_path / "b"))


def test_a_refiner_is_known_by_its_parts(tiny_refiner):
    checkpoint = find_checkpoint(str(tiny_refiner))
    assert checkpoint.parts == ("text_encoder_2", "unet", "vae")
    spec = read_model_spec(checkpoint)
    assert spec.reads_aesthetic_score and not spec.zero_empty_prompt
    assert (spec.unet.num_time_ids, spec.unet.pooled_width) == (5, 20)


def test_a_unet_of_another_family_is_refused(tiny, tiny_xl, tmp_path):
    for model, other, message in (
        (tiny, tiny_xl, "has no text_encoder_2"),
        (tiny_xl, tiny, "the UNet is of another model family"),
    ):
        with pytest.raises(CheckpointError, match=message):
            build_bundle(BuildPlan(str(model), tmp_path / "b", unet=str(other)))


def lora_file(path, keys):
    """A rank-1 change of ones for each module, of (inputs, outputs)."""
    tensors = {}
    for key, (inputs, outputs) in keys.items():
        tensors[f"{key}.lora_down.weight"] = torch.ones(1, inputs)
        tensors[f"{key}.lora_up.weight"] = torch.ones(outputs, 1)
    save_file(tensors, path)
    return str(path)


SECOND = "lora_te2_text_model_encoder_layers_1_self_attn_q_proj"
# The same layer by kohya's name for XL's and by its published one.
ORIGINAL = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
PUBLISHED = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight"


def test_a_lora_of_xl_changes_both_text_encoders_and_the_unet(embedded, tmp_path):
    from tiny_checkpoints import write_tiny_xl

    model = write_tiny_xl(tmp_path / "model", embedded, layers_per_block=2)
    file = lora_file(tmp_path / "l.safetensors", {SECOND: (24, 24), ORIGINAL: (40, 16)})
    checkpoint = find_checkpoint(str(model))
    changed = checkpoint.with_loras([f"{file}:0.5"])
    layer = "text_model.encoder.layers.1.self_attn.q_proj.weight"
    for part, name in (("text_encoder_2", layer), ("unet", PUBLISHED)):
        before, after = checkpoint.weights(part), changed.weights(part)
        assert torch.allclose(after[name], before[name] + 0.5)
        assert all(torch.equal(after[n], before[n]) for n in before if n != name)


def test_a_lora_of_xl_does_not_fit_another_model(tiny, tiny_xl, tmp_path):
    second = lora_file(tmp_path / "a.safetensors", {SECOND: (24, 24)})
    with pytest.raises(CheckpointError, match=f"no place for {SECOND}"):
        find_checkpoint(str(tiny)).with_loras([second])
    wide = lora_file(tmp_path / "b.safetensors", {SECOND: (1280, 1280)})
    with pytest.raises(CheckpointError, match="another architecture"):
        find_checkpoint(str(tiny_xl)).with_loras([wide]).weights("text_encoder_2")


def test_the_bundle_tells_what_the_checkpoint_does(tiny_xl, tiny_xl_bundle):
    manifest = open_bundle(tiny_xl_bundle).manifest
    assert manifest.zero_empty_prompt and manifest.parity["psnr"] > 60
    fed = {spec.name: (spec.dtype, spec.shape) for spec in manifest.components["unet"].inputs}
    assert fed["pooled"] == ("float32", ("rows", 20)) and fed["time_ids"] == (
        "float32",
        ("rows", 6),
    )
    provided = {spec.name: spec.shape for spec in manifest.components["text_encoder_2"].outputs}
    assert provided == {"contexts": ("rows", 3, 32, 24), "pooled": ("rows", 20)}
    pads = [
        (tiny_xl_bundle / name / "tokenizer_config.json").exists()
        for name in ("tokenizer", "tokenizer_2")
    ]
    assert pads == [False, True]
    for name, tensor in load_file(tiny_xl_bundle / "text_encoder_2" / "model.safetensors").items():
        assert name.startswith("__pad") or torch.isfinite(tensor).all()


def test_a_model_index_may_want_the_empty_prompt_read(copy):
    assert find_checkpoint(str(copy)).zeroes_empty_prompt()
    (copy / "model_index.json").write_text('{"force_zeros_for_empty_prompt": false}')
    assert not find_checkpoint(str(copy)).zeroes_empty_prompt()


@pytest.mark.slow
def test_half_precision_keeps_the_sizes_exact(tiny_xl, tmp_path):
    bundle = build_bundle(BuildPlan(str(tiny_xl), tmp_path / "half", dtype="float16"))
    components = open_bundle(bundle).manifest.components
    fed = {spec.name: spec.dtype for spec in components["unet"].inputs}
    assert fed["pooled"] == fed["context"] == "float16"
    assert fed["time_ids"] == fed["timestep"] == "float32"
    with sdrt.load(bundle, backend="onnxruntime") as pipe:
        assert pipe("a", num_inference_steps=2, seed=0).images[0].size == (32, 32)


def test_the_hub_is_asked_for_both_encoders_and_tokenizers():
    parts = [f"{part}/config.json" for part in ("text_encoder", "text_encoder_2", "unet", "vae")]
    weights = [name.replace("config.json", "model.safetensors") for name in parts]
    small = ["model_index.json", "tokenizer_2/vocab.json", "tokenizer_2/merges.txt"]
    names = [*parts, *weights, *small]
    assert needed_names(
        [*names, "sd_xl_base_1.0.safetensors", "vae_1_0/config.json"],
        ["text_encoder", "text_encoder_2", "unet", "vae"],
    ) == sorted(names)
