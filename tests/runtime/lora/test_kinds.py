"""LoRA files of every algorithm against the weights that PEFT itself merges."""

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file

from sdrt.runtime.lora.adapters import compute_deltas, read_lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LINEAR, POINT, CONV = "mid_block.to_q", "mid_block.proj_in", "mid_block.conv1"


def model():
    torch.manual_seed(0)
    layers = {"to_q": torch.nn.Linear(12, 16), "proj_in": torch.nn.Conv2d(12, 8, 1)}
    layers |= {"conv1": torch.nn.Conv2d(8, 12, 3), "norm1": torch.nn.GroupNorm(4, 8)}
    return torch.nn.ModuleDict({"mid_block": torch.nn.ModuleDict(layers)})


def weights():
    return {name: tensor.numpy() for name, tensor in model().state_dict().items()}


def merged(path, weight=1.0, stored=None):
    """The weights with the file's changes; `stored` as a bundle has them."""
    base = stored or weights()
    shapes = {name: array.shape for name, array in base.items()}
    changes = compute_deltas("unet", shapes, [read_lora(path, weight)], base.__getitem__)
    return base | {name: base[name] + delta for name, delta in changes}


def saved_by_peft(config, folder, weight):
    """A file of PEFT's own, random, and the weights that PEFT merges."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + torch.rand_like(parameter)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    wrapped.save_pretrained(folder)
    for module in wrapped.modules():
        if hasattr(module, "scaling") and "default" in module.scaling:
            module.scaling["default"] *= weight
    state = wrapped.merge_and_unload().state_dict()
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


ALL = {"target_modules": ["to_q", "proj_in", "conv1"]}
PLAIN = {"r": 2, "lora_alpha": 6} | ALL
CONFIGS = {
    "LoRA": LoraConfig(**PLAIN),
    "rank-stabilised": LoraConfig(**PLAIN, use_rslora=True),
    "patterns": LoraConfig(
        **PLAIN, alpha_pattern={r".*(to_q|proj_\w+)": 3}, rank_pattern={"conv[0-9]": 5}
    ),
    "patterns, rank-stabilised": LoraConfig(
        **PLAIN, use_rslora=True, alpha_pattern={"^mid_block.conv1": 1}, rank_pattern={"to_.": 4}
    ),
    "biases": LoraConfig(**PLAIN, lora_bias=True),
    "DoRA": LoraConfig(**PLAIN, use_dora=True),
    "DoRA, rank-stabilised": LoraConfig(**PLAIN, use_dora=True, use_rslora=True),
    "LoHa": LoHaConfig(r=2, alpha=5, **ALL),
    "LoHa with cores": LoHaConfig(r=2, alpha=5, use_effective_conv2d=True, **ALL),
    "LoHa with patterns": LoHaConfig(
        r=2, alpha=5, alpha_pattern={"to.q": 3}, rank_pattern={"conv1": 4}, **ALL
    ),
    "LoKr": LoKrConfig(r=1, alpha=5, **ALL),
    "LoKr of four factors": LoKrConfig(
        r=1, alpha=5, decompose_both=True, decompose_factor=4, **ALL
    ),
    "LoKr with cores": LoKrConfig(r=1, alpha=5, use_effective_conv2d=True, **ALL),
    "LoKr of whole matrices": LoKrConfig(r=8, alpha=5, rank_pattern={"to_q": 10}, **ALL),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("weight", [1.0, 0.6, -0.5])
def test_merged_weights_are_pefts(tmp_path, name, weight):
    expected = saved_by_peft(CONFIGS[name], tmp_path, weight)
    actual = merged(tmp_path / "adapter_model.safetensors", weight)
    assert set(actual) == set(expected)
    changed = {key for key in expected if not np.array_equal(actual[key], weights()[key])}
    biases = {f"{key}.bias" for key in (LINEAR, POINT, CONV)} if name == "biases" else set()
    assert changed == {f"{key}.weight" for key in (LINEAR, POINT, CONV)} | biases
    for key, array in expected.items():
        np.testing.assert_allclose(actual[key], array, atol=1e-5 * np.abs(array).max(), err_msg=key)


def random_(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def norms(weight, axis):
    return weight.transpose(0, axis).flatten(1).norm(dim=1)


def rescaled(weight, magnitudes, axis):
    """DoRA: what lies at each index of the axis has its magnitude."""
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return weight * (magnitudes / norms(weight, axis)).reshape(shape)


DOWN, UP = random_(3, 12), random_(16, 3)
CORE = {"lora_down.weight": random_(3, 8, 1, 1), "lora_mid.weight": random_(3, 3, 3, 3)}
KRON = {"lokr_w1": random_(4, 3), "lokr_w2_a": random_(4, 2), "lokr_w2_b": random_(2, 4)}
HADA = {"hada_w1_a": random_(16, 2), "hada_w1_b": random_(2, 12)}
HADA |= {"hada_w2_a": random_(16, 2) + 1, "hada_w2_b": random_(2, 12) + 1}
LORA = {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(6.0)}
OUTPUTS, INPUTS, CHANNELS = random_(16).abs() + 1, random_(12).abs() + 1, random_(8).abs() + 1
LYCORIS = {  # a module, its tensors, and the weight that LyCORIS makes of the model's
    "LoCon with a core": (
        CONV,
        CORE | {"lora_up.weight": random_(12, 3, 1, 1)},
        lambda w: (
            w
            + torch.einsum(
                "or,rshw,si->oihw",
                random_(12, 3, 1, 1)[:, :, 0, 0],
                CORE["lora_mid.weight"],
                CORE["lora_down.weight"][:, :, 0, 0],
            )
        ),
    ),
    "LoHa": (
        LINEAR,
        HADA | {"alpha": torch.tensor([1.0])},
        lambda w: (
            w
            + (HADA["hada_w1_a"] @ HADA["hada_w1_b"]) * (HADA["hada_w2_a"] @ HADA["hada_w2_b"]) / 2
        ),
    ),
    "LoKr": (
        LINEAR,
        KRON | {"alpha": torch.tensor([[1.0]])},
        lambda w: w + torch.kron(KRON["lokr_w1"], KRON["lokr_w2_a"] @ KRON["lokr_w2_b"]) / 2,
    ),
    "LoKr of whole matrices, which no alpha scales": (
        CONV,
        {"lokr_w1": random_(3, 2), "lokr_w2": random_(4, 4, 3, 3), "alpha": torch.tensor(5.0)},
        lambda w: w + torch.kron(random_(3, 2)[:, :, None, None], random_(4, 4, 3, 3)),
    ),
    "DoRA of outputs": (
        LINEAR,
        LORA | {"dora_scale": OUTPUTS[:, None]},
        lambda w: rescaled(w + 2 * UP @ DOWN, OUTPUTS, 0),
    ),
    "DoRA of inputs": (
        LINEAR,
        LORA | {"dora_scale": INPUTS[None]},
        lambda w: rescaled(w + 2 * UP @ DOWN, INPUTS, 1),
    ),
    "DoRA of a convolution's inputs": (
        CONV,
        {"diff": random_(12, 8, 3, 3), "dora_scale": CHANNELS[None, :, None, None]},
        lambda w: rescaled(w + random_(12, 8, 3, 3), CHANNELS, 1),
    ),
    "(IA)^3 of outputs": (
        LINEAR,
        {"weight": OUTPUTS, "on_input": torch.tensor(0)},
        lambda w: w * (1 + OUTPUTS[:, None]),
    ),
    "(IA)^3 of a convolution's inputs": (
        CONV,
        {"weight": CHANNELS[None, :, None, None], "on_input": torch.tensor(True)},
        lambda w: w * (1 + CHANNELS[None, :, None, None]),
    ),
    "a difference": (CONV, {"diff": random_(12, 8, 3, 3)}, lambda w: w + random_(12, 8, 3, 3)),
    "a norm": ("mid_block.norm1", {"w_norm": CHANNELS}, lambda w: w + CHANNELS),
}


@pytest.mark.parametrize("name", LYCORIS)
@pytest.mark.parametrize("weight", [1.0, 0.6, -0.5, 0.0])
def test_lycoris_files_make_its_weights(tmp_path, name, weight):
    """At other weights than 1 so much of the difference is added."""
    module, tensors, formula = LYCORIS[name]
    stem = "lora_unet_" + module.replace(".", "_")
    save_file({f"{stem}.{k}": t.contiguous() for k, t in tensors.items()}, tmp_path / "l")
    base = torch.from_numpy(weights()[f"{module}.weight"])
    expected = (base + weight * (formula(base) - base)).numpy()
    actual = merged(tmp_path / "l", weight)[f"{module}.weight"]
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    assert np.array_equal(actual, base) == (weight == 0)
    if base.ndim == 2:
        rest = {f"{module}.weight.T": np.ascontiguousarray(base.numpy().T)}
        turned = merged(tmp_path / "l", weight, rest)[f"{module}.weight.T"]
        np.testing.assert_allclose(turned.T, expected, atol=1e-5 * np.abs(expected).max())


def test_biases_are_changed(tmp_path):
    names = {"lora_unet_mid_block_to_q.diff_b": 16, "lora_unet_mid_block_norm1.b_norm": 8}
    save_file({name: random_(size) for name, size in names.items()}, tmp_path / "l")
    actual, base = merged(tmp_path / "l", 0.5), weights()
    for module, size in (("to_q", 16), ("norm1", 8)):
        name = f"mid_block.{module}.bias"
        np.testing.assert_allclose(actual[name], base[name] + random_(size).numpy() / 2, atol=1e-6)
    assert sum(not np.array_equal(actual[name], base[name]) for name in base) == 2


@pytest.mark.parametrize("down_axes", [2, 4])
@pytest.mark.parametrize("up_axes", [2, 4])
@pytest.mark.parametrize("module", [LINEAR, POINT])
def test_linear_layers_and_1x1_convolutions_are_one(tmp_path, module, down_axes, up_axes):
    layer = model().get_submodule(module)
    down, up = random_(3, 12), random_(len(layer.weight), 3)
    stem = f"unet.{module}"
    saved = {
        f"{stem}.lora_A.weight": down.reshape(3, 12, *[1] * (down_axes - 2)),
        f"{stem}.lora_B.weight": up.reshape(-1, 3, *[1] * (up_axes - 2)),
    }
    save_file(saved, tmp_path / "l")
    actual = merged(tmp_path / "l")[f"{module}.weight"]
    expected = layer.weight.detach() + (up @ down).reshape(layer.weight.shape)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("alpha", [torch.tensor(4.0), torch.tensor([4.0]), torch.tensor([[4]])])
def test_numbers_of_every_width(tmp_path, dtype, alpha):
    stem = "lora_unet_mid_block_to_q"
    down, up = DOWN.to(dtype), UP.double()
    saved = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}
    save_file(saved, tmp_path / "l")
    expected = weights()[f"{LINEAR}.weight"] + (UP @ down.float()).numpy() * 4 / 3
    np.testing.assert_allclose(merged(tmp_path / "l")[f"{LINEAR}.weight"], expected, atol=1e-5)
