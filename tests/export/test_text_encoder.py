"""CLIP's text models in every layout of transformers 4 and 5, against transformers' own reading."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from exports import load_component
from safetensors.torch import load_file, save_file

from sdrt.errors import CheckpointError
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.model_spec import read_model_spec

FILE = "model.safetensors"
IDS = torch.tensor([[606, 5, 9, 3, 607, 607], [606, 607, 607, 607, 607, 607]], dtype=torch.int32)
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8}
VISION |= {"num_attention_heads": 2, "patch_size": 4, "projection_dim": 12}


def text(**options):
    config = {"vocab_size": 608, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 12}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    return {**config, "bos_token_id": 606, "eos_token_id": 607, "pad_token_id": 607, **options}


def full():
    config = transformers.CLIPConfig(text_config=text(), vision_config=VISION, projection_dim=12)
    return transformers.CLIPModel(config)


def of(kind, **options):
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**text(**options)))


def rename(folder, change):
    tensors = load_file(folder / FILE)
    result = dict(change(name, tensor) for name, tensor in tensors.items())
    save_file(result, folder / FILE)


def with_prefix(folder):
    def change(name, tensor):
        own = not name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        return (name if own else f"text_model.{name}"), tensor

    rename(folder, change)


def without_prefix(folder):
    rename(folder, lambda name, tensor: (name.removeprefix("text_model."), tensor))


def with_positions(folder):
    with_prefix(folder)
    tensors = load_file(folder / FILE)
    tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(tensors, folder / FILE)


def as_variant(folder):
    rename(folder, lambda name, tensor: (name, tensor.half()))
    (folder / FILE).rename(folder / "model.fp16.safetensors")


def in_shards(folder):
    kind = getattr(
        transformers, json.loads((folder / "config.json").read_text())["architectures"][0]
    )
    model = kind.from_pretrained(folder)
    (folder / FILE).unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert (folder / "model.safetensors.index.json").is_file()


def settings(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def old_settings(folder):
    """A configuration as early releases wrote it: all of a generation's settings besides."""
    settings(folder, torch_dtype="float16", return_dict=False, output_attentions=True, dropout=0.1)
    settings(folder, temperature=1.0, rope_scaling=None, _attn_implementation_autoset=True)
    settings(folder, attn_implementation="eager", use_cache=True, pruned_heads={}, x=[1])


LAYOUTS = {
    "as saved": None,
    "with the prefix": with_prefix,
    "without the prefix": without_prefix,
    "with position_ids": with_positions,
    "half precision as a variant": as_variant,
    "shards": in_shards,
    "old settings": old_settings,
}


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A checkpoint whose text encoder is replaced by what a function saves."""

    def replaced(model, change=None):
        folder = tmp_path / "model"
        shutil.copytree(tiny, folder)
        shutil.rmtree(folder / "text_encoder")
        model.save_pretrained(folder / "text_encoder")
        if change:
            change(folder / "text_encoder")
        return find_checkpoint(str(folder))

    return replaced


MODELS = {
    "text model": lambda: of("CLIPTextModel"),
    "with a projection": lambda: of("CLIPTextModelWithProjection"),
    "whole model": full,
}


@pytest.mark.reference
@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_layout_is_read(checkpoint, make, change):
    torch.manual_seed(0)
    model = make().eval()
    inner = getattr(model, "text_model", model)
    actual = checkpoint(model, change)
    read_model_spec(actual)
    with torch.no_grad():
        expected = inner(input_ids=IDS).last_hidden_state
        contexts = load_component("text_encoder", actual)(IDS)
    tolerance = 5e-3 if change is as_variant else 1e-6
    torch.testing.assert_close(contexts[:, -1], expected, atol=tolerance, rtol=0)


@pytest.mark.reference
@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("eos", [2, 607])
def test_every_layout_of_the_second_encoder_is_read(checkpoint, eos, change):
    """With the end's id of early configurations, 2, the largest id is where the prompt ends."""
    torch.manual_seed(0)
    model = of("CLIPTextModelWithProjection", eos_token_id=eos).eval()
    actual = checkpoint(model, change)
    shutil.copytree(actual.folder / "text_encoder", actual.folder / "text_encoder_2")
    shutil.copytree(actual.folder / "tokenizer", actual.folder / "tokenizer_2")
    with torch.no_grad():
        expected = model(input_ids=IDS).text_embeds
        _, pooled = load_component("text_encoder_2", find_checkpoint(str(actual.folder)))(IDS)
    tolerance = 5e-3 if change is as_variant else 1e-6
    torch.testing.assert_close(pooled, expected, atol=tolerance, rtol=0)


REFUSED = {
    "use_attention_mask": True,
    "quantization_config": {"quant_method": "bitsandbytes"},
    "model_type": "t5",
    "pruned_heads": {"0": [1]},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_changes_the_result_is_refused_by_name(checkpoint, key):
    actual = checkpoint(of("CLIPTextModel"), lambda folder: settings(folder, **{key: REFUSED[key]}))
    with pytest.raises(CheckpointError, match=f"text_encoder: {key}="):
        read_model_spec(actual)


def test_unknown_weights_are_refused(checkpoint):
    def add(folder):
        save_file({**load_file(folder / FILE), "adapter.weight": torch.zeros(2)}, folder / FILE)

    with pytest.raises(CheckpointError, match=r"adapter\.weight"):
        load_component("text_encoder", checkpoint(of("CLIPTextModel"), add))


def test_what_is_not_used_is_said(checkpoint, caplog):
    caplog.set_level(logging.DEBUG, "sdrt.build")
    load_component("text_encoder", checkpoint(full(), old_settings))
    assert "weights are not used" in caplog.text
    assert "temperature" in caplog.text


@pytest.mark.parametrize(("rows", "fits"), [(608, True), (640, True), (609, False), (500, False)])
def test_a_vocabulary_fits_its_text_encoder(checkpoint, rows, fits):
    """Rows that fill the table up to a multiple of 64 are nobody's words."""
    actual = checkpoint(of("CLIPTextModel", vocab_size=rows))
    if fits:
        assert read_model_spec(actual).max_tokens == 32
        return
    with pytest.raises(CheckpointError, match=f"rows for {rows} tokens, its tokenizer has 608"):
        read_model_spec(actual)


@pytest.mark.parametrize(
    ("length", "actual"), [(16, 16), (32, 32), (33, None), (None, 32), (10**30, 32), (2, None)]
)
def test_model_max_length_is_the_length_of_prompts(checkpoint, length, actual):
    result = checkpoint(of("CLIPTextModel"))
    settings_of = result.folder / "tokenizer" / "tokenizer_config.json"
    settings_of.write_text(json.dumps({} if length is None else {"model_max_length": length}))
    if actual:
        assert read_model_spec(result).max_tokens == actual
        return
    with pytest.raises(CheckpointError, match=f"model_max_length {length}, .* 32 positions"):
        read_model_spec(result)
