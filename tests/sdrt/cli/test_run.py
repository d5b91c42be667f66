"""What `sdrt run` checks before it loads anything, and the files that it writes."""

import os
import pty
import re
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from sdrt import atomic_files
from sdrt.cli import run as cli_run
from sdrt.cli.main import main
from sdrt.runtime.images import parse_parameters

pytestmark = pytest.mark.integration

PROMPT = "a red circle"
FAST = ["--steps", "1", "--seed", "0", "-q"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def text_of(path):
    return Image.open(path).text["parameters"]


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--steps", "0"], ["--size", "512"], ["--size", "68x64"], ["--image", "nope.png"]),
        *(["--scheduler", "typo"], ["--mask", "nope.png"], ["--strength", "0.5"], ["--seed", "-1"]),
        *(["--output", "a.gif"], ["--num-images", "0"], ["--guidance-scale", "-1"]),
        *(["--lora", "nope"], ["--scheduler-option", "solver_order=9"], ["--reuse", "0"]),
    ],
)
def test_arguments_are_checked_before_anything_loads(shapes, capsys, monkeypatch, arguments):
    monkeypatch.setattr(cli_run, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert main(["run", PROMPT, "--bundle", str(shapes), *arguments]) in (2, 4)
    assert "error: " in capsys.readouterr().err


def test_images_are_named_after_their_own_prompts(shapes, tmp_path, capsys):
    arguments = ["run", "a red circle", "a blue square", *FAST, "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert names(tmp_path) == ["a-blue-square-1-1.png", "a-red-circle-0-0.png"]
    assert text_of(tmp_path / "a-blue-square-1-1.png").startswith("a blue square\n")


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.webp", "WEBP")])
def test_other_formats_hold_their_settings_too(shapes, tmp_path, capsys, name, kind):
    output = tmp_path / name
    assert main(["run", PROMPT, "--steps", "2", "--seed", "7", "--output", str(output)]) == 0
    assert Image.open(output).format == kind
    again = tmp_path / "again.png"
    assert main(["run", "--from", str(output), "--output", str(again)]) == 0
    settings = parse_parameters(text_of(again))
    assert (settings["Prompt"], settings["Seed"], settings["Steps"]) == (PROMPT, "7", "2")


def test_a_file_that_is_there_is_not_overwritten(shapes, tmp_path, capsys):
    for _ in range(3):
        assert main(["run", PROMPT, *FAST, "--output", str(tmp_path)]) == 0
    written = ["a-red-circle-0-2.png", "a-red-circle-0-3.png", "a-red-circle-0.png"]
    assert names(tmp_path) == written
    said = capsys.readouterr().out.split()
    assert said == [str(tmp_path / name) for name in (written[2], *written[:2])]


def test_the_file_that_is_named_is_replaced_and_numbered_ones_are_not(shapes, tmp_path, capsys):
    output = tmp_path / "a.png"
    output.write_bytes(b"old")
    (tmp_path / "a-1.png").write_bytes(b"old")
    assert main(["run", PROMPT, *FAST, "--output", str(output)]) == 0
    assert Image.open(output).size == (64, 64)
    assert main(["run", PROMPT, *FAST, "--num-images", "2", "--output", str(output)]) == 0
    assert names(tmp_path) == ["a-0.png", "a-1-2.png", "a-1.png", "a.png"]
    assert (tmp_path / "a-1.png").read_bytes() == b"old"


@pytest.mark.parametrize("links", [True, False])
def test_names_are_each_taken_once(tmp_path, monkeypatch, links):
    def none(*_):
        raise PermissionError("no hard links here")

    if not links:
        monkeypatch.setattr(atomic_files.os, "link", none)
    with ThreadPoolExecutor(8) as pool:
        contents = [str(i).encode() for i in range(24)]
        paths = list(
            pool.map(lambda item: atomic_files.write_numbered(tmp_path / "a.txt", item), contents)
        )
    assert len({*paths}) == 24 and [path.read_bytes() for path in paths] == contents
    assert len(names(tmp_path)) == 24


def test_the_text_of_a_grid_holds_all_seeds_and_prompts(shapes, tmp_path, capsys):
    prompts = ['a "red" circle, big', "a blue square"]
    output = tmp_path / "grid.png"
    arguments = ["--num-images", "2", "--grid", "--steps", "1", "--seed", "5", "-q"]
    assert main(["run", *prompts, *arguments, "--output", str(output)]) == 0
    settings = parse_parameters(text_of(output))
    assert settings["Seed"] == "5" and settings["Seeds"] == '"[5, 6, 7, 8]"'
    assert settings["Prompts"].count("a blue square") == 2 and settings["Prompt"] == prompts[0]


def on_screen(raw):
    """The lines that a terminal shows, of output that returns to a line's start."""
    lines = []
    for line in raw.split("\n"):
        shown = []
        for part in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).split("\r"):
            shown[: len(part)] = part
        lines.append("".join(shown).rstrip())
    return lines


def test_the_bar_does_not_touch_the_paths(shapes, tmp_path):
    command = [sys.executable, "-m", "sdrt", "run", PROMPT, "--steps", "2", "--seed", "0"]
    command += ["--num-images", "6", "--output", str(tmp_path)]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    raw = b""
    while True:
        try:
            raw += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    lines = on_screen(raw.decode())
    assert b"2/2" in raw and b"Decoding" in raw
    paths = {str(path) for path in tmp_path.iterdir()}
    assert len(paths) == 6 and paths <= {*lines}, lines
