"""The benchmarks: each asks a question, and what the README says of them is there."""

import ast
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
HELPERS = ("results.py", "gpu_contestants.py", "published.py", "plots.py", "similarity.py")
HELPERS += ("hoisted_graph.py", "merged_graph.py", "serve_contestants.py")
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if path.name not in HELPERS]
RESULTS = sorted((FOLDER / "results").glob("*.json"))


@pytest.fixture
def scripts(monkeypatch):
    """Benchmarks import each other by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_says_how_it_is_run(path):
    said = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert f"python benchmarks/{path.name}" in said


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_command_of_every_result_is_there(path):
    result = json.loads(path.read_text("utf-8"))
    program, script = shlex.split(result["command"])[:2]
    assert program == "python" and (ROOT / script).is_file()
    assert result["machine"] and result["date"] and result["claims"]


@pytest.mark.integration
def test_the_same_figures_give_the_same_plots(scripts):
    pytest.importorskip("matplotlib")
    import results

    output = results.plots()
    assert output and output == results.plots()
    assert all(text.startswith("<?xml") for text in output.values())


def test_the_exponent_is_the_power(scripts):
    import scaling

    assert scaling.exponent({n: 0.3 * n**1.5 for n in (1, 2, 4, 8)}) == pytest.approx(1.5)


def test_a_command_is_kept_without_this_machines_folders(scripts, tmp_path):
    import results

    said = results.command([str(FOLDER / "memory.py"), "--work", str(tmp_path), "--size", "8x8"])
    assert said == "python benchmarks/memory.py --work FOLDER --size 8x8"
    assert results.command([str(ROOT / "tools" / "fuzz.py")]) == "python tools/fuzz.py"


def test_a_bundle_of_another_precision_is_not_measured(scripts, shapes, tmp_path):
    import published

    (tmp_path / "bundle").symlink_to(shapes)
    weights = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()  # as if all were there
    assert published.made_bundle(tmp_path, ["64x64"]) == tmp_path / "bundle"
    with pytest.raises(SystemExit, match="is of float32"):
        published.made_bundle(tmp_path, ["64x64"], "--fp16")


def test_stages_are_those_of_a_build(scripts):
    """The lines of one, as it says them."""
    import build

    lines = ["safety checker: off", "building a from b", "validating on onnxruntime on cpu"]
    lines += ["[1/4] text_encoder: load, export, validate", "      cosine 1  error 1e-07"]
    lines += ["[2/4] unet: load, export, validate", "      cosine 1  error 1e-07"]
    lines += ["[4/4] vae_encoder: load, export, validate", "      cosine 1", "end to end: cosine 1"]
    lines += ["openvino-bf16: psnr 36.6, allowed", "done in 37 s, 23.6 MB"]
    stage, seen = "start", []
    for line in lines:
        stage = build.beginning(line, stage)
        seen.append(stage)
    assert list(dict.fromkeys(seen)) == [
        *("start", "text_encoder", "unet", "vae_encoder", "end-to-end check", "end")
    ]


@pytest.mark.slow
@pytest.mark.reference
def test_a_checkpoint_of_published_shape_is_the_references(scripts, tmp_path):
    """At a quarter of its width; loaded by diffusers as it loads published ones."""
    import torch
    from published import made_bundle, reference_pipeline

    from sdrt import load

    bundle = made_bundle(tmp_path, ["256x256"], divisor=4)
    reference = reference_pipeline(tmp_path / "model", "float32")
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(1, 4, 32, 32)).astype(np.float32)
    context = rng.normal(size=(1, 77, 768)).astype(np.float32)
    with load(bundle, precision="exact") as pipe, torch.no_grad():
        feeds = {"sample": sample, "timestep": np.full(1, 500, np.float32), "context": context}
        own = pipe.engines["unet"](feeds)["output"]
        theirs = reference.unet(torch.from_numpy(sample), 500, torch.from_numpy(context)).sample
    assert np.abs(own - theirs.numpy()).max() < 1e-3 * theirs.abs().max()
