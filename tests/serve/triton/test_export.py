"""The model repository for Triton: its configuration by Triton's own schema, its model.py run over
a stand-in of the Python backend's module. No Triton server has loaded it.
"""

import importlib.util
import json
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import sdrt
from sdrt.cli.main import main
from sdrt.errors import BundleError, UsageError
from sdrt.serve.triton.export import TritonExport, export_triton

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def exported(shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("repository")
    return export_triton(TritonExport(str(shapes), output, instances=2, backend="onnxruntime"))


@pytest.fixture(scope="module")
def config(exported):
    """config.pbtxt parsed by Triton's schema; fails on an unknown field or a wrong type."""
    pytest.importorskip("tritonclient.grpc", reason="pip install 'tritonclient[grpc]'")
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((exported / "config.pbtxt").read_text(), ModelConfig())


def test_config_is_valid_for_triton(config, exported):
    assert config.name == exported.name == "shapes"
    assert config.backend == "python"
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert config.model_transaction_policy.decoupled
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, 0)]
    assert [item.name for item in config.input if not item.optional] == ["prompt"]
    assert [list(item.dims) for item in config.input] == [[1]] * 7
    assert {item.name: list(item.dims) for item in config.output}["image"] == [-1, -1, 3]


class Tensor:
    def __init__(self, name, values):
        self.name, self.values = name, values

    def as_numpy(self):
        return self.values


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS = range(7)
    CANCELLED = 7

    def __init__(self, message, code=INTERNAL):
        self.text, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.outputs = {tensor.name: tensor.values for tensor in output_tensors}
        self.error = error


class Sender:
    """Holds the only response of a request."""

    def __init__(self):
        self.sent, self.flags, self.cancelled = [], [], False
        self.there = threading.Event()

    def send(self, response, flags=0):
        self.sent.append(response)
        self.flags.append(flags)
        self.there.set()

    def is_cancelled(self):
        return self.cancelled

    @property
    def response(self):
        assert self.there.wait(30)
        assert len(self.sent) == 1 and self.flags == [1]
        return self.sent[0]


class Request:
    def __init__(self, **values):
        kinds = {"steps": np.int32, "guidance_scale": np.float32, "seed": np.uint64}
        self.inputs = {
            name: Tensor(
                name,
                np.array(
                    [value.encode() if isinstance(value, str) else value], kinds.get(name, object)
                ),
            )
            for name, value in values.items()
        }
        self.sender = Sender()

    def get_response_sender(self):
        return self.sender


@pytest.fixture(scope="module")
def model(exported, config):
    """The exported model.py, loaded and initialized as by the backend."""
    backend = types.ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.InferenceResponse = Tensor, InferenceResponse
    backend.TritonError, backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = TritonError, 1
    backend.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, backend.__name__, backend)
    spec = importlib.util.spec_from_file_location("exported_model", exported / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from google.protobuf.json_format import MessageToDict

    message = MessageToDict(config, preserving_proto_field_name=True)
    result = module.TritonPythonModel()
    kind = {"model_instance_kind": "CPU", "model_instance_device_id": "0"}
    result.initialize({"model_config": json.dumps(message), **kind})
    yield result
    result.finalize()
    patch.undo()


def test_every_request_gets_its_image(model, pipe, config):
    from tritonclient.utils import triton_to_np_dtype

    requests = [
        Request(prompt=PROMPT, steps=steps, seed=seed, guidance_scale=guidance, scheduler=scheduler)
        for seed, (steps, guidance, scheduler) in enumerate(
            [(20, 7.5, "Euler"), (4, 1.0, "DPM++ 2M Karras"), (9, 3.0, "UniPC")]
        )
    ]
    assert model.execute(requests) is None
    for seed, request in enumerate(requests):
        response = request.sender.response
        assert response.error is None
        alone = pipe.with_scheduler(request.inputs["scheduler"].values[0].decode())(
            PROMPT,
            num_inference_steps=int(request.inputs["steps"].values[0]),
            guidance_scale=float(request.inputs["guidance_scale"].values[0]),
            seed=seed,
        )
        assert (response.outputs["image"] == np.asarray(alone.images[0])).all()
        assert response.outputs["seed"] == [seed]
        assert response.outputs["parameters"][0].decode().startswith(PROMPT)
        for item in config.output:
            kind = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
            name = kind[item.data_type].name.removeprefix("TYPE_").replace("STRING", "BYTES")
            actual = response.outputs[item.name]
            assert actual.dtype == np.dtype(triton_to_np_dtype(name)), item.name
            assert actual.ndim == len(item.dims)


def test_omitted_inputs_have_defaults(model, pipe):
    request = Request(prompt=PROMPT, seed=3)
    model.execute([request])
    image = request.sender.response.outputs["image"]
    assert (image == np.asarray(pipe(PROMPT, seed=3).images[0])).all()


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({"steps": 0}, TritonError.INVALID_ARG, "steps"),
        ({"guidance_scale": float("nan")}, TritonError.INVALID_ARG, "guidance"),
        ({"size": "64x72"}, TritonError.INVALID_ARG, "64x72"),
        ({"scheduler": "none such"}, TritonError.INVALID_ARG, "none such"),
    ],
)
def test_invalid_request_does_not_affect_others(model, values, code, words):
    bad, good = Request(prompt=PROMPT, **values), Request(prompt=PROMPT, steps=2)
    model.execute([bad, good])
    assert bad.sender.response.error.code == code
    assert words in bad.sender.response.error.text
    assert good.sender.response.error is None


