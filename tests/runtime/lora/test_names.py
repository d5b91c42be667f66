"""The names of every layout of LoRA files, and the words that each is refused with."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdrt.errors import CheckpointError
from sdrt.runtime.lora.adapters import compute_deltas, read_lora

DOWN, UP = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
Q, K = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "encoder.layers.3.mlp.fc1"
ORIGINAL_Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
PAIRS = [
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.default_0.weight", "lora_B.default_0.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]
FLAT_Q, FLAT_K = Q.replace(".", "_"), K.replace(".", "_")
NAMES = {
    ("unet", Q): [
        *(Q, f"unet.{Q}", f"unet.base_model.model.{Q}", f"base_model.model.{Q}"),
        *(f"base_model.model.unet.{Q}", f"diffusion_model.{ORIGINAL_Q}", ORIGINAL_Q),
        *(f"model.diffusion_model.{ORIGINAL_Q}", f"lora_unet_{FLAT_Q}", f"lycoris_{FLAT_Q}"),
        f"lora_unet_{ORIGINAL_Q.replace('.', '_')}",
    ],
    ("text_encoder", K): [
        *(f"text_encoder.text_model.{K}", f"text_encoder.{K}", f"text_model.{K}"),
        *(f"base_model.model.text_model.{K}", f"base_model.model.{K}"),
        *(f"lora_te_text_model_{FLAT_K}", f"lora_te1_text_model_{FLAT_K}", f"lora_te_{FLAT_K}"),
        *(f"text_encoders.clip_l.transformer.text_model.{K}", f"lycoris_text_model_{FLAT_K}"),
        *(
            f"cond_stage_model.transformer.text_model.{K}",
            "lora_te_transformer_resblocks_3_mlp_c_fc",
        ),
        "cond_stage_model.model.transformer.resblocks.3.mlp.c_fc",
    ],
    ("text_encoder_2", K): [
        *(f"text_encoder_2.text_model.{K}", f"lora_te2_text_model_{FLAT_K}"),
        *(f"text_encoders.clip_g.transformer.text_model.{K}",),
        "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc",
    ],
}


def deltas_of(tensors, tmp_path, part, *modules):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "l")
    shapes = {f"{module}.weight": (4, 3) for module in modules}
    return dict(compute_deltas(part, shapes, [read_lora(tmp_path / "l", 1.0)]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
@pytest.mark.parametrize(
    ("part", "module", "name"),
    [(part, module, name) for (part, module), names in NAMES.items() for name in names],
)
def test_a_module_under_every_name(tmp_path, part, module, name, pair):
    tensors = {f"{name}.{pair[0]}": DOWN, f"{name}.{pair[1]}": UP}
    actual = deltas_of(tensors, tmp_path, part, module)
    np.testing.assert_array_equal(actual[f"{module}.weight"], UP @ DOWN)


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_the_processors_of_old(tmp_path, prefix):
    stem = f"{prefix}{Q.removesuffix('.to_q')}.processor.to"
    tensors = {}
    for letter in ("q", "out"):
        tensors |= {
            f"{stem}_{letter}_lora.down.weight": DOWN,
            f"{stem}_{letter}_lora.up.weight": UP,
        }
    tensors[f"{stem}_q_lora.alpha"] = torch.tensor(1.0)
    out = Q.replace("to_q", "to_out.0")
    actual = deltas_of(tensors, tmp_path, "unet", Q, out)
    np.testing.assert_array_equal(actual[f"{Q}.weight"], UP @ DOWN / 2)
    np.testing.assert_array_equal(actual[f"{out}.weight"], UP @ DOWN)


def test_one_layer_for_queries_keys_and_values(tmp_path):
    """As OpenCLIP has it, which makes the rows of torch's MultiheadAttention."""
    up = torch.arange(24.0).reshape(12, 2)
    stem = "lora_te_transformer_resblocks_7_attn_in_proj"
    tensors = {f"{stem}.lora_down.weight": DOWN, f"{stem}.lora_up.weight": up}
    names = [f"text_model.encoder.layers.7.self_attn.{letter}_proj" for letter in "qkv"]
    actual = deltas_of(tensors, tmp_path, "text_encoder", *names)
    rows = np.concatenate([actual[f"{name}.weight"] for name in names])
    np.testing.assert_array_equal(rows, up @ DOWN)
    tensors[f"{stem}.dora_scale"] = torch.ones(12, 1)
    with pytest.raises(CheckpointError, match="dora_scale, which is not supported for queries"):
        deltas_of(tensors, tmp_path, "text_encoder", *names)


