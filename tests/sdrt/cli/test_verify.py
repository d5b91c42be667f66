"""A bundle validated again: what passes on a machine that has not built it, and what is noticed."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from lora_graphs import with_lora_graphs

from sdrt.atomic_files import file_identity
from sdrt.bundle import open_bundle
from sdrt.bundle.integrity import describe_files
from sdrt.bundle.manifest import LORA_PARTS
from sdrt.bundle.store import home
from sdrt.cli.main import main
from sdrt.cli.verify import run_checks
from sdrt.engine import parity, select_backend
from sdrt.engine.cpu import has_bf16
from sdrt.errors import BundleError

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["onnx"] = None
from sdrt.cli.main import main
sys.exit(main(["verify", "--json", "--quiet", "--bundle", sys.argv[1]]))
"""


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def record_files(folder, change=lambda manifest: None):
    """Have the manifest say what the folder holds, as one who wants to deceive would."""
    path = folder / "sdrt.json"
    manifest = json.loads(path.read_text())
    files = {n: {"size": r.size, "sha256": r.sha256} for n, r in describe_files(folder).items()}
    manifest["files"] = files
    change(manifest)
    path.write_text(json.dumps(manifest))


def verified(folder, capsys):
    """The exit code, what was missed, and what was said."""
    code = main(["verify", "--json", "--quiet", "--bundle", str(folder)])
    reported = capsys.readouterr()
    checks = json.loads(reported.out)["checks"] if reported.out else []
    return code, [check["what"] for check in checks if not check["passed"]], reported.err


def test_a_bundle_is_validated_without_torch(tiny_bundle):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(tiny_bundle)]
    reported = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    checks = {check["what"]: check["passed"] for check in reported["checks"]}
    assert all(checks.values())
    parts = ("text_encoder", "unet", "unet_control", "vae_decoder", "vae_encoder")
    again = ("same seed twice", "batch invariance")
    assert set(checks) == {*(f"{p}, float32" for p in parts), "files", "full pipeline", *again}


def scale(path, by):
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    changed = np.frombuffer(content[start:], np.float32) * np.float32(by)
    path.write_bytes(content[:start] + changed.tobytes())


def test_weights_that_leave_no_numbers_are_noticed(copy, capsys):
    scale(copy / "vae_decoder" / "model.safetensors", 1e30)
    record_files(copy)
    code, missed, _ = verified(copy, capsys)
    assert code == 6 and missed == ["vae_decoder, float32", "full pipeline"]


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_other_weights_under_a_matching_manifest_are_noticed(copy, capsys, part):
    scale(copy / part / "model.safetensors", 1.02)
    record_files(copy)
    code, missed, said = verified(copy, capsys)
    assert code == 6 and f"{part}, float32" in missed
    assert "is not valid on onnxruntime on cpu" in said
    assert ("full pipeline" in missed) == (part != "vae_encoder")


def test_bytes_that_the_disk_lost_are_found_though_the_times_are_the_same(copy, capsys):
    open_bundle(copy)
    path = copy / "unet" / "model.safetensors"
    before = file_identity(path.stat())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    memory = home() / "verified.json"  # of the bytes as they are now
    memory.write_text(memory.read_text().replace(before, file_identity(path.stat())))
    open_bundle(copy)  # as remembered
    code, _, said = verified(copy, capsys)
    assert code == 3 and "damaged" in said
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(copy)


def test_a_bundle_without_answers_says_what_to_do(copy, capsys):
    (copy / "proof.json").unlink()
    record_files(copy)
    code, _, said = verified(copy, capsys)
    assert code == 3 and "build it again with --force" in said


@pytest.mark.parametrize("text", ["{}", '{"components": {"unet": 1}, "picture": []}', "[1]"])
def test_answers_that_are_none_are_refused(copy, capsys, text):
    (copy / "proof.json").write_text(text)
    record_files(copy)
    code, _, said = verified(copy, capsys)
    assert code == 3 and "proof.json" in said


def test_answers_of_another_shape_are_a_miss(copy, capsys):
    cached = json.loads((copy / "proof.json").read_text())
    cached["components"]["unet"]["output"].pop()
    del cached["components"]["vae_encoder"]["std"]
    (copy / "proof.json").write_text(json.dumps(cached))
    record_files(copy)
    code, missed, _ = verified(copy, capsys)
    assert code == 6 and missed == ["unet, float32", "vae_encoder, float32"]


def test_an_image_too_far_off_in_bf16_says_that_exact_is_valid(copy, capsys, monkeypatch):
    pytest.importorskip("openvino")
    if not has_bf16():
        pytest.skip("this processor has no bf16")
    record_files(copy, lambda manifest: manifest.update(admitted={"openvino-bf16": 40.0}))
    monkeypatch.setattr(parity, "MIN_IMAGE_PSNR", 500.0)
    code = main(["verify", "--quiet", "--bundle", str(copy), "--backend", "openvino"])
    reported = capsys.readouterr()
    assert code == 6 and reported.out.count("FAILED") == 1
    assert "image in openvino-bf16" in reported.err and "run it with --exact" in reported.err


def test_an_engine_that_answers_otherwise_each_time_is_noticed(tiny_bundle):
    candidate = select_backend("onnxruntime")

    class Unsteady:
        """A real engine whose last bit changes from call to call."""

        def __init__(self, engine):
            self.engine, self.calls = engine, 0

        def __getattr__(self, name):
            return getattr(self.engine, name)

        def __call__(self, feeds):
            self.calls += 1
            small = np.float32(1 + self.calls * 1e-6)
            return {name: value * small for name, value in self.engine(feeds).items()}

    unsteady = replace(candidate, load=lambda b, name: Unsteady(candidate.load(b, name)))
    missed = {c.what for c in run_checks(open_bundle(tiny_bundle), unsteady) if not c.passed}
    assert missed == {"same seed twice"}


def test_graphs_with_lora_factors_are_validated_without_any(shapes, tmp_path):
    bundle = with_lora_graphs(shapes, tmp_path / "rows", 2)
    checks = {check.what: check for check in run_checks(bundle, select_backend("onnxruntime"))}
    assert {f"{name}, float32" for name in LORA_PARTS.values()} & set(checks) == {
        "unet_lora, float32",
        "text_encoder_lora, float32",
    }
    assert all(check.passed for check in checks.values())
