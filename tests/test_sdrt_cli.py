"""The commands as a user types them: paths on standard output, sentences on standard error."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from sdrt.cli import main

PROMPT = "a red circle on a blue background"


def sdrt(*arguments, **options):
    command = [sys.executable, "-m", "sdrt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_run_prints_only_the_path(shapes, tmp_path):
    done = sdrt("run", PROMPT, "--steps", "4", "--seed", "0", "--output", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a.png\n"
    assert "backend: onnxruntime on cpu" in done.stderr
    assert Image.open(tmp_path / "a.png").size == (64, 64)


def test_run_json_grid_and_folder(shapes, tmp_path, capsys):
    code = main(
        ["run", PROMPT, "a square", "--num-images", "2", "--steps", "1", "--seed", "5", "--json"]
        + ["--output", str(tmp_path)]
    )
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and len(report["images"]) == 4 and report["seeds"] == [5, 6, 7, 8]
    assert (
        main(
            ["run", PROMPT, "--num-images", "3", "--steps", "1", "--grid"]
            + ["--output", str(tmp_path / "g.png")]
        )
        == 0
    )
    assert Image.open(tmp_path / "g.png").size == (128, 128)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", PROMPT, "--steps", "0"], 2, "from 1 to 1000"),
        (["run", PROMPT, "--guidance-scale", "nan"], 2, "guidance scale nan"),
        (["run", PROMPT, "--scheduler", "Eulr"], 2, "did you mean Euler"),
        (["run", PROMPT, "--size", "100x100"], 2, "multiple of 8"),
        (["run", PROMPT, "--output", "a.jpg"], 2, ".png"),
        (["run", PROMPT, "--backend", "tensorrt"], 5, "no backend can run here"),
        (["run", PROMPT, "--bundle", "nope"], 3, "sdrt build --model nope"),
        (["run", "a\udcffb"], 2, "surrogate"),
        (["build", "--model", "shape"], 4, "did you mean shapes"),
        (["build", "--model", "shapes", "--batch", "4:1:1"], 2, "MIN:OPT:MAX"),
        (["build", "--model", "shapes", "--size", "63x64"], 2, "nearest: 64"),
        (["inspect", "--bundle", "nope"], 3, "no bundle called"),
    ],
)
def test_mistakes_get_a_sentence_and_a_code(shapes, capsys, arguments, code, message, monkeypatch):
    assert main(arguments) == code
    said = capsys.readouterr()
    assert message in said.err and not said.out and "Traceback" not in said.err


def test_inspect_and_doctor(shapes, capsys):
    assert main(["inspect", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described[0]["name"] == "shapes" and set(described[0]["components"]) == {
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
    }
    assert main(["inspect"]) == 0
    assert "vae_decoder" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    backends = json.loads(capsys.readouterr().out)["backends"]
    assert any(b["backend"] == "onnxruntime" and b["works"] for b in backends)
    assert all(b["works"] or b["reason"] for b in backends)
    assert main(["doctor"]) == 0
    assert "onnxruntime   cpu   works" in capsys.readouterr().out


def test_an_interrupt_that_a_finaliser_swallows_is_heard():
    code = """
import os, signal, sys, time
from sdrt import cli
class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
def doctor(args):
    Deaf()
    time.sleep(30)
cli.doctor = doctor
sys.argv = ["sdrt", "doctor"]
sys.exit(cli.entry())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 130 and "interrupted" in done.stderr


@pytest.mark.parametrize("command", ["build", "run", "inspect", "doctor"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "examples:" in capsys.readouterr().out
