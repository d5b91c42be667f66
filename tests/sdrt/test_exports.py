"""What `import sdrt` offers: every public name, imported when it is first used."""

import pydoc
import subprocess
import sys

import pytest

import sdrt


def test_every_exported_name_is_there():
    assert sdrt.__all__[:2] == ["load", "Pipeline"]
    assert {*sdrt.__all__} <= {*dir(sdrt)}
    for name in sdrt.__all__:
        assert getattr(sdrt, name) is not None
    from sdrt.runtime import pipeline
    from sdrt.runtime.batching import engine

    assert sdrt.Pipeline is pipeline.Pipeline
    assert sdrt.InflightBatcher is engine.InflightBatcher
    with pytest.raises(AttributeError, match="Pipelines"):
        _ = sdrt.Pipelines


def test_names_are_imported_when_they_are_first_used():
    code = (
        "import sys, sdrt; assert not {'numpy', 'PIL', 'sdrt.runtime'} & {*sys.modules};"
        "from sdrt import Pipeline; assert 'sdrt.runtime.pipeline' in sys.modules;"
        "assert not {'torch', 'onnx', 'onnxruntime', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_begins_with_load():
    text = pydoc.render_doc(sdrt, renderer=pydoc.plaintext)
    assert "sdrt.load(" in "\n".join(text.splitlines()[:8])
    assert text.index("load(bundle=None") < text.index("CLASSES")
