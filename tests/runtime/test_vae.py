"""Decoding: half precision that overflows for some latents, and images in tiles."""

import itertools
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from exports import load_component
from PIL import Image
from safetensors.numpy import load_file, save_file

import sdrt
from sdrt.bundle.manifest import FLOAT32_GRAPH
from sdrt.errors import SdrtError
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.validation import track_largest_activation
from sdrt.runtime import randn
from sdrt.runtime.vae import Tiling, decode_latents, encode_pixels, tile_spans, tile_weights

SHAPE = (1, 4, 4, 4)
LARGE = 8.0  # times what the decoder is made to hold


@pytest.fixture(scope="module")
def brittle(tiny, tmp_path_factory):
    """A checkpoint whose decoder reaches 12,000 with usual latents, and eight times as much, which
    half precision does not hold, with larger ones.
    """
    model = shutil.copytree(tiny, tmp_path_factory.mktemp("brittle") / "model")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    decoder = load_component("vae_decoder", find_checkpoint(str(model)))
    with torch.no_grad(), track_largest_activation(decoder.decoder.conv_in) as peak:
        decoder(torch.from_numpy(randn(0, SHAPE)))
    for name in ("weight", "bias"):
        stored = weights[f"decoder.conv_in.{name}"]
        weights[f"decoder.conv_in.{name}"] = stored * np.float32(12e3 / peak[0])
    save_file(weights, path)
    return model


@pytest.fixture(scope="module")
def half(brittle, tmp_path_factory, build_once):
    folder = tmp_path_factory.mktemp("half") / "bundle"
    return build_once(str(brittle), folder, dtype="float16", sizes=((32, 32),))


def psnr(a, b):
    a, b = (np.clip(x, -1, 1).astype(np.float64) for x in (a, b))
    return 10 * np.log10(4.0 / max(np.mean((a - b) ** 2), 1e-12))


def test_the_image_that_overflows_is_decoded_again_alone(brittle, half, caplog):
    latents = np.concatenate([randn(0, SHAPE), LARGE * randn(0, SHAPE), randn(1, SHAPE)])
    reference = load_component("vae_decoder", find_checkpoint(str(brittle)))
    with torch.no_grad():
        expected = reference(torch.from_numpy(latents)).numpy()
    with sdrt.load(half, backend="torch") as pipe, caplog.at_level(logging.WARNING):
        assert pipe.manifest.components["vae_decoder"].dtype == "float16"
        small = pipe.engines["vae_decoder"]({"latents": latents[1:2]})["image"]
        assert not np.isfinite(small).all()  # or else this test shows nothing
        actual = pipe.decode_to_array(latents)
        again = [r for r in caplog.records if "again in float32" in r.message]
        assert len(again) == 1
        for i in range(3):
            assert psnr(actual[i], expected[i]) >= 40
        run = pipe(
            "a square", latents=latents[1:2] * 20, guidance_scale=1.0, num_inference_steps=1, seed=0
        )
        assert np.asarray(run.images[0]).std() > 0


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_backend_reads_the_float32_graph(brittle, half, backend):
    latents = LARGE * randn(0, SHAPE)
    with torch.no_grad():
        expected = load_component("vae_decoder", find_checkpoint(str(brittle)))(
            torch.from_numpy(latents)
        )
    with sdrt.load(half, backend=backend) as pipe:
        actual = pipe.engines["vae_decoder_float32"]({"latents": latents})["image"]
        assert psnr(actual, expected.numpy()) >= 40
    assert (half / "vae_decoder" / FLOAT32_GRAPH).stat().st_size < 200_000  # no second weights


def test_without_it_the_reason_is_given(half, tmp_path):
    bare = shutil.copytree(half, tmp_path / "bare")
    manifest = json.loads((bare / "sdrt.json").read_text())
    del manifest["files"][f"vae_decoder/{FLOAT32_GRAPH}"]
    (bare / "sdrt.json").write_text(json.dumps(manifest))
    (bare / "vae_decoder" / FLOAT32_GRAPH).unlink()
    with sdrt.load(bare, backend="torch") as pipe:
        with pytest.raises(SdrtError, match="the image holds NaN"):
            pipe.decode(LARGE * randn(0, SHAPE))
        with pytest.raises(SdrtError, match="latents hold NaN"):
            pipe.decode(np.full(SHAPE, np.nan, np.float32))


