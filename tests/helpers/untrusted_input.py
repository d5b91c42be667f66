"""Untrusted files for tests: a small bundle written by hand, and what may be hidden in it."""

import hashlib
import json

import numpy as np
import onnx
from onnx import TensorProto, helper

SPEC = {"name": "x", "dtype": "float32", "shape": ["rows", 4]}
MANIFEST = {
    "name": "small",
    "source": "by hand",
    "sizes": [[64, 64]],
    "batch": [1, 1, 4],
    "latent_channels": 4,
    "downscale": 8,
    "max_tokens": 77,
    "opset": 23,
    "components": {
        "unet": {
            "inputs": [SPEC],
            "outputs": [{**SPEC, "name": "y"}],
            "dtype": "float32",
            "parity": {"cosine": 1.0},
        }
    },
    "parity": {"psnr": 100.0},
    "preview": [[0.1] * 5] * 3,
    "admitted": {},
    "multiple": 8,
    "zero_empty_prompt": False,
    "format": 2,
}


def safetensors_bytes(header, data=b""):
    """header: an object, or the bytes that stand for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def weights():
    """`w`, [4, 4] float32, and where its bytes begin."""
    record = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
    result = safetensors_bytes({"w": record}, np.eye(4, dtype=np.float32).tobytes())
    return result, len(result) - 64


def graph(location="model.safetensors", offset=None, length=64, **changes):
    """y = x @ w, an `onnx.ModelProto` whose weight is external."""
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    w.data_location = TensorProto.EXTERNAL
    at = weights()[1] if offset is None else offset
    for key, value in (("location", location), ("offset", at), ("length", length)):
        if value is not None:
            w.external_data.add(key=key, value=str(value))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 4]) for n in "xy")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    result = helper.make_graph([node], "small", [x], [y], [w])
    model = helper.make_model(result, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    for key, value in changes.items():
        setattr(model, key, value)
    return model


def write_bundle(folder, model=None, **changes):
    """A bundle of one component whose files are those of its manifest."""
    (folder / "unet").mkdir(parents=True)
    data = (graph() if model is None else model).SerializeToString()
    (folder / "unet" / "model.onnx").write_bytes(data)
    (folder / "unet" / "model.safetensors").write_bytes(weights()[0])
    return list_files(folder, **changes)


def list_files(folder, **changes):
    """Write the manifest of what lies there."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "sdrt.json"
    }
    (folder / "sdrt.json").write_text(json.dumps({**MANIFEST, "files": files, **changes}))
    return folder


def state_of(folder):
    """Every file's bytes and times, to compare what was there before with what is after."""
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def loaded(path):
    return onnx.load(path, load_external_data=False)
