"""The derived graph of a text encoder: the same outputs, from embeddings that were looked up."""

import json
import shutil

import numpy as np
import pytest

from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import EMBEDDINGS_GRAPH, MANIFEST, TOKEN_EMBEDDINGS
from sdrt.bundle.token_embeddings import derive_embeddings_graph, read_table, with_token_embeddings
from sdrt.engine import list_backends
from sdrt.errors import BundleError

NAME = "text_encoder"


@pytest.fixture
def bundle(shapes, tmp_path):
    """A copy as older builds wrote it, in which nothing was derived."""
    folder = shutil.copytree(shapes, tmp_path / "bundle")
    (folder / NAME / EMBEDDINGS_GRAPH).unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][f"{NAME}/{EMBEDDINGS_GRAPH}"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return open_bundle(folder)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_the_outputs_have_the_bytes_of_the_plain_graph(bundle, backend):
    (load,) = [c.load for c in list_backends() if (c.backend, c.device) == (backend, "cpu")]
    ids = np.random.default_rng(0).integers(0, 600, (3, 32)).astype(np.int32)
    _, table = read_table(bundle.folder / NAME)
    expected = load(bundle, NAME)({"input_ids": ids})
    feeds = {"input_ids": ids, TOKEN_EMBEDDINGS: table[ids]}
    actual = load(with_token_embeddings(bundle, NAME), NAME)(feeds)
    assert {name: a.tobytes() for name, a in actual.items()} == {
        name: a.tobytes() for name, a in expected.items()
    }


def test_onnx_itself_accepts_the_graph(bundle):
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(str(with_token_embeddings(bundle, NAME).graph(NAME)), full_check=True)


def test_a_graph_that_was_changed_is_replaced(bundle):
    path = with_token_embeddings(bundle, NAME).graph(NAME)
    derived = path.read_bytes()
    path.write_bytes(derived[:-1] + b"\0")
    open_bundle(bundle.folder)  # a graph that is derived need not be listed
    assert with_token_embeddings(bundle, NAME).graph(NAME).read_bytes() == derived


def test_a_folder_that_cannot_be_written_is_an_error_with_a_way_out(bundle, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("sdrt.bundle.token_embeddings.write_atomic", refuse)
    with pytest.raises(BundleError) as caught:
        with_token_embeddings(bundle, NAME)
    assert "written" in caught.value.hint
    assert not (bundle.folder / NAME / EMBEDDINGS_GRAPH).exists()


def test_a_graph_without_a_lookup_is_refused(bundle):
    spec = with_token_embeddings(bundle, NAME).manifest.components[NAME].inputs[-1]
    for data in ((bundle.folder / "vae_decoder" / "model.onnx").read_bytes(), b"", b"\x0a\x01"):
        with pytest.raises(ValueError):
            derive_embeddings_graph(data, spec)
