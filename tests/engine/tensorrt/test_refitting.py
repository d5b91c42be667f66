"""Which weights of a graph a plan can replace, asked of the real network of TensorRT for RTX, which
needs no GPU for it. Building such a plan does: this shows where it stops without one.
"""

import shutil

import numpy as np
import pytest
from component_graphs import exported, unet_inputs
from unet_configs import FAMILIES, THREE

from sdrt.bundle import open_bundle
from sdrt.bundle.graph_weights import read_graph_weights
from sdrt.bundle.safetensors import Tensors
from sdrt.bundle.token_embeddings import with_token_embeddings
from sdrt.cli.main import main
from sdrt.engine.parity import change_weights
from sdrt.engine.plans import key_differences
from sdrt.engine.tensorrt import builder as tensorrt_builder
from sdrt.engine.tensorrt import variants
from sdrt.engine.tensorrt.plans import PlanOptions, required_key
from sdrt.engine.tensorrt.refitting import LORA_COMPONENTS, mark_refittable
from sdrt.engine.tensorrt.variants import RTX
from sdrt.errors import BackendError, BundleError
from sdrt.export.unet import Unet
from sdrt.export.unet_config import UnetConfig

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
CONV = "down_blocks.0.resnets.0.conv1.weight"


def marked(graph):
    """The names that TensorRT's network says can be replaced, after all layers were marked."""
    builder = trt.Builder(variants.get_logger(trt))
    network, _parser = tensorrt_builder.parse_network(trt, builder, graph)
    mark_refittable(network, read_graph_weights(graph).layers)
    stored = Tensors(graph.with_name("model.safetensors"))
    return {name for name in stored if network.are_weights_marked_refittable(name)}


def lora_targets(graph):
    """What adapters are trained for: the weights of layers, not embeddings, in the file."""
    stored = Tensors(graph.with_name("model.safetensors"))
    return {
        name
        for name in stored
        if name.endswith((".weight", ".weight.T"))
        and len(stored.shape(name)) > 1
        and not name.endswith("embedding.weight")
    }


@pytest.mark.trt
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "1.x")) for f in FAMILIES]
)
def test_every_layer_of_every_family_is_known_by_its_name(family, tmp_path):
    config = UnetConfig.from_json({**THREE, **FAMILIES[family]})
    graph = exported(tmp_path, "unet", Unet(config), unet_inputs(config))
    targets = lora_targets(graph)
    assert len(targets) > 50 and marked(graph) == targets


@pytest.mark.trt
@pytest.mark.parametrize(
    "family", ["tiny_bundle", pytest.param("tiny_xl_bundle", marks=pytest.mark.slow)]
)
def test_every_graph_of_a_bundle_knows_its_layers(family, request):
    bundle = open_bundle(request.getfixturevalue(family))
    parts = [part for part in LORA_COMPONENTS if part in bundle.manifest.components]
    assert len(parts) == (3 if family == "tiny_bundle" else 4)
    for part in parts:
        graph = bundle.graph(part)
        assert marked(graph) == lora_targets(graph) != set()
    words = with_token_embeddings(bundle, "text_encoder").graph("text_encoder")
    assert marked(words) == lora_targets(words)


def test_a_shallow_graph_knows_the_layers_that_it_reads(shapes):
    bundle = open_bundle(shapes)
    graph = bundle.graph("unet_shallow")
    read = set(bundle.manifest.components["unet_shallow"].weights)
    weights = read_graph_weights(graph)
    assert set(weights.layers) == lora_targets(graph) & read == marked(graph)
    assert {*weights.layers, *weights.others} == read


def test_a_name_that_the_network_does_not_have_is_an_error(shapes):
    builder = trt.Builder(variants.get_logger(trt))
    graph = open_bundle(shapes).graph("text_encoder")
    network, _parser = tensorrt_builder.parse_network(trt, builder, graph)
    with pytest.raises(BackendError, match="has no nonsense"):
        mark_refittable(network, ["nonsense"])


