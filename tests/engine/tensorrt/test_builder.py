"""Plans really built, and every graph really parsed, by TensorRT for RTX, which needs no GPU."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from component_graphs import exported, unet_inputs
from exports import load_component
from pixel_configs import SMALL as PIXELS
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModelWithProjection
from unet_configs import FAMILIES, THREE, XL

from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import EMBEDDINGS_GRAPH, TOKEN_EMBEDDINGS, TensorSpec
from sdrt.bundle.token_embeddings import with_token_embeddings, write_embeddings_graph
from sdrt.cli.main import main
from sdrt.engine.plans import PlanKey
from sdrt.engine.tensorrt import builder as tensorrt_builder
from sdrt.engine.tensorrt import progress as tensorrt_progress
from sdrt.engine.tensorrt import variants
from sdrt.engine.tensorrt.plans import PlanOptions, get_plan
from sdrt.engine.tensorrt.variants import PORTABLE, RTX, RTX_TARGETS
from sdrt.errors import BackendError
from sdrt.export import modules
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.pixel_unet import PixelUnet, PixelUnetConfig
from sdrt.export.safety_checker import SafetyChecker
from sdrt.export.tiny_vae import AutoencoderTiny, TinyVaeConfig, TinyVaeDecoder, TinyVaeEncoder
from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig
from sdrt.export.vae import AutoencoderKL, VaeConfig, VaeDecoder, VaeEncoder

pytestmark = pytest.mark.integration

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


def parsed(graph):
    """The network, if no node of the graph is unsupported; kept alive with what it rests on."""
    builder = trt.Builder(variants.get_logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, variants.get_logger(trt))
    taken = parser.supports_model_v2(graph.read_bytes(), str(graph))
    errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert taken and all(parser.is_subgraph_supported(i) for i in range(parser.num_subgraphs)), (
        errors
    )
    network, parser = tensorrt_builder.parse_network(trt, builder, graph)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    assert trt.int64 not in {tensor.dtype for tensor in inputs}
    return network, parser, builder


def attentions(network):
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def build(folder, component, graph, profile, targets=("sm_89",)):
    marks = {"level": 3, "workspace": 0, "stripped": False, "graph": "", "weights": ""}
    key = PlanKey(component, RTX, "1", targets, "", "", (profile,), **marks, user_allocation=True)
    return tensorrt_builder.build_plan(key, graph, folder / "plan")


SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
KINDS = {  # every kind of node that a family brings
    "1.x": THREE,
    "2.1, upcast": {**SMALL, "use_linear_projection": True, "upcast_attention": True},
    "XL": {
        **SMALL,
        **{key: value for key, value in XL.items() if key.startswith(("addition", "projection"))},
    },
}


@pytest.mark.trt
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "1.x")) for kind in KINDS]
)
def test_unets_are_tensorrt_graphs(kind, tmp_path):
    config = UnetConfig.from_json(KINDS[kind])
    network, *_ = parsed(exported(tmp_path, "unet", Unet(config), unet_inputs(config)))
    assert len(list(attentions(network))) > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_unets_is_tensorrt_graphs(family, tmp_path):
    config = UnetConfig.from_json({**THREE, **FAMILIES[family]})
    parsed(exported(tmp_path, "unet", Unet(config), unet_inputs(config)))


def profile_of(inputs, rows=(1, 2, 8)):
    """Of a UNet, in which rows alone vary."""
    return {
        name: tuple((count, *value.shape[1:]) for count in rows) for name, value in inputs.items()
    }


@pytest.mark.trt
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (f != "1.x")) for f in FAMILIES],
)
def test_every_family_of_unets_builds_for_cuda_graphs(family, tmp_path):
    """TensorRT refuses a graph here that could not be captured."""
    config = UnetConfig.from_json({**THREE, **FAMILIES[family]})
    inputs = unet_inputs(config)
    graph = exported(tmp_path, "unet", Unet(config), inputs)
    build(tmp_path, "unet", graph, profile_of(inputs))
    assert (tmp_path / "plan").stat().st_size > 10_000


@pytest.mark.trt
def test_the_tiny_autoencoder_is_a_tensorrt_graph(tmp_path):
    channels = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
    vae = AutoencoderTiny(TinyVaeConfig.from_json(channels))
    latents, image = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 64, 64)
    decoder, encoder = TinyVaeDecoder(vae), TinyVaeEncoder(vae)
    parsed(exported(tmp_path / "d", "vae_decoder", decoder, {"latents": latents}))
    parsed(exported(tmp_path / "e", "vae_encoder", encoder, {"image": image}))


@pytest.mark.trt
def test_the_autoencoders_wide_head_is_decomposed_and_builds(tmp_path):
    """512 wide, which no fused kernel serves."""
    config = VaeConfig(block_out_channels=(32, 64, 128, 512), layers_per_block=1)
    vae = AutoencoderKL(config)
    image = {"image": torch.randn(2, 3, 64, 64)}
    parsed(exported(tmp_path / "e", "vae_encoder", VaeEncoder(vae), image))
    latents = {"latents": torch.randn(2, 4, 8, 8)}
    graph = exported(tmp_path / "d", "vae_decoder", VaeDecoder(vae), latents)
    network, *_ = parsed(graph)
    assert [attention.decomposable for attention in attentions(network)] == [True]
    build(tmp_path, "vae_decoder", graph, {"latents": ((1, 4, 64, 64),) * 3})
    assert (tmp_path / "plan").stat().st_size > 1_000_000


@pytest.mark.slow
def test_a_unet_of_full_width_has_a_fused_kernel_for_every_attention(tmp_path):
    config = UnetConfig.from_json(
        {
            "block_out_channels": (320, 640),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        }
    )
    graph = exported(tmp_path, "unet", Unet(config), unet_inputs(config, tokens=77))
    network, *_ = parsed(graph)
    actual = [attention.decomposable for attention in attentions(network)]
    assert len(actual) == 14 and not any(actual)
    profile = {
        "sample": tuple((rows, 4, 64, 64) for rows in (1, 2, 8)),
        "timestep": tuple((rows,) for rows in (1, 2, 8)),
        "context": ((1, 77, 768), (2, 77, 768), (8, 1232, 768)),
    }
    seconds, peak = build(tmp_path, "unet", graph, profile)
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert weights < (tmp_path / "plan").stat().st_size < 1.3 * weights
    assert 0 < seconds < 120 and 0 < peak < 8e9


@pytest.fixture(scope="module")
def planned(shapes, tmp_path_factory):
    """A copy of the embedded model's bundle with plans for one target."""
    folder = shutil.copytree(shapes, tmp_path_factory.mktemp("planned") / "shapes")
    command = ["build", "--bundle", str(folder), "--backend", RTX, "--target", "sm_89"]
    assert main(command) == 0
    return folder