def test_prompt_that_is_not_utf8(model):
    request = Request(prompt=PROMPT)
    request.inputs["prompt"] = Tensor("prompt", np.array([b"\xff\xfe"], object))
    model.execute([request])
    assert request.sender.response.error.code == TritonError.INVALID_ARG


def test_cancelled_request_stops_early(model):
    request = Request(prompt=PROMPT, steps=900)
    model.execute([request])
    request.sender.cancelled = True
    assert request.sender.response.error.text == "cancelled"
    assert request.sender.response.error.code == TritonError.CANCELLED
    assert not model.engine.unfinished()


def test_full_queue_rejects_requests(model):
    requests = [Request(prompt=PROMPT, steps=200) for _ in range(model.engine.max_waiting + 40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda request: model.execute([request]), requests))
    for request in requests:
        request.sender.cancelled = True
    codes = {r.sender.response.error and r.sender.response.error.code for r in requests}
    assert TritonError.UNAVAILABLE in codes
    assert codes <= {None, TritonError.UNAVAILABLE, TritonError.CANCELLED}


def test_repository_contains_the_bundle(exported):
    with sdrt.load(exported / "1" / "bundle", backend="onnxruntime") as pipe:
        assert pipe.manifest.name == "shapes"


def test_export_is_replaced_only_with_force(shapes, tmp_path, capsys):
    plan = TritonExport(str(shapes), tmp_path)
    target = export_triton(plan)
    mark = target / "mark"
    mark.write_text("")
    with pytest.raises(BundleError, match="--force"):
        export_triton(plan)
    assert mark.exists()
    words = ["export-triton", "--bundle", str(shapes), "--output", str(tmp_path)]
    assert main(words) == BundleError.exit_code
    assert main([*words, "--force"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert not mark.exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["shapes"]


def test_unrelated_folder_is_not_replaced(shapes, tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "thesis.txt").write_text("dear to somebody")
    with pytest.raises(BundleError, match=r"config\.pbtxt"):
        export_triton(TritonExport(str(shapes), tmp_path, force=True))
    assert (tmp_path / "shapes" / "thesis.txt").exists()


@pytest.mark.parametrize("values", [{"name": "a/b"}, {"name": ""}, {"instances": 0}, {"slots": 0}])
def test_values_out_of_range(shapes, tmp_path, values):
    with pytest.raises(UsageError):
        export_triton(TritonExport(str(shapes), tmp_path, **values))
    assert not list(tmp_path.iterdir())


def test_failed_copy_leaves_nothing(shapes, tmp_path, monkeypatch):
    def full(*_):
        import errno

        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    with pytest.raises(sdrt.SdrtError, match="no space left"):
        export_triton(TritonExport(str(shapes), tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == []
