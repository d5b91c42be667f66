"""The torch backend compiled: the numbers of node by node, at every shape, with any weights."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import sdrt
from sdrt.bundle.manifest import Component, TensorSpec
from sdrt.cli.main import main
from sdrt.engine.load_options import LoadOptions
from sdrt.engine.parity import sample_input
from sdrt.engine.selection import select_backend
from sdrt.engine.torch import engine as torch_engine
from sdrt.engine.torch import ops
from sdrt.engine.torch.compile import fold_constants
from sdrt.engine.torch.engine import TorchEngine
from sdrt.errors import BackendError, UsageError

pytestmark = pytest.mark.integration

SHAPE = ("rows", 4, "latent_height", "latent_width")
COMPONENT = Component(
    (TensorSpec("sample", "float32", SHAPE),),
    (TensorSpec("output", "float32", SHAPE),),
    "float32",
    {},
)
NODES = [
    ("Conv", ["sample", "conv.weight", "conv.bias"], "c", {"pads": [1, 1, 1, 1]}),
    ("Shape", ["c"], "shape", {}),
    ("Shape", ["c"], "rows", {"end": 1}),
    ("Gather", ["shape", "three"], "width", {}),
    ("Cast", ["width"], "wide", {"to": TensorProto.FLOAT}),
    ("Div", ["c", "wide"], "scaled", {}),
    ("Concat", ["rows", "rest"], "target", {"axis": 0}),
    ("Reshape", ["scaled", "target"], "flat", {}),
    ("Transpose", ["flat"], "tokens", {"perm": [0, 2, 1]}),
    ("MatMul", ["tokens", "linear.weight"], "mixed", {}),
    ("Unsqueeze", ["mixed", "one"], "heads", {}),
    ("Attention", ["heads", "heads", "heads"], "attended", {}),
    ("Squeeze", ["attended", "one"], "squeezed", {}),
    ("Transpose", ["squeezed"], "back", {"perm": [0, 2, 1]}),
    ("Reshape", ["back", "shape"], "image", {}),
    ("Add", ["image", "c"], "output", {}),
]
CONSTANTS = {"three": np.array(3), "rest": np.array([4, -1]), "one": np.array([1])}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 4, 3, 3), "conv.bias": (4,), "linear.weight": (4, 4)}
    weights = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    folder = tmp_path_factory.mktemp("graph")
    save_file(weights, folder / "model.safetensors")
    initializers = [numpy_helper.from_array(v, n) for n, v in {**weights, **CONSTANTS}.items()]
    for tensor in initializers[: len(weights)]:
        onnx.external_data_helper.set_external_data(tensor, "model.safetensors")
        tensor.ClearField("raw_data")
    nodes = [helper.make_node(kind, read, [created], **more) for kind, read, created, more in NODES]
    specs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("sample", "output")
    ]
    created = helper.make_graph(nodes, "graph", specs[:1], specs[1:], initializers)
    onnx.save(helper.make_model(created), folder / "model.onnx")
    return folder / "model.onnx"


def near(actual, expected):
    return np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_what_is_compiled_computes_the_same_with_any_weights(graph):
    plain, quick = (TorchEngine("unet", graph, COMPONENT, "cpu", compile=c) for c in (False, True))
    feeds = {"sample": sample_input("float32", (2, 4, 6, 8))}
    before = quick(feeds)["output"]
    assert near(before, plain(feeds)["output"])
    cached = list(quick._compiled.values())
    other = {"linear.weight": np.eye(4, dtype=np.float32)}
    for engine in (plain, quick):
        engine.refit(other)
    changed = quick(feeds)["output"]
    assert near(changed, plain(feeds)["output"]) and not near(changed, before)
    quick.refit({})
    assert np.array_equal(quick(feeds)["output"], before)
    assert list(quick._compiled.values()) == cached  # nothing was compiled again
    quick.close()
    with pytest.raises(BackendError, match="closed"):
        quick(feeds)


@pytest.mark.slow
def test_the_shape_that_was_used_least_recently_goes(graph, monkeypatch):
    monkeypatch.setattr(torch_engine, "MAX_SHAPES", 2)
    plain, quick = (TorchEngine("unet", graph, COMPONENT, "cpu", compile=c) for c in (False, True))
    for width in (4, 6, 4, 8):
        feeds = {"sample": sample_input("float32", (1, 4, 4, width))}
        assert near(quick(feeds)["output"], plain(feeds)["output"])
    assert [key[0][3] for key in quick._compiled] == [4, 8]


def test_what_shapes_alone_decide_is_not_computed_again(graph):
    engine = TorchEngine("unet", graph, COMPONENT, "cpu", compile=True)
    inputs = {"sample": torch.zeros(2, 4, 6, 8)} | {n: engine._values[n] for n in engine._weights}
    constants = {name: torch.from_numpy(value) for name, value in CONSTANTS.items()}
    left, read = fold_constants(engine._nodes, engine._kinds, inputs, constants)
    gone = ("Shape", "Gather", "Cast", "Concat")
    assert [created for _, _, (created,), _ in left] == [
        m for kind, _, m, _ in NODES if kind not in gone
    ]
    assert [sources[1] for _, sources, (created,), _ in left if created == "flat"] == [[2, 4, -1]]
    assert {name: value.item() for name, value in read.items()} == {"wide": 8.0}


def test_a_shape_that_depends_on_values_is_refused():
    inputs = {"x": torch.zeros(4), "target": torch.tensor([2, 2])}
    nodes = [(ops.OPERATIONS["Reshape"], ["x", "target"], ["y"], {})]
    with pytest.raises(BackendError, match=r"Reshape .* run without compiling"):
        fold_constants(nodes, ["Reshape"], inputs, {})


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "tensorrt"])
def test_other_backends_are_not_compiled(backend):
    with pytest.raises(UsageError, match="--backend torch --compile"):
        select_backend(backend, options=LoadOptions(torch_compile=True))


@pytest.mark.slow
def test_the_embedded_model_compiled_draws_the_same(shapes, caplog):
    created = []
    for compile in (False, True):
        with sdrt.load(shapes, backend="torch", compile=compile) as pipe:
            out = pipe("a red circle on a blue background", num_inference_steps=4, seed=0)
            created.append(np.asarray(out.images[0], np.int16))
    assert np.abs(created[0] - created[1]).max() <= 1
    assert "takes a minute" in caplog.text


def test_the_command_line_says_it_too(shapes, capsys):
    assert main(["run", "x", "--bundle", str(shapes), "--compile"]) == 2
    assert "--backend torch --compile" in capsys.readouterr().err
