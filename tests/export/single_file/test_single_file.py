"""Single files as users have them: 8-bit weights, keys that shape nothing, and what is refused."""

import json
import logging
import shutil

import pytest
import torch
from exports import load_component
from safetensors.torch import save_file
from single_files import single_file, tiny_parts

from sdrt.errors import CheckpointError
from sdrt.export.build import BuildPlan, _announce
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.model_spec import read_model_spec

pytestmark = pytest.mark.integration

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
LAYER = f"{UNET}middle_block.1.proj_in"
PUBLISHED = "mid_block.attentions.0.proj_in.weight"


@pytest.fixture
def tensors(vocabulary):
    return single_file(*tiny_parts("1.x", vocabulary))


def unet_weight(path, name=PUBLISHED):
    return load_component("unet", find_checkpoint(str(path))).state_dict()[name]


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.bfloat16, torch.float16, torch.float64),
    ],
)
def test_weights_of_any_floating_type_are_what_torch_reads(dtype, tensors, written):
    stored = {
        key: tensor.to(dtype) if key.startswith(UNET) and tensor.ndim > 1 else tensor
        for key, tensor in tensors.items()
    }
    assert torch.equal(unet_weight(written(stored)), stored[f"{LAYER}.weight"].to(torch.float32))


def in_eight_bits(weight, scale, dtype=torch.float8_e4m3fn):
    return (weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)


def described_as(kind):
    text = json.dumps({"format": kind}).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("layout", ["scale_weight", "weight_scale", "one scale a row"])
def test_scaled_weights_are_multiplied_by_their_scales(layout, dtype, tensors, written):
    weight = tensors[f"{LAYER}.weight"]
    rows = weight.abs().amax(dim=tuple(range(1, weight.ndim))) / 100
    scale = rows[:, None] if layout == "one scale a row" else rows.max()
    stored = in_eight_bits(weight, scale, dtype)
    added = {f"{LAYER}.weight": stored}
    if layout == "scale_weight":
        added |= {f"{LAYER}.scale_weight": scale, f"{LAYER}.scale_input": torch.tensor(3.0)}
        added[f"{UNET}scaled_fp8"] = torch.empty(0, dtype=dtype)
    else:
        added |= {f"{LAYER}.weight_scale": scale, f"{LAYER}.input_scale": torch.tensor(3.0)}
        added[f"{LAYER}.comfy_quant"] = described_as(str(dtype).removeprefix("torch."))
    actual = unet_weight(written({**tensors, **added}))
    expected = stored.float() * (scale.reshape(-1, 1, 1, 1) if scale.ndim else scale)
    assert torch.equal(actual, expected)
    assert torch.allclose(actual, weight, atol=float(rows.max()) * 16)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({f"{LAYER}.weight": torch.ones(128, 128, 1, 1, dtype=torch.int8)}, "stored as int8"),
        ({f"{LAYER}.weight_scale": torch.ones(())}, "only scales of 8-bit floating-point"),
        ({f"{LAYER}s.scale_weight": torch.ones(())}, r"proj_ins\.scale_weight has no"),
        ({f"{LAYER}.comfy_quant": described_as("nvfp4")}, "quantized as 'nvfp4'; expected float8"),
        (
            {
                f"{LAYER}.weight": torch.ones(128, 128, 1, 1).to(torch.float8_e4m3fn),
                f"{LAYER}.weight_scale": torch.ones(128, 4),
            },
            r"weight_scale is \[128, 4\]",
        ),
        ({f"{LAYER}.weight.absmax": torch.ones(8)}, "absmax, which no part"),
        ({f"{LAYER}.weight": torch.full((128, 128, 1, 1), torch.nan)}, "holds NaN"),
        (
            {f"{LAYER}.weight": torch.full((128, 128, 1, 1), 1e300, dtype=torch.float64)},
            "or infinity",
        ),
        ({f"{UNET}input_blocks.1.2.weight": torch.ones(1)}, "input_blocks.1.2.weight, which no"),
        ({f"{UNET}encoder_hid_proj.weight": torch.ones(1)}, "encoder_hid_proj.weight, which no"),
        ({f"{VAE}decoder.mid.attn_2.q.weight": torch.ones(1)}, "attn_2.q.weight, which no part"),
        ({f"{TEXT}encoder.layers.0.adapter.weight": torch.ones(1)}, "adapter.weight, which no"),
        ({"control_model.x": torch.ones(1), "gate": torch.ones(1)}, "control_model.x, gate, which"),
        ({"edm_mean": torch.ones(1), "edm_std": torch.ones(1)}, "edm_mean, edm_std: .*EDM"),
        ({"scale_factor": torch.tensor(0.5)}, r"scale_factor is \[0.5\]; expected 0.18215"),
    ],
)
def test_what_may_shape_the_image_is_refused_by_name(added, message, tensors, written):
    with pytest.raises(CheckpointError, match=message):
        load_component("unet", find_checkpoint(str(written({**tensors, **added}))))


