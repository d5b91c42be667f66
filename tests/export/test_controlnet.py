"""ControlNets and T2I-Adapters against diffusers', their file layouts, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from single_files import original_unet_name
from unet_configs import THREE, XL

from sdrt.errors import CheckpointError
from sdrt.export.control_checkpoint import find_control_checkpoint
from sdrt.export.t2i_adapter import T2IAdapter, T2IAdapterConfig

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")
COMMON = {
    name: value for name, value in THREE.items() if name not in ("up_block_types", "sample_size")
}
XL_COMMON = {name: value for name, value in XL.items() if name != "up_block_types"}
UNATTENDED = {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}
CONTROLNETS = {
    "1.x": {},
    "2.x": {
        "use_linear_projection": True,
        "attention_head_dim": (2, 4, 8),
        "upcast_attention": True,
    },
    "bgr": {"controlnet_conditioning_channel_order": "bgr"},
    "shuffle": {"global_pool_conditions": True},
    "XL": XL_COMMON,
    "XL, mid": {
        **XL_COMMON,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    },
    "XL, small": {**XL_COMMON, **UNATTENDED},
}
# As wide as files that tell their groups and heads by their shapes.
WIDE = {
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "conditioning_embedding_out_channels": (4, 8, 8, 16),
}


def random_controlnet(**config):
    """One whose residuals are not zeros, as those of a new one are."""
    torch.manual_seed(0)
    net = diffusers.ControlNetModel(**config).eval()
    layers = (net.controlnet_down_blocks, net.controlnet_mid_block)
    for module in (*layers, net.controlnet_cond_embedding.conv_out):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", CONTROLNETS)
def test_a_controlnet_is_diffusers(family, tmp_path):
    embedding = {"conditioning_embedding_out_channels": (4, 8, 8, 16)}
    reference = random_controlnet(**{**COMMON, **CONTROLNETS[family], **embedding})
    reference.save_pretrained(tmp_path)
    own = find_control_checkpoint(str(tmp_path)).load()
    inputs = {
        "sample": torch.randn(2, 4, 8, 12),
        "timestep": torch.tensor([3.0, 700.0]),
        "context": torch.randn(2, 7, 12),
    }
    image = torch.rand(2, 3, 64, 96)
    pooled, time_ids = torch.randn(2, 6), torch.tensor([[1024.0, 768, 0, 8, 512, 512]] * 2)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    with torch.no_grad():
        down, mid = reference(*inputs.values(), image, added_cond_kwargs=added, return_dict=False)
        actual = own(**inputs, control_image=image, pooled=pooled, time_ids=time_ids)
    assert len(actual) == len(down) + 1
    for own_residual, residual in zip(actual, (*down, mid), strict=True):
        assert own_residual.shape == residual.shape
        assert relative(own_residual, residual) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "channels", "factor", "in_channels"),
    [
        ("full_adapter", (8, 16, 24, 24), 8, 3),
        ("full_adapter", (8, 16), 8, 1),
        ("full_adapter_xl", (8, 16, 24, 24), 16, 3),
        ("light_adapter", (8, 16, 24), 8, 3),
    ],
)
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_an_adapter_is_diffusers(kind, channels, factor, in_channels, layout, tmp_path):
    torch.manual_seed(0)
    reference = diffusers.T2IAdapter(
        in_channels=in_channels,
        channels=list(channels),
        num_res_blocks=2,
        downscale_factor=factor,
        adapter_type=kind,
    ).eval()
    where = tmp_path / "net"
    if layout == "folder":
        reference.save_pretrained(where)
    else:
        where = tmp_path / "adapter.safetensors"
        save_file(reference.state_dict(), where)
    own = find_control_checkpoint(str(where)).load()
    image = torch.rand(2, 1, 128, 64).expand(-1, 3, -1, -1)
    image = image if in_channels == 1 else torch.rand(2, 3, 128, 64)
    with torch.no_grad():
        actual, expected = own(image), reference(image[:, :in_channels])
    for state, other in zip(actual, expected, strict=True):
        assert relative(state, other) <= 1e-5


def original_names(weights):
    """The other direction, written independently of the code under test."""
    numbers = iter(range(2, 100, 2))
    hint = {"conv_in": "0"}
    hint |= {f"blocks.{i}": str(next(numbers)) for i in range(6)}
    hint["conv_out"] = str(next(numbers))
    result = {}
    for name, tensor in weights.items():
        head, _, kind = name.rpartition(".")
        if head.startswith("controlnet_cond_embedding."):
            new = f"input_hint_block.{hint[head.partition('.')[2]]}.{kind}"
        elif head.startswith("controlnet_down_blocks."):
            new = f"zero_convs.{head.partition('.')[2]}.0.{kind}"
        elif head == "controlnet_mid_block":
            new = f"middle_block_out.0.{kind}"
        else:
            new = original_unet_name(name, weights)
        result[new] = tensor
    return result


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_the_original_layout_is_read_as_diffusers_folder(prefix, tmp_path):
    reference = random_controlnet(**WIDE)
    reference.save_pretrained(tmp_path / "folder")
    original = original_names(reference.state_dict())
    file = tmp_path / "control_shuffle.safetensors"
    save_file({f"{prefix}{name}": tensor.clone() for name, tensor in original.items()}, file)
    folder, single = (find_control_checkpoint(str(path)) for path in (tmp_path / "folder", file))
    assert single.config.global_pool_conditions and not folder.config.global_pool_conditions
    own, other = single.load().state_dict(), folder.load().state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    fields = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")
    for field in (*fields, "norm_num_groups", "use_linear_projection", "in_channels"):
        assert getattr(single.config.unet, field) == getattr(folder.config.unet, field), field
    assert single.family == "Stable Diffusion 1.x"


REFUSED = {
    "lora_controlnet": "a Control-LoRA",
    "input_blocks.1.0.in_layers.2.up": "a Control-LoRA",
    "task_embedding": "a union ControlNet",
    "transformer_blocks.0.attn.to_q.weight": "a transformer's ControlNet",
    "lllite_unet_input_blocks.cond_emb.weight": "a ControlNet-LLLite",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "down_blocks.0.resnets.0.conv1.weight": "holds no ControlNet",
}


@pytest.mark.parametrize("key", REFUSED)
def test_nets_of_other_designs_are_refused_by_name(key, tmp_path):
    file = tmp_path / "net.safetensors"
    save_file({key: torch.zeros(2, 2)}, file)
    with pytest.raises(CheckpointError, match=REFUSED[key]):
        find_control_checkpoint(str(file))


def test_what_is_not_understood_is_refused(tmp_path):
    for kind in ("ControlNetUnionModel", "SD3ControlNetModel", None):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
        with pytest.raises(CheckpointError, match="expected ControlNetModel or T2IAdapter"):
            find_control_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="is a pickle"):
        find_control_checkpoint(str(tmp_path / "net.pth"))
    with pytest.raises(CheckpointError, match="no ControlNet at"):
        find_control_checkpoint("nowhere")
    with pytest.raises(CheckpointError, match="only the hub has any"):
        find_control_checkpoint(str(tmp_path), revision="main")
    reference = random_controlnet(**WIDE)
    net = tmp_path / "net"
    reference.save_pretrained(net)
    config = json.loads((net / "config.json").read_text())
    for wrong, message in (
        ({"conditioning_channels": 4}, "control images of 4 channels"),
        ({"controlnet_conditioning_channel_order": "grb"}, "expected rgb or bgr"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"block_out_channels": [64, 192]}, r"controlnet: .* is \[128, .*expected \[192"),
    ):
        (net / "config.json").write_text(json.dumps({**config, **wrong}))
        with pytest.raises(CheckpointError, match=message):
            find_control_checkpoint(str(net)).load()


def test_an_adapters_first_layer_reads_pixels():
    """What pixel unshuffle and a convolution are, one convolution with a stride is."""
    config = T2IAdapterConfig(channels=(8,), num_res_blocks=1)
    own = T2IAdapter(config)
    assert own.adapter.conv_in.kernel_size == (24, 24) and own.adapter.conv_in.stride == (8, 8)
