"""LoRA files of every layout against diffusers' own loading of them."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from sdrt.errors import CheckpointError, UsageError
from sdrt.export.checkpoint import find_checkpoint
from sdrt.runtime.lora.adapters import parse_lora, read_lora

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def weights(tiny):
    return load_file(tiny / "unet" / "diffusion_pytorch_model.safetensors")


def factors(weights, name, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = weights[f"{name}.weight"].shape
    down = torch.randn((rank, *shape[1:]), generator=generator)
    up = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=generator)
    return down, up


def files(weights):
    """The same three changes in both layouts; kohya's with an alpha of half the rank."""
    changes = {name: factors(weights, name, seed=i) for i, name in enumerate((TO_Q, OUT, CONV))}
    kohya, peft = {}, {}
    for name, (down, up) in changes.items():
        stem = "lora_unet_" + name.replace(".", "_")
        kohya |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        kohya[f"{stem}.alpha"] = torch.tensor(1.0)
        peft |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    return {"kohya": kohya, "peft": peft}


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_fused_weights_are_the_references(tiny, weights, tmp_path, layout, weight):
    path = tmp_path / "l.safetensors"
    save_file(files(weights)[layout], path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet")
    kind = diffusers.StableDiffusionPipeline
    state, alphas = kind.lora_state_dict(str(path), unet_config=unet.config)
    kind.load_lora_into_unet(state, alphas, unet)
    unet.fuse_lora(lora_scale=weight)
    unet.unload_lora()
    expected = unet.state_dict()
    actual = find_checkpoint(str(tiny)).with_loras([f"{path}:{weight}"]).weights("unet")
    changed = 0
    for name, tensor in actual.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
        changed += not torch.equal(tensor, weights[name])
    assert changed == 3


PLAIN = {"lora_alpha": 16, "target_modules": ["to_q", "proj_in", "conv1"]}
SAVED = {
    "plain": {"r": 4},
    "rank-stabilised": {"r": 4, "use_rslora": True},
    "rank-stabilised, of rank 16": {"r": 16, "use_rslora": True},
    "a pattern": {"r": 4, "alpha_pattern": {"down_blocks.*to_q": 2}},
    "patterns": {"r": 4, "alpha_pattern": {"attn[12].to_q": 3}, "rank_pattern": {r".*conv\d": 2}},
    "DoRA": {"r": 4, "use_dora": True},
}


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_files_that_the_reference_saves_are_fused_as_it_fuses_them(
    tiny, weights, tmp_path, name, weight
):
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet")
    unet.add_adapter(LoraConfig(**PLAIN, **SAVED[name], init_lora_weights=False))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=state, **_collate_lora_metadata({"unet": unet})
    )
    unet.fuse_lora(lora_scale=weight)
    expected = {key.replace(".base_layer", ""): tensor for key, tensor in unet.state_dict().items()}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    actual = find_checkpoint(str(tiny)).with_loras([f"{path}:{weight}"]).weights("unet")
    for key, tensor in actual.items():
        scale = float(expected[key].abs().max())
        assert torch.allclose(tensor, expected[key], atol=1e-5 * scale), key
    changed = {key for key in actual if not torch.equal(actual[key], weights[key])}
    assert len(changed) > 5 and all(key.endswith(".weight") for key in changed)


def test_several_files_add_up_and_zero_is_none(tiny, weights, tmp_path):
    path = tmp_path / "l.safetensors"
    save_file(files(weights)["kohya"], path)
    checkpoint = find_checkpoint(str(tiny))
    once = checkpoint.with_loras([f"{path}:0.8"]).weights("unet")
    twice = checkpoint.with_loras([f"{path}:0.5", f"{path}:0.3"]).weights("unet")
    none = checkpoint.with_loras([f"{path}:0"]).weights("unet")
    for name, tensor in once.items():
        assert torch.allclose(tensor, twice[name], atol=1e-5)
        assert torch.equal(none[name], weights[name])
    assert "lora l:0.8" in checkpoint.with_loras([f"{path}:0.8"]).source