def test_the_embedded_model_has_plans_without_a_gpu(planned, capsys):
    sidecars = [json.loads(path.read_text()) for path in planned.glob("plans/*/*.json")]
    components = set(open_bundle(planned).manifest.components) - {"unet_shallow", "unet_control"}
    assert {s["key"]["component"] for s in sidecars} == components
    for sidecar in sidecars:
        assert sidecar["key"]["version"] == trt.__version__
        assert sidecar["key"]["targets"] == ["sm_89"] and not sidecar["key"]["stripped"]
        assert sidecar["peak_bytes"] > 100e6 and sidecar["seconds"] > 0
    before = {path: path.stat().st_mtime_ns for path in planned.rglob("*.plan")}
    assert main(["build", "--bundle", str(planned), "--backend", RTX, "--target", "sm_89"]) == 0
    assert capsys.readouterr().out == f"{planned}\n"
    assert {path: path.stat().st_mtime_ns for path in planned.rglob("*.plan")} == before


def test_weights_may_stay_with_the_host(planned):
    options = PlanOptions(("sm_89",), streamed=True)
    plan = get_plan(open_bundle(planned), "unet", RTX, None, options)
    assert plan.key.streamed and not plan.key.stripped
    usual = get_plan(open_bundle(planned), "unet", RTX, None, PlanOptions(("sm_89",)))
    assert usual.path != plan.path and not usual.key.streamed
    other = get_plan(open_bundle(planned), "text_encoder", RTX, None, options)
    assert not other.key.streamed


def test_inspect_says_what_must_be_fused(planned, capsys):
    from sdrt.engine.gpu import detect_gpus

    if detect_gpus().gpus:
        pytest.skip("there is a GPU")
    assert main(["inspect", "--bundle", str(planned), "--layers", "--json"]) == 0
    (actual,) = json.loads(capsys.readouterr().out)
    unet = actual["components"]["unet"]["layers"]
    assert {what: len(nodes) for what, nodes in unet["nodes"].items()} == {
        "attention": 0,
        "attention, decomposed": 8,  # single precision has no fused kernel
        "normalisation": 33,
    }
    assert unet["engine"] is None and "no NVIDIA GPU" in unet["why_no_engine"]
    assert main(["inspect", "--bundle", str(planned), "--layers"]) == 0
    assert "normalisation 33" in capsys.readouterr().out


def test_layers_are_found_by_the_nodes_that_they_name(planned):
    """By the marks that the parser really puts into a network, which the inspector repeats."""
    from sdrt.engine.tensorrt.inspector import layers_by_node

    network, *_ = parsed(open_bundle(planned).graph("unet"))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    extras = [{"Name": layer.name, "Metadata": layer.metadata} for layer in layers]
    actual = layers_by_node(
        ["node_group_norm", "node_scaled_dot_product_attention", "none"], extras
    )
    assert actual["node_group_norm"] == ["node_group_norm"] and actual["none"] == []
    assert actual["node_scaled_dot_product_attention"]