def test_one_way_of_refitting_unsets_the_other():
    """So that a plan is stripped, to be filled with the same weights, or takes others."""
    flags = trt.BuilderFlag
    config = trt.Builder(variants.get_logger(trt)).create_builder_config()
    config.set_flag(flags.REFIT_IDENTICAL)
    config.set_flag(flags.REFIT_INDIVIDUAL)
    assert config.get_flag(flags.REFIT_INDIVIDUAL) and not config.get_flag(flags.REFIT_IDENTICAL)


@pytest.mark.trt
def test_replaceable_weights_stop_a_build_without_a_gpu_and_profiles_do_not(shapes, tmp_path):
    from sdrt.engine.gpu import detect_gpus

    if detect_gpus().gpus:
        pytest.skip("there is a GPU")
    graph = open_bundle(shapes).graph("text_encoder")

    def attempt(marks, flag, profiles):
        builder = trt.Builder(variants.get_logger(trt))
        network, _parser = tensorrt_builder.parse_network(trt, builder, graph)
        mark_refittable(network, marks)
        config = builder.create_builder_config()
        config.set_flag(flag)
        for rows in profiles:
            profile = builder.create_optimization_profile()
            profile.set_shape("input_ids", (1, 32), (rows, 32), (rows, 32))
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        return plan is not None

    individual = trt.BuilderFlag.REFIT_INDIVIDUAL
    assert attempt([], individual, (2, 4))
    assert not attempt(read_graph_weights(graph).layers[:1], individual, (2,))


def test_such_plans_are_refused_without_a_gpu_before_any_work(shapes, capsys):
    from sdrt.engine.gpu import detect_gpus

    if detect_gpus().gpus:
        pytest.skip("there is a GPU")
    command = ["build", "--bundle", str(shapes), "--switch-lora"]
    assert main(command) == 2
    assert "--switch-lora requires --backend tensorrt" in capsys.readouterr().err
    assert main([*command, "--backend", RTX]) == 5
    said = capsys.readouterr().err
    assert "built on the GPU that runs them" in said and "sdrt build --model" in said
    with pytest.raises(BackendError, match="there is none here"):
        required_key(open_bundle(shapes), "unet", RTX, None, PlanOptions(switch_lora=True))


def test_the_weights_are_part_of_the_key(shapes):
    from plan_examples import L4

    from sdrt.errors import UsageError

    bundle = open_bundle(shapes)
    plain = required_key(bundle, "unet", RTX, L4, PlanOptions())
    key = required_key(bundle, "unet", RTX, L4, PlanOptions(switch_lora=True))
    assert (plain.refittable, plain.stripped, plain.gpu) == ("", True, "")
    assert key.refittable and not key.stripped and key.gpu == L4.name
    assert key.user_allocation and key.digest != plain.digest
    assert "the weights that can be replaced differ" in key_differences(plain, key)
    decoder = required_key(bundle, "vae_decoder", RTX, L4, PlanOptions(switch_lora=True))
    assert decoder.refittable == "" and decoder.stripped
    other = PlanOptions(targets=("sm_120",), switch_lora=True)
    with pytest.raises(UsageError, match="--switch-lora with --target sm_120"):
        required_key(bundle, "unet", RTX, L4, other)


def test_weights_without_the_checkpoints_names_are_an_error(shapes, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(shapes / "text_encoder", tmp_path / "text_encoder")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(BundleError, match="without the weights' names"):
        read_graph_weights(folder / "model.onnx")


def test_what_validation_changes_is_a_part_of_the_layers(shapes, monkeypatch):
    graph = open_bundle(shapes).graph("unet")
    stored, layers = Tensors(graph.with_name("model.safetensors")), read_graph_weights(graph).layers
    changed = change_weights(graph)
    assert set(changed) == set(layers)
    for name, array in changed.items():
        assert array.dtype == stored[name].dtype and array.shape == stored[name].shape
        assert np.isfinite(array).all() and not np.array_equal(array, stored[name])
    monkeypatch.setattr("sdrt.engine.parity.MAX_CHANGED", stored[CONV].nbytes * 4)
    some = change_weights(graph)
    assert 0 < len(some) < len(layers)
    assert sum(array.nbytes for array in some.values()) <= stored[CONV].nbytes * 4
