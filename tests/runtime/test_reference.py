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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_the_same_arguments_match_diffusers(reference, pipe, name):
    import diffusers
    import torch

    reference.scheduler = getattr(diffusers, name).from_config(pipe.scheduler_config)
    own = pipe.with_scheduler(name)

    def arguments(output_type):
        return {
            "height": 64,
            "width": 64,
            "num_inference_steps": 6,
            "guidance_scale": 5.0,
            "negative_prompt": "a white cross",
            "eta": 0.4 if name == "DDIMScheduler" else 0.0,
            "generator": torch.Generator().manual_seed(7),
            "output_type": output_type,
            "callback_on_step_end_tensor_inputs": ["latents"],
        }

    expected = reference(PROMPTS[0], **arguments("np")).images
    actual = own(PROMPTS[0], **arguments("np")).images
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert 10 * np.log10(1.0 / max(np.mean((actual - expected) ** 2), 1e-12)) >= 50
    expected = reference(PROMPTS[0], **arguments("latent")).images.numpy()
    actual = own(PROMPTS[0], **arguments("latent")).images
    assert actual.shape == expected.shape and np.abs(actual - expected).max() < 0.01
    images, flagged = own(PROMPTS[0], **arguments("pil"), return_dict=False)
    expected, expected_flagged = reference(PROMPTS[0], **arguments("pil"), return_dict=False)
    difference = np.asarray(images[0], int) - np.asarray(expected[0], int)
    assert np.abs(difference).max() <= 1 and flagged == expected_flagged
