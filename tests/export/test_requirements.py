"""What a build says that it needs, and that it is refused where the memory is not there."""

import shutil

import pytest

from sdrt.errors import SdrtError
from sdrt.export import requirements
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import find_checkpoint
from sdrt.export.requirements import (
    BASE_BYTES,
    PartWeights,
    count_weights,
    estimate_requirements,
    format_duration,
)

SD15 = {
    "text_encoder": PartWeights(123_000_000, 246_000_000),
    "unet": PartWeights(860_000_000, 1_720_000_000),
    "vae": PartWeights(84_000_000, 168_000_000),
}
XL = {**SD15, "text_encoder_2": PartWeights(695_000_000, 1_390_000_000)}
XL = {**XL, "unet": PartWeights(2_567_000_000, 5_135_000_000)}
RATE = 1e11


def needs(weights, side, dtype="float16"):
    return estimate_requirements(weights, ((side, side),), dtype, RATE)


def test_weights_are_counted_from_the_headers(tiny):
    counts = count_weights(find_checkpoint(str(tiny)))
    assert set(counts) == {"text_encoder", "unet", "vae"}
    size = (tiny / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 0 < size - counts["unet"].stored_bytes < 100_000


def test_needs_grow_with_images_models_and_conversions():
    assert needs(SD15, 512).memory_bytes < needs(SD15, 1024).memory_bytes
    assert needs(SD15, 512).seconds < needs(SD15, 1024).seconds < needs(XL, 1024).seconds
    assert needs(XL, 256).memory_bytes < 5e9  # its weights stay in the mapped file
    converted = needs(XL, 256, "float32").memory_bytes
    assert converted >= 4 * XL["unet"].parameters + BASE_BYTES


def test_a_build_without_enough_memory_is_refused_before_it_begins(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(requirements, "available_bytes", lambda: BASE_BYTES // 2)
    with pytest.raises(SdrtError, match=r"about 0\.8 GB of memory and 0\.4 GB are free") as error:
        build_bundle(BuildPlan(str(shutil.copytree(tiny, tmp_path / "m")), tmp_path / "out" / "b"))
    assert error.value.hint and "--size" in error.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "10 seconds"), (44, "40 seconds"), (150, "2 minutes")]
)
def test_durations_are_rough(seconds, text):
    assert format_duration(seconds) == text