def test_one_plan_serves_every_target(planned):
    plan = get_plan(open_bundle(planned), "text_encoder", RTX, None, PlanOptions())
    assert plan.key.targets == PORTABLE and "portable" in str(plan.path)
    named = {f"sm_{int(c)}" for c in trt.ComputeCapability.__members__.values() if int(c) > 1}
    assert set(RTX_TARGETS) == named


def test_turing_takes_no_single_precision(planned):
    with pytest.raises(BackendError, match="Turing"):
        get_plan(open_bundle(planned), "text_encoder", RTX, None, PlanOptions(("sm_75",)))


def test_what_tensorrt_says_is_in_the_error(planned):
    options = PlanOptions(("sm_89",), workspace=1)
    with pytest.raises(BackendError, match="within workspace limit"):
        get_plan(open_bundle(planned), "text_encoder", RTX, None, options)
    assert not list(planned.rglob("*.partial"))


def test_a_graph_that_tensorrt_refuses_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"does not take .*model\.onnx"):
        build(tmp_path, "unet", tmp_path / "model.onnx", {})


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--backend", RTX, "--target", "sm_90"], 2, "--target sm_75"),
        (["--backend", "tensorrt"], 5, "--backend tensorrt-rtx"),
        (["--target", "sm_89"], 2, "--backend tensorrt or tensorrt-rtx"),
        (["--backend", RTX, "--optimization-level", "6"], 2, "expected 0 to 5"),
        (["--backend", RTX, "--workspace", "-1"], 2, "--workspace -1"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(planned, capsys, options, code, said):
    assert main(["build", "--bundle", str(planned), *options]) == code
    assert said in capsys.readouterr().err


def test_ctrl_c_stops_a_build_and_leaves_nothing(planned, tmp_path):
    folder = shutil.copytree(planned, tmp_path / "b", ignore=shutil.ignore_patterns("plans"))
    command = [sys.executable, "-m", "sdrt", "build", "--bundle", str(folder), "--backend", RTX]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("unet: building"):
            break
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(timeout=30) == 130 and "Interrupted" in said
    assert not list(folder.rglob("*.partial")) and not list(folder.rglob("unet-*"))


def test_progress_counts_every_step_once():
    progress = tensorrt_progress.Progress("unet", shown=True)
    progress.start("outer", 3)
    progress.start("inner", 2)
    assert progress.step("inner")
    progress.finish("inner")
    progress.stopped = True
    assert not progress.step("outer")
    progress.finish("outer")
    assert progress._bar.n == progress._bar.total == 5
    progress.close()


def test_the_text_encoder_of_a_checkpoint_is_a_tensorrt_graph(tiny, tmp_path):
    logging.getLogger("sdrt").setLevel(logging.WARNING)
    module = load_component("text_encoder", find_checkpoint(str(tiny)))
    ids = {"input_ids": torch.zeros((2, 32), dtype=torch.int32)}
    parsed(exported(tmp_path, "text_encoder", module, ids))


@pytest.mark.slow
def test_unets_of_pixels_are_tensorrt_graphs(tmp_path):
    config = PixelUnetConfig.from_json({**PIXELS, "attention_head_dim": 8})
    inputs = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3.0, 700.0])}
    parsed(exported(tmp_path, "unet", PixelUnet(config), inputs))


@pytest.mark.trt
def test_the_safety_checker_is_a_tensorrt_graph(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(vision_config=vision, projection_dim=8)
    config.vision_config._attn_implementation = "sdpa"
    inputs = {"pixels": torch.randn(2, 3, 32, 32)}
    parsed(exported(tmp_path, "safety_checker", SafetyChecker(config), inputs, torch.float32))


@pytest.mark.trt
def test_the_paired_text_encoders_of_xl_are_tensorrt_graphs(tmp_path):
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config._attn_implementation = "sdpa"
    module = modules.PairedTextEncoder(CLIPTextModelWithProjection(config))
    ids = {"input_ids": torch.zeros((2, 77), dtype=torch.int32)}
    graph = exported(tmp_path, "text_encoder_2", module, ids)
    parsed(graph)
    words = TensorSpec(TOKEN_EMBEDDINGS, "float16", ("rows", 77, 16))
    write_embeddings_graph(graph.parent, words)
    parsed(graph.with_name(EMBEDDINGS_GRAPH))


@pytest.mark.trt
def test_the_text_encoder_that_reads_words_has_a_plan(shapes, tmp_path):
    bundle = open_bundle(shutil.copytree(shapes, tmp_path / "bundle"))
    reading = with_token_embeddings(bundle, "text_encoder")
    options = PlanOptions(targets=("sm_89",))
    plans = [get_plan(b, "text_encoder", RTX, None, options) for b in (bundle, reading)]
    assert plans[0].path != plans[1].path
    assert plans[1].path.stat().st_size > 1000