def test_a_text_encoders_last_layer_may_be_one_that_nothing_reads(tmp_path, caplog):
    """Bundles do not hold what comes after the states that the UNet is given."""
    caplog.set_level(logging.INFO)
    held = [f"text_model.encoder.layers.{n}.mlp.fc1" for n in range(2)]

    def changing(*layers, part="text_encoder"):
        tensors = {}
        for n in layers:
            stem = f"{part}.text_model.encoder.layers.{n}.mlp.fc1"
            tensors |= {f"{stem}.lora_A.weight": DOWN, f"{stem}.lora_B.weight": UP}
        return deltas_of(tensors, tmp_path, part, *held)

    assert list(changing(0, 1, 2)) == [f"{name}.weight" for name in held]
    assert "nothing reads what comes of text_encoder.text_model.encoder.layers.2" in caplog.text
    for layers in ((0, 3), (1, 2, 3)):
        with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.fc1: 1 key"):
            changing(*layers)
    with pytest.raises(CheckpointError, match="another architecture"):
        changing(2, part="unet")


LORA = {"unet.conv_in.lora_A.weight": DOWN, "unet.conv_in.lora_B.weight": UP}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_conv_in.oft_blocks", r"conv_in.oft_blocks\) of OFT, which is not supported"),
        ("base_model.model.conv_in.boft_R", "of BOFT"),
        ("lora_unet_conv_in.a1.weight", "of GLoRA.*LoHa, LoKr"),
        ("lora_unet_conv_in.lambda_layer", "of T-LoRA"),
        ("base_model.model.conv_in.vera_lambda_b", "of VeRA"),
        ("text_encoder.embeddings.token_embedding.lora_embedding_A", "of an embedding"),
        ("base_model.model.conv_in.base_layer.bias", "trained whole"),
        ("unet.conv_in.modules_to_save.weight", "trained whole"),
        ("transformer.blocks.0.to_q.lora_A.weight", "another family"),
        ("lora_prior_unet_conv_in.lora_down.weight", "another family"),
        ("unet.conv_in.weight", "no known layout"),
        ("unet.conv_in.bias", "no known layout"),
        ("unet.conv_in.lora_A.bias", "no known layout"),
        ("lora_unet_conv_in.lokr_t1", "no known layout"),
        ("lora_vae_conv_in.lora_down.weight", "no known layout"),
        ("nothing", "1 key .nothing. of no known layout"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, key, message):
    with pytest.raises(CheckpointError, match=message):
        deltas_of(LORA | {key: torch.ones(2, 2)}, tmp_path, "unet", "conv_in")


def test_what_changes_nothing_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    more = {
        "lora_te_text_model_encoder_layers_99_mlp_fc1.alpha": torch.tensor(4.0),
        "bundle_emb.mystyle.string_to_param.*": torch.ones(2, 768),
        "bundle_emb.other.emb_params": torch.ones(1, 768),
    }
    actual = deltas_of(LORA | more, tmp_path, "unet", "conv_in")
    assert list(actual) == ["conv_in.weight"]
    assert "layers_99_mlp_fc1 has an alpha alone" in caplog.text
    embeddings = read_lora(tmp_path / "l", 1.0).embeddings
    assert {word: [*own] for word, own in embeddings.items()} == {
        "mystyle": ["string_to_param.*"],
        "other": ["emb_params"],
    }