def test_the_text_encoder_and_a_middle_factor(tiny, weights, tmp_path):
    text = load_file(tiny / "text_encoder" / "model.safetensors")
    name = next(n for n in text if n.endswith("self_attn.q_proj.weight"))
    stem = name.removesuffix(".weight").removeprefix("text_model.")
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    out, inside = weights[f"{CONV}.weight"].shape[:2]
    mid = {"lora_up": torch.randn(out, 3, 1, 1), "lora_down": torch.randn(3, inside, 1, 1)}
    mid["lora_mid"] = torch.randn(3, 3, 3, 3)
    saved = {f"lora_unet_{CONV.replace('.', '_')}.{k}.weight": v for k, v in mid.items()}
    encoder = "lora_te_text_model_" + stem.replace(".", "_")
    saved |= {f"{encoder}.lora_down.weight": down, f"{encoder}.lora_up.weight": up}
    path = tmp_path / "l.safetensors"
    save_file(saved, path)
    checkpoint = find_checkpoint(str(tiny)).with_loras([str(path)])
    actual = checkpoint.weights("text_encoder")[name]
    assert torch.allclose(actual, text[name] + up @ down, atol=1e-5)
    change = checkpoint.weights("unet")[f"{CONV}.weight"] - weights[f"{CONV}.weight"]
    a, b, m = (mid[k].numpy() for k in ("lora_up", "lora_down", "lora_mid"))
    expected = np.zeros(change.shape)
    for o, i in np.ndindex(out, inside):  # two 1x1 convolutions around a 3x3 one, written out
        expected[o, i] = sum(
            a[o, r, 0, 0] * m[r, s] * b[s, i, 0, 0] for r in range(3) for s in range(3)
        )
    np.testing.assert_allclose(change, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("lora_unet_nowhere_to_q.lora_down.weight", (2, 8), "unet has no lora_unet_nowhere_to_q"),
        ("something.else.weight", (2, 8), "no known layout"),
        ("lora_unet_" + TO_Q.replace(".", "_") + ".lora_down.weight", (2, 8), "lacks"),
    ],
)
def test_a_file_for_another_model_is_refused(tiny, tmp_path, key, shape, message):
    path = tmp_path / "l.safetensors"
    save_file({key: torch.zeros(shape)}, path)
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(str(tiny)).with_loras([str(path)]).weights("unet")


def test_a_factor_of_another_shape_is_refused(tiny, weights, tmp_path):
    down, up = factors(weights, TO_Q)
    path = tmp_path / "l.safetensors"
    wrong = {f"unet.{TO_Q}.lora_A.weight": down[:, :3].contiguous()}
    save_file(wrong | {f"unet.{TO_Q}.lora_B.weight": up}, path)
    with pytest.raises(CheckpointError, match="another architecture"):
        find_checkpoint(str(tiny)).with_loras([str(path)]).weights("unet")


def test_files_that_are_none_are_refused(tiny):
    checkpoint = find_checkpoint(str(tiny))
    with pytest.raises(CheckpointError, match="no LoRA named"):
        checkpoint.with_loras(["none.safetensors"])
    with pytest.raises(CheckpointError, match="pickle"):
        checkpoint.with_loras(["l.pt:0.5"])
    with pytest.raises(UsageError, match="LoRA weight 99"):
        parse_lora("l.safetensors:99")
    assert parse_lora("l.safetensors:0.25")[1] == 0.25


def test_names_of_the_original_layout_are_the_references(tmp_path):
    """As files for XL name them; the reference's own conversion says which module is meant."""
    modules = [
        *("input_blocks_4_1_transformer_blocks_0_attn1_to_q", "input_blocks_4_1_proj_in"),
        *("input_blocks_4_0_in_layers_2", "input_blocks_4_0_emb_layers_1"),
        *("input_blocks_4_0_skip_connection", "input_blocks_3_0_op", "middle_block_2_in_layers_2"),
        *("middle_block_1_transformer_blocks_0_attn2_to_k", "middle_block_0_out_layers_3"),
        *("output_blocks_0_1_transformer_blocks_3_ff_net_0_proj", "output_blocks_2_2_conv"),
        *("output_blocks_8_0_in_layers_2", "output_blocks_5_1_proj_out", "output_blocks_5_2_conv"),
        "input_blocks_8_1_transformer_blocks_9_attn1_to_out_0",
    ]
    own = set()
    converted = {}
    for i, module in enumerate(modules):
        saved = {
            f"lora_unet_{module}.lora_down.weight": torch.full((2, 8), float(i + 1)),
            f"lora_unet_{module}.lora_up.weight": torch.ones((8, 2)),
            f"lora_unet_{module}.alpha": torch.tensor(1.0),
        }
        save_file(saved, tmp_path / "one.safetensors")
        ((_, place),) = read_lora(tmp_path / "one.safetensors", 1.0).changes
        own.add((place, i + 1))
        converted |= saved
    config = type("Config", (), {"layers_per_block": 2})
    kind = diffusers.StableDiffusionXLPipeline
    state, _ = kind.lora_state_dict(dict(converted), unet_config=config)
    save_file(state, tmp_path / "theirs.safetensors")  # which is the reference's older layout
    theirs = read_lora(tmp_path / "theirs.safetensors", 1.0).changes
    assert own == {(m, int(change.factors["down"].max())) for (_, m), change in theirs.items()}
