"""`sdrt run --control` with `outline`, the ControlNet of the embedded model."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdrt
from sdrt.cli.main import main
from sdrt.errors import UsageError

pytestmark = pytest.mark.integration
PROMPT = "a red circle on a blue background"


@pytest.fixture
def edges(tmp_path):
    """A circle's outline, away from the centre."""
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).ellipse((6, 6, 38, 38), outline=255)
    image.save(tmp_path / "edges.png")
    return tmp_path / "edges.png"


def run(*arguments):
    return main(["run", "--quiet", "--steps", "12", "--seed", "1", *map(str, arguments)])


def disc():
    """Pixels inside the outline, [64, 64]."""
    y, x = np.mgrid[:64, :64]
    return (x - 22) ** 2 + (y - 22) ** 2 <= 16**2


def overlap(path):
    """Intersection over union of what is red and of the outline's inside."""
    red, _, blue = np.moveaxis(np.asarray(Image.open(path).convert("RGB"), np.int32), -1, 0)
    shape = red > blue
    return (shape & disc()).sum() / (shape | disc()).sum()


def test_the_shape_fills_the_outline(shapes, edges, tmp_path):
    plain, steered = tmp_path / "plain.png", tmp_path / "steered.png"
    assert run(PROMPT, "--bundle", shapes, "--output", plain) == 0
    control = ["--bundle", shapes, "--control", f"outline={edges}"]
    assert run(PROMPT, *control, "--output", steered) == 0
    assert overlap(steered) >= 0.8 > overlap(plain)
    text = Image.open(steered).text["parameters"]
    assert "ControlNet 0" in text and "Model: outline" in text


def test_an_image_comes_back_with_its_control(shapes, edges, tmp_path, capsys):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    control = ["--bundle", shapes, "--control", f"outline={edges}:0.8:0:0.7"]
    assert run(PROMPT, *control, "--output", first) == 0
    again = ["run", "--quiet", "--from", str(first), "--output", str(second)]
    assert main([*again, "--bundle", str(shapes)]) == 2
    assert "--control outline=FILE:0.8:0:0.7" in capsys.readouterr().err
    assert main([*again, *map(str, control)]) == 0
    assert Image.open(first).tobytes() == Image.open(second).tobytes()


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ("outline", "NET=FILE"),
        ("outline=missing.png", "missing.png"),
        ("nothing={edges}", "nothing"),
        ("shapes={edges}", "shapes"),
        ("outline={edges}:1:0.5:0.5", "control_guidance"),
    ],
)
def test_bad_control_is_refused(shapes, edges, capsys, control, words):
    assert run(PROMPT, "--bundle", shapes, "--control", control.format(edges=edges)) != 0
    errors = capsys.readouterr().err
    assert words in errors and "Traceback" not in errors


def test_zero_control_has_the_bytes_of_none(shapes, edges):
    with sdrt.load(shapes, backend="onnxruntime", controlnet="outline") as pipe:
        options = {"num_inference_steps": 4, "seed": 3}
        plain = pipe(PROMPT, **options).images[0]
        edges = Image.open(edges)
        off = pipe(PROMPT, control_image=edges, controlnet_conditioning_scale=0.0, **options)
    assert plain.tobytes() == off.images[0].tobytes()


def test_a_controlnet_is_no_ip_adapter(shapes, edges, tmp_path, capsys):
    adapter = ["--bundle", shapes, "--ip-adapter", f"outline={edges}"]
    assert run(PROMPT, *adapter, "--output", tmp_path / "image.png") == 2
    assert "outline is not an IP-Adapter" in capsys.readouterr().err
    with pytest.raises(UsageError, match="outline is not an IP-Adapter"):
        sdrt.load(shapes, ip_adapter="outline")


def test_an_ip_adapter_is_no_controlnet(shapes, edges, tmp_path, capsys):
    control = ["--bundle", shapes, "--control", f"likeness={edges}"]
    assert run(PROMPT, *control, "--output", tmp_path / "image.png") == 2
    assert "pass it as an IP-Adapter" in capsys.readouterr().err
    with pytest.raises(UsageError, match="likeness holds no ControlNet"):
        sdrt.load(shapes, controlnet=["outline", "likeness"])
