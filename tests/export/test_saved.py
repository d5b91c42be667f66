"""Pipelines saved by the installed diffusers and transformers, nothing added: each builds, and
draws the reference pipeline's image.
"""

import pytest
from saved import FAMILIES, NEGATIVE, PROMPT, generate_image, psnr, saved

import sdrt

pytestmark = [pytest.mark.build, pytest.mark.reference]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, embedded, tmp_path_factory, build_once):
    folder = tmp_path_factory.mktemp("saved")
    reference = saved(embedded, folder / "model", request.param)
    assert not list((folder / "model").glob("tokenizer*/vocab.json"))
    with sdrt.load(
        build_once(str(folder / "model"), folder / "bundle"), backend="onnxruntime"
    ) as pipe:
        yield pipe, reference


@pytest.mark.parametrize("seed", [0, 1])
def test_an_image_is_the_references(both, seed):
    pipe, reference = both
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
    actual = pipe(PROMPT, seed=seed, **options).images[0]
    assert psnr(actual, generate_image(reference, seed, **options)) >= 50.0
    # This says something only where another prompt and another guidance draw another image.
    assert psnr(actual, pipe("two", seed=seed, **options).images[0]) < 45.0
    less = pipe(PROMPT, seed=seed, **{**options, "guidance_scale": 1.5}).images[0]
    assert psnr(actual, less) < 45.0
