"""The commands as a user types them: paths on standard output, sentences on standard error."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrt.cli.main import build_parser, commands, main
from sdrt.errors import StorageError

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"


def sdrt(*arguments, **options):
    command = [sys.executable, "-m", "sdrt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_run_prints_only_the_path(shapes, tmp_path):
    done = sdrt("run", PROMPT, "--steps", "4", "--seed", "0", "--output", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a.png\n"
    assert "shapes · fp32 · ONNX Runtime (CPU)" in done.stderr
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
        (["run", PROMPT, "--guidance-scale", "nan"], 2, "--guidance-scale is nan"),
        (["run", PROMPT, "--scheduler", "Eulr"], 2, "did you mean Euler"),
        (["run", PROMPT, "--size", "100x100"], 2, "multiple of 8"),
        (["run", PROMPT, "--output", "a.gif"], 2, ".png"),
        (["run", PROMPT, "--image", "nope.png"], 2, "does not exist"),
        (["run", PROMPT, "--mask", "nope.png"], 2, "--mask requires --image"),
        (["run", PROMPT, "--strength", "2"], 2, "--strength requires --image"),
        (["run"], 2, "no prompt"),
        (["run", PROMPT, "--size", "512"], 2, "WIDTHxHEIGHT"),
        (["run", PROMPT, "--seed", "-1"], 2, "--seed is -1"),
        (["run", PROMPT, "--lora", "nope"], 4, "no LoRA named"),
        (["run", PROMPT, "--depth", "nope.png"], 2, "does not exist"),
        (["run", PROMPT, "--scheduler", "DPM++ 2M Karas"], 2, "did you mean DPM++ 2M Karras"),
        (["run", PROMPT, "--bundle", "shappes"], 3, "did you mean shapes?"),
        (["run", PROMPT, "--guidance-interval", "x"], 2, "FROM:TO"),
        (["run", PROMPT, "--scheduler-option", "eta"], 2, "KEY=VALUE"),
        (["run", PROMPT, "--scheduler-option", "solver_order=9"], 2, "solver_order"),
        (["run", "(a:99)"], 2, "expected 0 to 10"),
        (["compare", PROMPT, "--steps", "a,2"], 2, "expected integers"),
        (["bench", "--rounds", "0"], 2, "1 to 1000"),
        (["bench", "--plot", "a.jpg"], 2, "ends in .png"),
        (["bench", "--steps", "4,x"], 2, "--steps 1,4,20"),
        (["bench", "--engines", "nothing"], 2, "unknown engine 'nothing'"),
        (["bench", "--bundle", "nope"], 3, "no bundle called"),
        (["compare", PROMPT, "--schedulers", "Eulr"], 2, "did you mean Euler"),
        (["compare", PROMPT, "--output", "a.gif"], 2, ".png"),
        (["rnu"], 2, "did you mean `run`?"),
        (["run", "--stepz", "5"], 2, "did you mean `--steps`?"),
        (["run", "--step", "5"], 2, "unknown option `--step`"),
        (["run", "--cfg-scale", "7"], 2, "did you mean `--guidance-scale`?"),
        (["run", PROMPT, "--backend", "onnx"], 2, "did you mean `onnxruntime`?"),
        (["build", "--modle", "shapes"], 2, "did you mean `--model`?"),
        (["doctor", "now"], 2, "unexpected argument `now`\nhint: run `sdrt doctor --help`"),
        (["build", "--model", "shapes", "--name", "a/b"], 2, "--name 'a/b'"),
        (["use", "nope"], 3, "no bundle called"),
        (["remove", "nope"], 3, "no bundle called"),
        (["run", PROMPT, "--backend", "tensorrt"], 5, "no backend can run here"),
        (["run", PROMPT, "--bundle", "nope"], 3, "`sdrt build` makes one"),
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
        "unet_control",
        "unet_shallow",
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
from sdrt.cli import main as cli
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
    assert done.returncode == 130 and "Interrupted" in done.stderr


def test_from_an_image_with_everything(shapes, tmp_path, capsys):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (64, 64), "red").save(first)
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    code = main(
        ["run", "a (white:1.2) cross", "--image", str(first), "--strength", "0.6", "--seed", "2"]
        + ["--mask", str(tmp_path / "mask.png"), "--scheduler", "dpm++ 2m sde karras", "--preview"]
        + ["--scheduler-option", "solver_order=3", "--clip-skip", "1", "--rng", "cuda"]
        + ["--guidance-interval", "0:0.9", "--guidance-rescale", "0.2", "--output", str(second)]
    )
    said = capsys.readouterr()
    assert code == 0 and said.out == f"{second}\n" and "preview.png" in said.err
    text = Image.open(second).text["parameters"]
    for part in ("Sampler: DPM++ 3M SDE Karras", "Denoising strength: 0.6", "RNG: NV"):
        assert part in text
    assert "Clip skip: 2" in text and "CFG rescale: 0.2" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "mask.png"]


def test_the_preview_takes_nobodys_file(shapes, tmp_path, capsys):
    output = tmp_path / "preview.png"
    arguments = ["run", PROMPT, "--steps", "2", "--seed", "0", "--preview", "--output", str(output)]
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
    assert Image.open(output).size == (64, 64)


def test_the_preview_is_replaced_at_every_step(shapes, tmp_path, monkeypatch):
    from sdrt.cli import run as cli_run

    seen = []

    def save(image, path, text, replace=True):
        seen.append((image, text))
        return path

    monkeypatch.setattr(cli_run, "save_image", save)
    arguments = ["run", PROMPT, "--steps", "4", "--seed", "0", "--preview", "-q"]
    assert main([*arguments, "--scheduler", "DDIM", "--output", str(tmp_path / "a.png")]) == 0
    assert [text for _, text in seen[:-1]] == [f"step {i} of 4" for i in range(1, 5)]
    last = seen[-2][0]
    assert last.size == (256, 256)
    red, blue = last.getpixel((128, 128)), last.getpixel((4, 4))
    assert red[0] > red[2] and blue[2] > blue[0]


def test_a_file_is_written_while_the_next_image_is_made(shapes, tmp_path, capsys, monkeypatch):
    """The first file waits until the decoder works on the second image."""
    import threading
    from dataclasses import replace

    import sdrt
    from sdrt.cli import run as cli_run

    second, saved = threading.Event(), []

    class Decoder:
        def __init__(self, engine):
            self.engine, self.calls = engine, 0

        def __call__(self, feeds):
            self.calls += 1
            if self.calls == 2:
                second.set()
            return self.engine(feeds)

        def close(self):
            self.engine.close()

    def opened(args):
        pipe = sdrt.load(shapes, backend="onnxruntime")
        decoder = Decoder(pipe.engines["vae_decoder"])
        return replace(pipe, engines={**pipe.engines, "vae_decoder": decoder})

    def save(image, path, text, replace):
        assert second.wait(20)
        saved.append(path)
        return write(image, path, text, replace)

    write = cli_run.save_image
    monkeypatch.setattr(cli_run, "open_pipeline", opened)
    monkeypatch.setattr(cli_run, "save_image", save)
    arguments = ["run", PROMPT, "--num-images", "3", "--steps", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(path) for path in saved] and len(saved) == 3
    assert all(Image.open(path).text["parameters"] for path in saved)


def test_a_file_that_cannot_be_written_ends_the_run(shapes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["run", PROMPT, "--num-images", "2", "--steps", "1"]
    assert main([*arguments, "--output", str(tmp_path / "file" / "a.png")]) == 2
    said = capsys.readouterr()
    assert "failed to write" in said.err and not said.out


def test_what_is_finished_is_kept_when_interrupted(shapes, tmp_path, capsys, monkeypatch):
    from sdrt.runtime import Pipeline

    original, calls = Pipeline.decode, []

    def decode(self, latents):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(self, latents)

    monkeypatch.setattr(Pipeline, "decode", decode)
    arguments = ["run", PROMPT, "--steps", "1", "--seed", "0", "--num-images", "12"]
    assert main([*arguments, "--output", str(tmp_path)]) == 130
    said = capsys.readouterr()
    assert "Interrupted" in said.err and len(said.out.split()) == 8
    assert len(list(tmp_path.iterdir())) == 8


def test_a_compared_image_can_be_made_again(shapes, tmp_path, capsys):
    sheet, alone = tmp_path / "sheet.png", tmp_path / "alone.png"
    options = ["--schedulers", "Euler,Euler", "--steps", "2", "--json", "--output", str(sheet)]
    assert main(["compare", PROMPT, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(["run", "--from", str(sheet), "--output", str(alone), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seeds"] == [report["seed"]]
    cells, image = np.asarray(Image.open(sheet)), np.asarray(Image.open(alone))
    assert (cells[4:132:2, 4:132:2] == image).all(), "the first, enlarged, in a frame"
    assert (cells[4:132:2, 140:268:2] == image).all(), "the second has the same seed"


def test_compare_and_schedulers(shapes, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    code = main(
        ["compare", PROMPT, "--schedulers", "Euler,DDIM", "--steps", "1,2,3", "--seed", "0"]
        + ["--json", "--output", str(sheet)]
    )
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and len(report["pictures"]) == 6
    size = Image.open(sheet).size
    assert size[0] == 3 * 136 and size[1] > 2 * 136
    assert main(["schedulers", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"DPMSolverMultistepScheduler", "TCDScheduler"} <= {entry["name"] for entry in listed}
    assert main(["schedulers"]) == 0
    assert "DPM++ 2M" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Euler Karras", "DPM++ 2M SDE", "plms", "DPM2 a Exponential"])
def test_names_of_other_tools_come_back_in_the_file(shapes, name):
    from sdrt.runtime.samplers.registry import config_from_name, sampler_title

    config = config_from_name(name, {"algorithm_type": "dpmsolver++", "use_beta_sigmas": True})
    assert sampler_title(config).casefold() == name.casefold()


@pytest.mark.parametrize("command", [command.name for command in commands()])
def test_help_has_its_own_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert 1 <= len(examples) <= 3
    assert all(line.startswith(f"  sdrt {command}") for line in examples)


@pytest.mark.parametrize("command", [command.name for command in commands()])
def test_every_option_has_a_text_and_its_default(command):
    """And every example is one that its command accepts."""
    parser = build_parser()._subparsers._group_actions[0].choices[command]
    for action in parser._actions:
        assert action.help, action.option_strings
        if action.default not in (None, False, "", [], argparse.SUPPRESS) and action.nargs != 0:
            assert "default" in action.help, action.option_strings
    for line in parser.epilog.splitlines()[1:]:
        words = shlex.split(line)[1:]
        build_parser().parse_args(words[: words.index(">")] if ">" in words else words)


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "examples:" in shown.err and not shown.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_the_commands(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "schedulers" in script and "guidance-scale" in script


@pytest.mark.parametrize(("colour", "plain"), [(True, {}), (False, {"NO_COLOR": "1"})])
def test_errors_are_coloured_on_terminals_only(monkeypatch, capsys, colour, plain):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in plain.items():
        monkeypatch.setenv(name, value)
    assert main(["rnu"]) == 2
    assert capsys.readouterr().err == "error: unknown command `rnu`\nhint: did you mean `run`?\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["rnu"]) == 2
    assert ("\x1b[1;31merror:" in capsys.readouterr().err) is colour


def test_schedulers_are_aligned(capsys):
    assert main(["schedulers"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    column = header.index("UNET CALLS")
    assert all(row[column - 2 : column] == "  " and row[column].isdigit() for row in rows)


def test_help_imports_neither_numpy_nor_pillow():
    code = "import sys, sdrt.cli.main as m; m.build_parser().format_help(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "PIL", "psutil", "filelock", "shtab"} & set(done.stdout.split())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", [["list"], ["doctor", "--json"]])
def test_a_full_disk_behind_standard_output_has_its_own_code(shapes, command):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sdrt", *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == StorageError.exit_code == 8
    assert done.stderr == "error: failed to write: No space left on device\nhint: free some space\n"


def test_a_full_disk_leaves_what_is_there(shapes, tmp_path):
    """A limit on the size of files stands in for a disk without space."""
    resource = pytest.importorskip("resource")
    arguments = ["run", PROMPT, "--steps", "1", "--seed", "0", "-q", "--output", "a.png"]
    (tmp_path / "a.png").write_bytes(b"earlier")
    command = [sys.executable, "-m", "sdrt", *arguments]
    limit = 1000  # bytes, less than an image
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 8 and done.stderr.startswith("error: failed to write a.png")
    assert "hint: free some space" in done.stderr and not done.stdout
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]
