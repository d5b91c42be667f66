"""Whole images against diffusers' StableDiffusionPipeline, from the same folder and seeds."""

import numpy as np
import pytest

from sdrt.runtime.samplers.registry import SAMPLERS

pytestmark = [
    pytest.mark.integration,
    pytest.mark.reference,
]
PROMPTS = (
    "a red circle on a blue background",
    "a small white cross at the top on a purple background",
    "an orange triangle above a black square on a green background",
)
STEPS = 12


@pytest.fixture(scope="module")
def reference(embedded):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(embedded)
    pipe.to(dtype=__import__("torch").float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.sample(5)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "seeds", [(0,), pytest.param((1, 2), marks=pytest.mark.slow)], ids=["a seed", "more seeds"]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_images_match_diffusers(reference, pipe, name, seeds):
    import diffusers
    import torch

    if name == "DPMSolverSDEScheduler":
        pytest.skip("the reference draws its path of noise from torchsde, by seeds of its own")
    scheduler = getattr(diffusers, name)
    eta = {"eta": 0.3} if name == "TCDScheduler" else {}  # the pipeline's own is 0
    reference.scheduler = scheduler.from_config(pipe.scheduler_config)
    own = pipe.with_scheduler(name)
    for prompt in PROMPTS:
        for seed in seeds:
            expected = reference(
                prompt,
                num_inference_steps=STEPS,
                guidance_scale=7.5,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np",
                **eta,
            ).images[0]
            *_, last = own.steps(prompt, num_inference_steps=STEPS, guidance_scale=7.5, seed=seed)
            actual = own.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5
            error = np.mean((np.clip(actual, 0, 1).astype(np.float64) - expected) ** 2)
            assert 10 * np.log10(1.0 / max(error, 1e-12)) >= 50, (prompt, seed)