def test_a_single_precision_bundle_has_no_second_graph(tiny_bundle):
    assert not (tiny_bundle / "vae_decoder" / FLOAT32_GRAPH).exists()


@pytest.mark.parametrize("side", [5, 8, 9, 15, 16, 23, 64])
@pytest.mark.parametrize("tile", [4, 8])
def test_tiles_cover_a_side_and_their_weights_are_smooth(side, tile):
    spans = tile_spans(side, tile)
    assert spans[0].start == 0 and spans[-1].stop == side
    total = np.zeros(side * 8)
    for span in spans:
        assert span.stop - span.start == min(tile, side)
        weights = tile_weights(span, side, 8)
        assert (weights > 0).all()
        total[span.start * 8 : span.stop * 8] += weights
    assert (total > 0).all()
    for left, right in itertools.pairwise(spans):
        assert left.stop - right.start >= tile // 4


def test_what_has_no_neighbours_is_tiled_exactly():
    """Repeating every latent to a block, and back by means: tiles change nothing of that."""
    tiling, latents = Tiling([(8, 8)], 4), randn(0, (1, 3, 21, 13))

    def grow(tile):
        assert max(tile.shape[2:]) <= 8
        return tile.repeat(4, axis=2).repeat(4, axis=3)

    def shrink(tile):
        blocks = tile.reshape(1, 3, tile.shape[2] // 4, 4, tile.shape[3] // 4, 4)
        return blocks.mean(axis=(3, 5))

    source = latents.repeat(4, axis=2).repeat(4, axis=3)
    np.testing.assert_allclose(tiling.decode(grow, latents), source, atol=1e-6)
    np.testing.assert_allclose(tiling.encode(shrink, source), latents, atol=1e-6)


def collage(pipe, width, height):
    """A large image of things that the embedded model knows."""
    prompts = ["a red circle on a blue background", "a white cross on a green background"]
    images = pipe(prompts * 2, num_inference_steps=12, seed=0).images
    sheet = Image.new("RGB", (128, 128))
    for i, image in enumerate(images):
        sheet.paste(image, (i % 2 * 64, i // 2 * 64))
    sheet = sheet.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.roll(np.asarray(sheet, np.float32), 11, axis=(0, 1))  # edges next to the tiles'
    return pixels.transpose(2, 0, 1)[None] / 127.5 - 1.0


def test_seams_of_a_tiled_decode_are_not_seen(pipe):
    """A image twice the declared sides, encoded and decoded whole and in tiles."""
    source = collage(pipe, 128, 128)
    complete, tiled = Tiling([(16, 16)], 8), Tiling([(8, 8)], 8)
    mean, _ = encode_pixels(pipe.engines["vae_encoder"], complete, source)
    parts, _ = encode_pixels(pipe.engines["vae_encoder"], tiled, source)
    once = decode_latents(pipe.engines, complete, mean[None])
    again = decode_latents(pipe.engines, tiled, mean[None])
    assert np.sqrt(np.mean((parts - mean) ** 2)) <= 0.25 * mean.std()
    assert psnr(again, once) >= 30
    # What tiles add to the step from one column to the next: no more at their borders than inside.
    added = np.abs(np.diff(again, axis=3) - np.diff(once, axis=3)).mean(axis=(0, 1, 2))
    borders = {8 * s for span in tile_spans(16, 8) for s in (span.start, span.stop)} - {0, 128}
    at = [border - 1 for border in borders]
    assert added[at].max() <= np.delete(added, at).max()


def test_other_sizes_are_generated_with_a_warning(pipe, caplog):
    options = {"num_inference_steps": 2, "seed": 0, "size": "160x96"}
    out = pipe("a red circle on a blue background", **options)
    assert out.images[0].size == (160, 96)
    assert "160x96 is not one of the sizes that this bundle was validated at (64x64)" in caplog.text
    again = pipe("a red circle", image=out.images[0], strength=0.5, **options)
    assert again.images[0].size == (160, 96)
    with pytest.raises(sdrt.UsageError, match="multiples of"):
        pipe("a", size="72x64")
