"""Upscalers: tiles, names, and a bundle through `sdrt build`, `sdrt upscale` and a second pass."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sdrt
from sdrt.bundle.store import bundles_folder
from sdrt.cli.main import main
from sdrt.errors import SdrtError, UsageError
from sdrt.runtime import esrgan
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.esrgan import Esrgan
from sdrt.runtime.images import parse_parameters, read_parameters, save_image
from sdrt.runtime.upscaling import Upscalers, list_upscalers

pytestmark = pytest.mark.integration
PROMPT = "a red circle on a blue background"


class Blur:
    """A network of scale 4 that sees three pixels to every side: a box, then nearest pixels."""

    def __init__(self):
        self.sides = []

    def __call__(self, feeds):
        image = torch.from_numpy(feeds["image"])
        self.sides.append(image.shape[2:])
        padded = torch.nn.functional.pad(image, (3, 3, 3, 3))
        blurred = torch.nn.functional.avg_pool2d(padded, 7, stride=1)
        return {"enlarged": blurred.repeat_interleave(4, 2).repeat_interleave(4, 3).numpy()}


def noise_image(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def smooth_image(width, height):
    across, down = np.sin(np.arange(width) / 5.0), np.cos(np.arange(height) / 7.0)
    plane = np.outer(down, across) * 127 + 128
    return Image.fromarray(np.stack([plane, plane.max() - plane, plane], -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(200, 140), (65, 63), (63, 300)])
def test_tiles_leave_no_seams(size):
    image = smooth_image(*size)
    tiles, at_once = Blur(), Blur()
    tiled = Esrgan(tiles, 4, (64, 64), 2).enlarge(image)
    full = Esrgan(at_once, 4, (512, 512), 2).enlarge(image)
    assert len(tiles.sides) > 1 and len(at_once.sides) == 1
    assert all(max(sides) <= 64 and not any(side % 2 for side in sides) for sides in tiles.sides)
    assert tiled.size == full.size == (4 * size[0], 4 * size[1])
    # Blur sees black beyond its border, so a tile is up to half darker there. Blended, a border has
    # the smallest weight, at a corner that of two sides.
    assert np.abs(np.asarray(tiled, int) - np.asarray(full, int)).max() <= 16


def test_an_upscaler_runs_until_the_size_is_reached():
    calls = Blur()
    upscaler = esrgan_upscaler(calls)
    assert upscaler.upscale(noise_image(8, 8), (100, 90)).size == (100, 90)
    assert [tuple(sides) for sides in calls.sides] == [(8, 8), (32, 32)]


def esrgan_upscaler(engine):
    from sdrt.runtime.upscaling import ImageUpscaler

    return ImageUpscaler("blur", scale=4, enlarge=Esrgan(engine, 4, (64, 64)).enlarge)


def test_too_large_a_result_is_refused(monkeypatch):
    monkeypatch.setattr(esrgan, "available_bytes", lambda: 1_000_000)
    with pytest.raises(UsageError, match="400x400 needs about 8 MB"):
        Esrgan(Blur(), 4, (64, 64)).enlarge(noise_image(100, 100))


def test_what_is_not_finite_is_not_written():
    def broken(feeds):
        return {"enlarged": np.full((1, 3, 32, 32), np.nan, np.float32)}

    with pytest.raises(SdrtError, match="NaN"):
        Esrgan(broken, 4, (64, 64)).enlarge(noise_image(8, 8))


def test_filters_and_names(shapes):
    image = noise_image(20, 10)
    result = sdrt.upscale(image, scale=1.5)
    expected = image.resize((30, 15), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(result, expected)
    for name, message in (("Latent", "enlarges latents"), ("nothing", "unknown upscaler")):
        with pytest.raises(UsageError, match=message):
            sdrt.upscale(image, name)
    with pytest.raises(UsageError, match="is not an upscaler"):
        Upscalers().find("shapes")
    with pytest.raises(UsageError, match="sides of at most"):
        sdrt.upscale(noise_image(3000, 10), scale=8.0)


def test_files_are_enlarged_next_to_their_own(shapes, tmp_path, capsys):
    path = save_image(noise_image(16, 8), tmp_path / "a.png", "a prompt\nSteps: 3, Seed: 1")
    assert main(["upscale", str(path), "--scale", "3", "-q"]) == 0
    written = Image.open(capsys.readouterr().out.strip())
    assert written.size == (48, 24) and written.filename == str(tmp_path / "a-3x.png")
    settings = parse_parameters(read_parameters(written))
    assert settings["Seed"] == "1" and settings["Postprocess upscale by"] == "3"
    assert main(["run", "--from", written.filename, "-q"]) == 2  # it is not the image of its text
    assert "Postprocess" in capsys.readouterr().err
    assert main(["upscale", str(path), str(path), "--output", str(tmp_path / "b.png")]) == 2
    assert main(["upscale", str(tmp_path / "none.png")]) == 2


@pytest.fixture(scope="module")
def tiny_upscaler(home, tmp_path_factory):
    """The name of a bundle of random weights, scale 4."""
    pytest.importorskip("onnx_ir")
    from sdrt.export.esrgan import RrdbConfig, RrdbNet

    torch.manual_seed(0)
    net = RrdbNet(RrdbConfig(8, 4, 1, 2))
    for name, parameter in net.named_parameters():
        if name.startswith("conv_last"):  # random weights leave the range of colours otherwise
            parameter.data = parameter.data * 0.1 + (0.5 if name.endswith("bias") else 0.0)
    path = tmp_path_factory.mktemp("weights") / "tiny-x4.safetensors"
    save_file(net.state_dict(), path)
    assert main(["build", "--upscaler", str(path), "-q"]) == 0
    yield "tiny-x4", net
    import shutil

    shutil.rmtree(bundles_folder() / "tiny-x4")


@pytest.mark.build
def test_a_bundle_is_built_and_used_everywhere(tiny_upscaler, shapes, tmp_path, capsys):
    name, net = tiny_upscaler
    assert name in list_upscalers()
    image = noise_image(150, 90)
    with torch.no_grad():
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255.0
        expected = net(torch.from_numpy(pixels))[0].clamp(0, 1).permute(1, 2, 0).numpy()
    for backend in ("onnxruntime", "openvino", "torch"):
        result = np.asarray(sdrt.upscale(image, name, 4.0, backend=backend)) / 255.0
        # 150 pixels are two tiles; the network sees less than their overlap.
        assert 10 * np.log10(1.0 / np.mean((result - expected) ** 2)) >= 50
    assert name not in {info.name for info in sdrt.bundles()}
    path = save_image(image, tmp_path / "a.png", "")
    arguments = ["--upscaler", name, "--output", str(tmp_path / "b.png"), "-q"]
    assert main(["upscale", str(path), *arguments]) == 0
    assert Image.open(tmp_path / "b.png").size == (300, 180)
    with pytest.raises(SdrtError, match="upscaler"):
        sdrt.load(name)
    assert main(["verify", "--bundle", name, "-q"]) == 0
    assert "upscaler, float32" in capsys.readouterr().out


@pytest.mark.build
def test_a_second_pass_enlarges_by_a_bundle(tiny_upscaler, shapes):
    name, _ = tiny_upscaler
    options = {"num_inference_steps": 4, "seed": 3, "hires_scale": 2.0, "hires_upscaler": name}
    with sdrt.load(shapes, backend="onnxruntime") as pipe:
        output = pipe(PROMPT, **options)
        first = pipe(PROMPT, num_inference_steps=4, seed=3).images[0]
        enlarged = sdrt.upscale(first, name, 2.0, backend="onnxruntime")
        lanczos = pipe(PROMPT, **options | {"hires_upscaler": "Lanczos"}).images[0]
        with InflightBatcher(pipe) as batcher:
            (handle,) = batcher.submit(PROMPT, options)
            np.testing.assert_array_equal(handle.future.result(60).image, output.images[0])
    assert np.asarray(enlarged).std() > 0 and output.images[0] != lanczos
    assert parse_parameters(output.parameters[0])["Hires upscaler"] == name


@pytest.mark.build
def test_half_precision_and_pixels_in_channels(tmp_path):
    from sdrt.export.esrgan import RrdbConfig, RrdbNet

    torch.manual_seed(0)
    net = RrdbNet(RrdbConfig(8, 4, 1, 2, shuffle=2))
    net.conv_last.weight.data *= 0.1
    net.conv_last.bias.data += 0.5
    save_file(net.state_dict(), tmp_path / "tiny-x2.safetensors")
    bundle = sdrt.build_upscaler(
        str(tmp_path / "tiny-x2.safetensors"), output=tmp_path / "bundle", precision="fp16"
    )
    assert bundle.manifest.components["upscaler"].dtype == "float16"
    image = noise_image(61, 40)  # padded by a pixel, as 61 is odd
    with torch.no_grad():
        padded = np.pad(np.asarray(image, np.float32) / 255.0, ((0, 0), (0, 1), (0, 0)), "edge")
        expected = net(torch.from_numpy(padded.transpose(2, 0, 1)[None]))[0, :, :, :122]
    result = sdrt.upscale(image, str(bundle.folder), 2.0, backend="onnxruntime")
    difference = np.asarray(result) / 255.0 - expected.clamp(0, 1).permute(1, 2, 0).numpy()
    assert result.size == (122, 80) and 10 * np.log10(1.0 / np.mean(difference**2)) >= 35
