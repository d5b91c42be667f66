"""`sdrt preprocess`: edges of known images, and what is refused."""

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdrt
from sdrt.cli.main import main
from sdrt.errors import UsageError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cv2():
    return pytest.importorskip("cv2", reason="requires sdrt[preprocessors]")


@pytest.fixture
def disc():
    """An orange disc on blue, smooth at its rim."""
    image = Image.new("RGB", (256, 192), (30, 60, 200))
    ImageDraw.Draw(image).ellipse((64, 32, 192, 160), fill=(230, 150, 20))
    return image.resize((128, 96), Image.Resampling.LANCZOS)


def test_edges_are_those_of_opencv(cv2, disc):
    """As diffusers' examples compute them."""
    edges = np.asarray(sdrt.preprocess("canny", disc))
    expected = cv2.Canny(np.array(disc), 100, 200)
    assert edges.shape == (96, 128, 3)
    assert np.array_equal(edges, np.concatenate([expected[:, :, None]] * 3, axis=2))


def test_edges_lie_on_the_rim(cv2, disc):
    """Of the disc of radius 32 about the centre, and nowhere else."""
    edges = np.asarray(sdrt.preprocess("canny", np.asarray(disc)))[..., 0]
    assert set(np.unique(edges)) == {0, 255}
    y, x = np.nonzero(edges)
    radius = np.hypot(x - 63.5, y - 47.5)
    assert np.abs(radius - 32).max() < 2.5
    angles = np.degrees(np.arctan2(y - 47.5, x - 63.5)) // 10
    assert len(np.unique(angles)) == 36  # all around


def test_a_size_is_applied_before_the_edges(cv2, disc):
    edges = sdrt.preprocess("canny", disc, size=(64, 48))
    assert edges.size == (64, 48)
    assert set(np.unique(np.asarray(edges))) == {0, 255}  # resized afterwards they would be grey
    faint = sdrt.preprocess("canny", disc, low_threshold=2000, high_threshold=2040)
    assert not np.asarray(faint).any()


def test_the_command_writes_a_control_image(cv2, disc, tmp_path, capsys):
    disc.save(tmp_path / "photo.png")
    photo = str(tmp_path / "photo.png")
    assert main(["preprocess", "canny", photo, "--size", "64x48"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "photo-canny.png")
    output = tmp_path / "edges.png"
    assert main(["preprocess", "canny", photo, "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"images": [str(output)]}
    assert np.array_equal(np.asarray(Image.open(output)), sdrt.preprocess("canny", disc))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("depth", {}, "unknown preprocessor 'depth'"),
        ("canny", {"low_threshold": 300}, "low_threshold 300 is above high_threshold 200"),
        ("canny", {"high_threshold": 5000}, "high_threshold"),
        ("canny", {"low_threshold": float("nan")}, "low_threshold"),
        ("canny", {"size": "63x48"}, "63 is not a multiple of 8"),
    ],
)
def test_what_does_not_fit_is_refused(disc, name, options, words):
    with pytest.raises(UsageError, match=words):
        sdrt.preprocess(name, disc, **options)


def test_without_opencv_the_extra_is_named(disc, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match="canny requires cv2") as refused:
        sdrt.preprocess("canny", disc)
    assert "sdrt[preprocessors]" in refused.value.hint
