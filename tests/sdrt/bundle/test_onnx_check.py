"""Graphs from elsewhere: what an engine must not be given, and that onnx reads the same in them."""

import random
from dataclasses import replace

import onnx
import pytest
from onnx import TensorProto, helper
from untrusted_input import graph, list_files, loaded, state_of, write_bundle

import sdrt.bundle.integrity
from sdrt.bundle import onnx_check, open_bundle
from sdrt.bundle.bundle import graph_name
from sdrt.bundle.manifest import manifest_from_json
from sdrt.errors import BundleError
from sdrt.json_validation import read_json


def with_node(node):
    model = graph()
    model.graph.node.append(node)
    return model


def with_weight(**changes):
    model = graph()
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(model.graph.initializer[0], name)[:]
            getattr(model.graph.initializer[0], name).extend(value)
        else:
            setattr(model.graph.initializer[0], name, value)
    return model


def with_entries(**entries):
    model = graph()
    for key, value in entries.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    return model


def with_inside(length=16, **options):
    model = graph()
    inside = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[4], raw_data=b"x" * length)
    for key, value in options.get("entries", {}).items():
        inside.external_data.add(key=key, value=value)
    model.graph.initializer.append(inside)
    return model


def with_opsets(*opsets):
    model = graph()
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*opset) for opset in opsets)
    return model


def changed(change):
    model = graph()
    change(model)
    return model


def subgraph():
    inner = helper.make_graph([], "inner", [], [])
    return helper.make_node("Cast", ["x"], ["z"], to=1, body=inner)


def typed(model):
    model.graph.initializer.append(helper.make_tensor("c", TensorProto.FLOAT, [2], [1.0, 2.0]))


def sequence(model):
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [4]))
    model.graph.value_info.append(helper.make_value_info("z", kind))


ATTACKS = {
    "another file": (graph(location="other.safetensors"), "'other.safetensors'"),
    "a path upwards": (graph(location="../../../etc/passwd"), "etc/passwd"),
    "a path upwards to itself": (graph(location="../unet/model.safetensors"), r"\.\./unet"),
    "an absolute path": (graph(location="/etc/passwd"), "/etc/passwd"),
    "memory of the process": (graph(location="*/_ORT_MEM_ADDR_/*"), "_ORT_MEM_ADDR_"),
    "no location": (graph(location=None), "'location' None"),
    "before its bytes": (graph(offset=0), "'offset' '0'"),
    "beyond the file": (graph(offset=10**12), "1000000000000"),
    "a negative offset": (graph(offset=-1), "'-1'"),
    "a length that wraps": (graph(length=2**64 + 64), "18446744073709551680"),
    "too short": (graph(length=60), "'length' '60', expected '64'"),
    "no length": (graph(length=None), "'length' None"),
    "one key twice": (with_entries(location="model.safetensors"), "says twice"),
    "a key beyond": (with_entries(basepath="/"), "basepath"),
    "a weight that is not in the file": (with_weight(name="v"), "model.safetensors has None"),
    "another shape": (with_weight(dims=[2, 8]), r"is F32 \[2, 8\]"),
    "a shape that wraps": (with_weight(dims=[2**62, 4]), "is F32"),
    "a negative side": (with_weight(dims=[-4, -4]), "a negative side"),
    "another type": (with_weight(data_type=TensorProto.INT32), "is I32"),
    "a type of text": (with_weight(data_type=TensorProto.STRING), "of type 8"),
    "bytes here and there": (with_weight(raw_data=b"x" * 64), "is F32"),
    "too few bytes inside": (with_inside(15), "has 15 bytes"),
    "inside and elsewhere": (with_inside(entries={"location": "/etc/passwd"}), "and elsewhere"),
    "numbers in another form": (changed(typed), "field 4 of a weight"),
    "a weight twice": (
        changed(lambda m: m.graph.initializer.append(m.graph.initializer[0])),
        "twice",
    ),
    "a sparse weight": (
        changed(lambda m: m.graph.sparse_initializer.add(dims=[4])),
        "field 15 of the graph",
    ),
    "a custom operator": (
        with_node(helper.make_node("Evil", ["x"], ["z"], domain="com.evil")),
        "operator 'com.evil::Evil'",
    ),
    "an operator under another name": (
        with_node(helper.make_node("Add", ["x", "x"], ["z"], domain="ai.onnx.ml")),
        "ai.onnx.ml::Add",
    ),
    "an operator with a body": (
        with_node(helper.make_node("Loop", ["x"], ["z"])),
        "'::Loop' is none",
    ),
    "a subgraph": (with_node(subgraph()), "field 6 of an attribute of Cast"),
    "a function": (
        changed(lambda m: m.functions.add(name="f", domain="")),
        "field 25 of the model",
    ),
    "training": (changed(lambda m: m.training_info.add()), "field 20 of the model"),
    "a domain of its own": (with_opsets(("", 23), ("com.evil", 1)), "com.evil"),
    "an opset to come": (with_opsets(("", 99)), "opset 18 to 23"),
    "an old opset": (with_opsets(("", 7)), "opset 18 to 23"),
    "no opset": (with_opsets(), "opset 18 to 23"),
    "values that are sequences": (changed(sequence), "field 4 of a type"),
    "inputs of other names": (
        changed(lambda m: setattr(m.graph.input[0], "name", "q")),
        "has.*'q'",
    ),
    "an input more": (changed(lambda m: m.graph.input.extend(m.graph.output)), "the manifest"),
    "no graph": (changed(lambda m: m.ClearField("graph")), "the manifest"),
}


