"""Manifests from elsewhere: every value that is out of bounds is refused by name."""

import json
import os

import pytest
from untrusted_input import MANIFEST, SPEC, list_files, state_of, write_bundle

from sdrt.bundle import open_bundle
from sdrt.errors import BundleError


@pytest.fixture
def small(tmp_path):
    return write_bundle(tmp_path / "small")


def refused(folder, message):
    before = state_of(folder)
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)
    assert state_of(folder) == before


def component(**changes):
    return {"components": {"unet": {**MANIFEST["components"]["unet"], **changes}}}


def test_a_bundle_by_hand_opens(small):
    bundle = open_bundle(small)
    assert bundle.manifest.components["unet"].inputs[0].shape == ("rows", 4)
    assert bundle.manifest.batch == (1, 1, 4) and len(bundle.manifest.files) == 2


DAMAGES = {
    "a name that is a path": ({"name": "../../up"}, "name is '../../up'"),
    "a name that clears the terminal": ({"name": "a\x1b[2J"}, "name is"),
    "a source of two lines": ({"source": "a\nb"}, "source is"),
    "a size that is text": ({"sizes": [["64", 64]]}, r"sizes\[0\]\[0\] is '64'"),
    "no size": ({"sizes": []}, "a list of 1 to 64"),
    "a billion pixels": ({"sizes": [[1_000_000_000, 8]]}, "from 8 to 8192"),
    "truth for a number": ({"max_tokens": True}, "max_tokens is True"),
    "tokens without end": ({"max_tokens": 10**9}, "from 0 to 4096"),
    "channels without end": ({"latent_channels": 10**9}, "from 1 to 128"),
    "downscale 0": ({"downscale": 0}, "downscale is 0"),
    "a batch that shrinks": ({"batch": [4, 1, 1]}, "does not grow"),
    "a batch of two numbers": ({"batch": [1, 1]}, "a list of 3 to 3"),
    "a preview of another width": ({"preview": [[0.1] * 4] * 3}, "preview is not of 4"),
    "a preview of text": ({"preview": "none"}, "preview is 'none'"),
    "a number for truth": ({"zero_empty_prompt": 1}, "true or false"),
    "a measure that is none": ({"parity": {"psnr": "good"}}, r"parity\.psnr is 'good'"),
    "an unknown component": (
        {"components": {"magic": MANIFEST["components"]["unet"]}},
        "one of text_encoder",
    ),
    "unknown dtype": (component(dtype="float8"), "one of float32"),
    "a rank of nine": (component(inputs=[{**SPEC, "shape": [1] * 9}]), "a list of 0 to 8"),
    "a negative axis": (component(inputs=[{**SPEC, "shape": [-1]}]), "is -1"),
    "an odd axis": (component(inputs=[{**SPEC, "shape": ["a\n"]}]), "an axis"),
    "one name twice": (component(inputs=[SPEC, SPEC]), "of one name"),
    "inputs without end": (component(inputs=[SPEC] * 65), "a list of 1 to 64"),
    "an unknown field inside": (component(extra=1), "unknown fields in Component: 'extra'"),
    "a lost field": ({"components": {"unet": {}}}, "lacks dtype, inputs"),
    "a size of a file that is none": (
        {"files": {"a": {"size": -1, "sha256": "0" * 64}}},
        "size is -1",
    ),
    "a sha256 that is none": ({"files": {"a": {"size": 1, "sha256": "x"}}}, "64 hexadecimal"),
    "files without end": (
        {"files": {f"f{i}": {"size": 1, "sha256": "0" * 64} for i in range(1001)}},
        "at most 1000",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_values_out_of_bounds(small, change, message):
    path = small / "sdrt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(small, message)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../b", "a//b", "./a", "a\\..\\b", ""])
def test_names_of_files_outside(small, name):
    record = {"size": 1, "sha256": "0" * 64}
    path = small / "sdrt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {name: record}}))
    refused(small, "outside the bundle")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2, "format": 2}', "'format' comes twice"),
        ("[" * 100_000, "JSON"),
        ('{"format": ' + "[" * 100_000, "nested too deeply"),
        ('{"format": 2, "x": NaN}', "NaN"),
        ('{"format": 1' + "0" * 5000 + "}", "JSON"),
        (b"\xff\xfe{", "JSON"),
        (b'{"a": "' + b"x" * 5_000_000 + b'"}', "more than 4,000,000 bytes"),
    ],
)
def test_text_that_is_no_json(small, text, message):
    data = text.encode() if isinstance(text, str) else text
    (small / "sdrt.json").write_bytes(data)
    refused(small, message)


def test_what_is_not_listed_is_not_used(small):
    (small / "unet" / "float32.onnx").write_bytes(b"a second graph")
    refused(small, "float32.onnx is not listed in sdrt.json")
    (small / "unet" / "float32.onnx").unlink()
    (small / "plans").mkdir()
    (small / "plans" / "a.plan").write_bytes(b"a cache")
    (small / "unet" / ".DS_Store").write_bytes(b"a file browser's")
    (small / "README.md").write_bytes(b"a user's")
    open_bundle(small)


def test_a_component_without_its_files(small):
    (small / "unet" / "model.safetensors").unlink()
    list_files(small)
    refused(small, r"lists no unet/model\.safetensors")


def test_links_that_lead_outside(small, tmp_path):
    weights = small / "unet" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    refused(small, "is a link out of the bundle")
    weights.unlink()
    os.link(tmp_path / "elsewhere", weights)  # as cp -al makes them
    open_bundle(small)
    (small / "unet").rename(tmp_path / "unet")
    (small / "unet").symlink_to(tmp_path / "unet")
    refused(small, "is a link out of the bundle")


def test_a_pipe_is_not_waited_for(small):
    weights = small / "unet" / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    refused(small, r"model\.safetensors is not a file")
    (small / "sdrt.json").unlink()
    os.mkfifo(small / "sdrt.json")
    with pytest.raises(BundleError):
        open_bundle(small)
