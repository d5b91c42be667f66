"""The safety checker against diffusers' module with the same random weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

import sdrt
from sdrt.cli.main import main
from sdrt.engine import select_backend
from sdrt.errors import CheckpointError
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.runtime.safety_checker import (
    apply_safety_checker,
    clip_pixels,
    concept_scores,
    is_flagged,
)

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SIDE = 28
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": 7}


def sample_images():
    rng = np.random.default_rng(0)
    for i in range(12):
        smooth = Image.fromarray(rng.integers(0, 255, (3, 4, 3), np.uint8))
        yield smooth.resize((32 + 8 * (i % 3), 32 + 5 * (i % 2)), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def reference():
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    config = CLIPConfig(text_config={"hidden_size": 8}, vision_config=VISION, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    for parameter in checker.parameters():
        parameter.data.normal_(0, 0.3)
    with torch.no_grad():  # thresholds between what the images score, so that some are flagged
        every = torch.cat([torch.from_numpy(clip_pixels(p, SIDE)) for p in sample_images()])
        embeds = checker.visual_projection(checker.vision_model(every)[1])
        for name in ("concept", "special_care"):
            cosines = torch.nn.functional.cosine_similarity(
                embeds[:, None], getattr(checker, f"{name}_embeds")[None], dim=-1
            )
            weights = getattr(checker, f"{name}_embeds_weights")
            weights.copy_(cosines.quantile(0.97 if name == "concept" else 0.7, dim=0))
    return checker


@pytest.fixture(scope="module")
def bundle(reference, tiny, tmp_path_factory, build_once):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("safety") / "model")
    reference.save_pretrained(folder / "safety_checker")
    return build_once(str(folder), folder.parent / "bundle", safety_checker=True)


def test_an_image_is_read_as_clip_reads_it():
    theirs = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    for source in sample_images():
        expected = np.asarray(theirs(source, return_tensors="np").pixel_values)
        assert np.abs(clip_pixels(source, SIDE) - expected).max() <= 0.02


def test_scores_and_decisions_are_the_references(reference, bundle):
    from sdrt.bundle import open_bundle

    engine = select_backend("onnxruntime").load(open_bundle(bundle), "safety_checker")
    decided = []
    for source in sample_images():
        pixels = clip_pixels(source, SIDE)
        actual = engine({"pixels": pixels})
        own = concept_scores(actual["special"][0], actual["concepts"][0])
        scores = {}
        cached = round  # the reference keeps its scores to itself; they are what it rounds

        def noted(value, digits, cached=cached, scores=scores):
            scores[len(scores)] = cached(float(value), digits)
            return cached(value, digits)

        module = __import__(type(reference).__module__, fromlist=["round"])
        module.round = noted
        try:
            _, flags = reference(torch.from_numpy(pixels), [np.ones((2, 2, 3))])
        finally:
            del module.round
        assert np.abs(own - np.array(list(scores.values())[3:])).max() <= 0.0011
        assert is_flagged(apply_safety_checker(engine, [source])[0]) == flags[0]
        decided.append(flags[0])
    assert 0 < sum(decided) < len(decided)
    engine.close()


def test_flagged_images_are_black_and_reported(bundle, tmp_path, capsys):
    with sdrt.load(bundle, backend="onnxruntime") as pipe:
        out = pipe("a square", num_inference_steps=1, seed=0, num_images_per_prompt=8)
        assert len(out.flagged) == 8
        for image, flagged in zip(out.images, out.flagged, strict=True):
            assert flagged == (np.asarray(image).max() == 0)
    assert main(["inspect", "--bundle", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["safety_checker"] is True
    arguments = ["run", "a square", "--bundle", str(bundle), "--steps", "1", "--seed", "0"]
    assert main([*arguments, "--num-images", "8", "--json", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["flagged"] == out.flagged and report["safety_checker"] is True
    assert said.err.count("safety checker flagged") == sum(out.flagged)


def test_a_missing_safety_checker_is_reported(shapes, tiny, tmp_path, capsys):
    assert main(["inspect", "--bundle", str(shapes)]) == 0
    assert "safety checker off" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no safety_checker"):
        build_bundle(BuildPlan(str(tiny), tmp_path / "b", safety_checker=True))