def refused(folder, message):
    before = state_of(folder)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)
    assert state_of(folder) == before


@pytest.mark.parametrize(("model", "message"), ATTACKS.values(), ids=ATTACKS)
def test_graphs_that_attack(tmp_path, model, message):
    refused(write_bundle(tmp_path / "b", model), message)


COMPLETE = graph().SerializeToString()
BYTES = {
    "nothing": (b"", "expected ONNX's own"),
    "cut": (COMPLETE[:-3], "ends too soon|is not known"),
    "a number without end": (COMPLETE + b"\xff" * 20, "does not end"),
    "a number of 70 bits": (COMPLETE + b"\x08" + b"\xff" * 9 + b"\x7f", "does not end"),
    "a length beyond the end": (COMPLETE + b"\x72\xff\xff\xff\xff\x0f", "ends too soon"),
    "a field that is not ONNX's": (COMPLETE + b"\xfa\x3f\x01x", "field 1023 of the model"),
    "field 0": (COMPLETE + b"\x02\x00", "field 0"),
    "a group": (COMPLETE + b"\x3b" * 1000, "of wire type 3|ends too soon"),
    "a second graph": (COMPLETE + b"\x3a\x02\x12\x00", "field 7 of the model comes twice"),
    "a number for text": (COMPLETE + b"\x10\x01", "wire type 0"),
    "a page of the web": (b"<!DOCTYPE html>" * 100, "of wire type 4"),
}


@pytest.mark.parametrize(("data", "message"), BYTES.values(), ids=BYTES)
def test_bytes_that_are_no_graph(tmp_path, data, message):
    folder = write_bundle(tmp_path / "b")
    (folder / "unet" / "model.onnx").write_bytes(data)
    refused(list_files(folder), message)


def test_a_graph_of_gigabytes_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_check, "MAX_GRAPH", len(COMPLETE) - 1)
    refused(write_bundle(tmp_path / "b"), "more than")
    monkeypatch.setattr(onnx_check, "MAX_GRAPH", len(COMPLETE))
    open_bundle(tmp_path / "b")


def test_a_graph_is_looked_into_once_and_again_with_other_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "home"))
    seen = []
    monkeypatch.setattr(
        sdrt.bundle.integrity, "check_graph", lambda path, component: seen.append(path)
    )
    folder = write_bundle(tmp_path / "b")
    open_bundle(folder)
    open_bundle(folder)
    assert len(seen) == 1
    (folder / "unet" / "model.safetensors").write_bytes(b"others")
    open_bundle(list_files(folder))
    assert len(seen) == 2


def test_files_that_no_bundle_has(tmp_path):
    folder = write_bundle(tmp_path / "b")
    (folder / "unet" / "run.py").write_text("print()")
    refused(list_files(folder), r"lists unet/run\.py, which no bundle has")


def facts(model):
    """What is checked of a graph, as onnx reads it."""
    return [
        [node.op_type for node in model.graph.node],
        [
            (tensor.name, list(tensor.dims), [entry.value for entry in tensor.external_data])
            for tensor in model.graph.initializer
        ],
    ]


def facts_here(data):
    def inside(fields, number, kind):
        return [onnx_check.parse_message(item, kind, "it") for item in fields.get(number, ())]

    (actual,) = inside(onnx_check.parse_message(data, onnx_check.MODEL, "it"), 7, onnx_check.GRAPH)
    tensors = inside(actual, 5, onnx_check.TENSOR)
    entries = [[entry[2][0].decode() for entry in inside(t, 13, onnx_check.ENTRY)] for t in tensors]
    return [
        [node[4][0].decode() for node in inside(actual, 1, onnx_check.NODE)],
        [
            (tensor[8][0].decode(), tensor.get(1, []), values)
            for tensor, values in zip(tensors, entries, strict=True)
        ],
    ]


def test_graphs_of_a_build_are_read_as_onnx_reads_them(shapes):
    manifest = manifest_from_json(read_json(shapes / "sdrt.json"), shapes)
    for name, component in manifest.components.items():
        path = shapes / graph_name(name)
        onnx_check.check_graph(path, component)
        assert facts_here(path.read_bytes()) == facts(loaded(path))
        with pytest.raises(BundleError, match="the manifest"):
            onnx_check.check_graph(path, replace(component, inputs=component.outputs))


@pytest.mark.integration
def test_what_is_accepted_onnx_reads_alike(tmp_path):
    """On graphs with bytes changed at random."""
    folder = write_bundle(tmp_path / "b")
    path = folder / "unet" / "model.onnx"
    component = open_bundle(folder).manifest.components["unet"]
    rng, accepted = random.Random(0), 0
    for _ in range(2000):
        data = bytearray(COMPLETE)
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            onnx_check.check_graph(path, component)
        except BundleError:
            continue
        model = onnx.ModelProto.FromString(bytes(data))
        assert facts(model) == facts_here(bytes(data)) == facts(loaded(path))
        assert model.graph.initializer[0].external_data[0].value == "model.safetensors"
        accepted += 1
    assert accepted > 100


def test_what_the_torch_backend_runs_is_let_in():
    from sdrt.engine.torch.ops import OPERATIONS

    assert set(OPERATIONS) <= onnx_check.OPERATORS