def test_a_scale_is_never_dropped_from_a_folder(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = dict(load_component("unet", find_checkpoint(str(tiny))).state_dict())
    weights["conv_in.weight"] = weights["conv_in.weight"].to(torch.float8_e5m2)
    expected = weights["conv_in.weight"].float() * 3
    save_file({**weights, "conv_in.weight_scale": torch.tensor(3.0)}, file)
    assert torch.equal(unet_weight(folder, "conv_in.weight"), expected)


NOTHING = {
    f"{TEXT}embeddings.position_ids": torch.arange(32)[None].half(),
    "cond_stage_model.transformer.text_projection.weight": torch.eye(64),
    "cond_stage_model.transformer.logit_scale": torch.tensor(torch.nan),
    "cond_stage_model.logit_scale": torch.tensor(4.6),
    "model_ema.decay": torch.tensor(0.99),
    "model_ema.num_updates": torch.tensor(3),
    "model_ema.diffusion_modelinput_blocks00weight": torch.full((64, 4, 3, 3), 9.0),
    "sqrt_recip_alphas_cumprod": torch.tensor([1.0, torch.inf]),
    **{
        name: torch.ones(2)
        for name in (
            *("alphas_cumprod", "alphas_cumprod_prev", "betas", "sqrt_alphas_cumprod"),
            *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "logvar"),
            *("posterior_variance", "posterior_mean_coef1", "sqrt_recipm1_alphas_cumprod"),
            *("posterior_log_variance_clipped", "denoiser.sigmas", "lvlb_weights"),
        )
    },
    f"{VAE}loss.discriminator.main.0.weight": torch.ones(1),
    f"{VAE}model_ema.decay": torch.tensor(0.99),
    "scale_factor": torch.tensor(0.18215),
    "global_step": torch.tensor(470000),
    "epoch": torch.tensor(3),
    "optimizer_states.0.exp_avg": torch.ones(2),
    "loss.logvar": torch.ones(1),
}


def test_what_shapes_nothing_is_passed_over_and_said_in_one_line(tensors, written, caplog):
    plain = find_checkpoint(str(written(tensors, "plain.safetensors")))
    more = find_checkpoint(str(written({**tensors, **NOTHING}, "more.safetensors")))
    for part in plain.parts:
        expected, actual = plain.weights(part), more.weights(part)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        load_component(part, more)
    spec = read_model_spec(more)
    caplog.set_level(logging.DEBUG, "sdrt.build")
    _announce(more, spec, BuildPlan("more"), written(tensors).parent / "bundle")
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert "ignored keys" in line and "model_ema.* (3)" in line and "\n" not in line


@pytest.mark.parametrize("name", ["CAPITALS.SAFETENSORS", "Mixed.SafeTensors"])
def test_a_suffix_may_be_in_capitals(name, tensors, written):
    path = written(tensors, name)
    assert find_checkpoint(str(path)).name == path.stem
    assert find_checkpoint(str(path), parts={"vae": str(path)}).weights("vae")
    with pytest.raises(CheckpointError, match="there is no file"):
        find_checkpoint(f"missing-{name}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora_unet_mid_block.lora_down.weight"], "seems to be a LoRA: type --lora FILE"),
        (["unet.mid_block.attn.lora_A.weight"], "seems to be a LoRA"),
        (["control_model.zero_convs.0.0.weight"], "a ControlNet, which is not read here"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"], "a ControlNet"),
        (["emb_params"], "a textual inversion embedding"),
        (["clip_l", "clip_g"], "a textual inversion embedding"),
        (["<cat>"], "a textual inversion embedding"),
        (["encoder.down.0.block.0.conv1.weight"], "autoencoder alone: type --model MODEL --vae"),
        (["decoder.up_blocks.0.resnets.0.conv1.weight"], "an autoencoder alone"),
        (["input_blocks.0.0.weight"], "a UNet alone: type --model MODEL --unet FILE"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "text encoder alone: .*--text-encoder"),
        (["conditioner.embedders.0.model.token_embedding.weight"], "a text encoder alone"),
        (["model.diffusion_model.joint_blocks.0.x"], "a model of Stable Diffusion 3"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "a model of the FLUX family"),
        (["something.else"], "give what it lacks with --unet FILE --vae FILE --text-encoder FILE"),
    ],
)
def test_a_file_that_is_no_model_is_called_what_it_seems_to_be(keys, message, written):
    path = written({key: torch.ones(1) for key in keys})
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(str(path))


@pytest.mark.parametrize("how", ["cut off", "text"])
@pytest.mark.parametrize("option", ["model", "vae", "unet", "text_encoder"])
def test_a_file_that_is_not_whole_is_refused(how, option, tensors, written, tiny):
    path = written(tensors)
    path.write_bytes(path.read_bytes()[:-100] if how == "cut off" else b"<html>Not found</html>")
    expected = "complete safetensors file: .*" if how == "cut off" else "safetensors file"
    with pytest.raises(CheckpointError, match=f"is not a {expected}\nhint: download it again"):
        if option == "model":
            find_checkpoint(str(path))
        else:
            find_checkpoint(str(tiny), parts={option: str(path)})
