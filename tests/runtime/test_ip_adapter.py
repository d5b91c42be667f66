"""Images as prompts against diffusers' own pipelines, on tiny models of random weights."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from exports import built_ip_adapter
from ip_adapters import load_pipeline, photo, write_ip_adapter
from safetensors.torch import load_file

import sdrt
from sdrt.cli.main import main
from sdrt.errors import UsageError
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.denoising import BatchBuilder

pytestmark = [
    pytest.mark.reference,
    pytest.mark.exports,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PROMPT = "a red circle on a blue background"
STEPS, SIDE = 5, 32
KINDS = ["base", pytest.param("plus", marks=pytest.mark.build)]


@pytest.fixture(scope="module")
def parts(tiny):
    vae = diffusers.AutoencoderKL.from_config(
        {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        | diffusers.AutoencoderKL.load_config(tiny / "vae")
    )
    vae.load_state_dict(load_file(tiny / "vae" / "diffusion_pytorch_model.safetensors"))
    return {
        "vae": vae.eval(),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(tiny / "text_encoder").eval(),
        "tokenizer": transformers.CLIPTokenizer.from_pretrained(
            str(tiny / "tokenizer"), pad_token="<|endoftext|>", model_max_length=32
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture(scope="module", params=KINDS)
def adapter(request, tiny, tmp_path_factory):
    """(file, image encoder, bundle) of an adapter for the tiny model."""
    folder = tmp_path_factory.mktemp(request.param)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet")
    file, encoder = write_ip_adapter(folder, request.param, unet)
    return file, encoder, built_ip_adapter(file, encoder, folder / "bundle")


@pytest.fixture(scope="module")
def pipe(tiny_bundle, adapter):
    with sdrt.load(tiny_bundle, backend="onnxruntime", ip_adapter=adapter[2]) as loaded:
        yield loaded


def reference(parts, tiny, adapter, own, scale, **arguments):
    """diffusers' image, [H, W, 3] in [0, 1]."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny / "unet").eval()
    kind = "StableDiffusionPipeline"
    theirs = load_pipeline(kind, own, adapter[:2], scale, **parts, unet=unet)
    generator = torch.Generator("cpu").manual_seed(3)
    return theirs(
        PROMPT,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="np",
        height=SIDE,
        width=SIDE,
        **arguments,
    ).images[0]


def decibels(own, expected, **options):
    *_, last = own.steps(PROMPT, num_inference_steps=STEPS, seed=3, **options)
    actual = np.clip(own.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)
    return 10 * np.log10(1.0 / max(np.mean((actual.astype(np.float64) - expected) ** 2), 1e-12))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_an_image_prompts_as_in_diffusers(pipe, parts, tiny, adapter, scheduler, guidance_scale):
    own = pipe.with_scheduler(scheduler)
    expected = reference(
        *(parts, tiny, adapter, own, 0.7), ip_adapter_image=photo(), guidance_scale=guidance_scale
    )
    options = {"guidance_scale": guidance_scale}
    plain = decibels(own, expected, **options)
    options |= {"ip_adapter_image": photo(), "ip_adapter_scale": 0.7}
    assert decibels(own, expected, **options) >= 50 > plain


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_other_backends_prompt_as_diffusers_does(tiny_bundle, parts, tiny, adapter, backend):
    options = {"backend": backend, "precision": "exact", "ip_adapter": adapter[2]}
    with sdrt.load(tiny_bundle, **options) as loaded:
        own = loaded.with_scheduler("DDIMScheduler")
        expected = reference(parts, tiny, adapter, own, 0.7, ip_adapter_image=photo())
        options = {"ip_adapter_image": photo(), "ip_adapter_scale": 0.7}
        assert decibels(own, expected, **options) >= 50


def test_the_tokens_of_several_images_follow_each_other(pipe, parts, tiny, adapter):
    own, images = pipe.with_scheduler("DDIMScheduler"), [photo(1), photo(2)]
    expected = reference(*(parts, tiny, adapter, own, 1.0), ip_adapter_image=[images])
    assert decibels(own, expected, ip_adapter_image=images) >= 50


def test_off_has_the_bytes_of_a_pipeline_without(pipe, tiny_bundle):
    options = {"num_inference_steps": STEPS, "seed": 1}
    with sdrt.load(tiny_bundle, backend="onnxruntime") as plain:
        expected = plain(PROMPT, **options).images[0]
    assert pipe(PROMPT, **options).images[0].tobytes() == expected.tobytes()
    off = pipe(PROMPT, ip_adapter_image=photo(), ip_adapter_scale=0.0, **options)
    assert off.images[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_images_in_flight_have_the_bytes_of_images_alone(tiny_bundle, adapter, backend):
    requests = [
        {"seed": 1, "ip_adapter_image": photo(1)},
        {"seed": 2},
        {"seed": 3, "ip_adapter_image": photo(2), "ip_adapter_scale": 0.3},
        {"seed": 4, "ip_adapter_image": [photo(1), photo(2)], "guidance_scale": 1.0},
    ]
    with (
        sdrt.load(tiny_bundle, backend=backend, ip_adapter=adapter[2]) as pipe,
        InflightBatcher(pipe, rows=8, deterministic=backend != "onnxruntime") as batcher,
    ):

        def run(*requests):
            handles = [
                handle
                for request in requests
                for handle in batcher.submit(PROMPT, {"num_inference_steps": STEPS, **request})
            ]
            return [np.asarray(handle.future.result(60).image) for handle in handles]

        alone = [run(request)[0] for request in requests]
        for one, other in zip(alone, run(*requests), strict=True):
            assert np.array_equal(one, other)


def prepared_state(pipe, options):
    job = pipe.create_job(PROMPT, parse_options({"num_inference_steps": STEPS, **options}))
    ((_, state, _),) = pipe.prepare_states(job)
    return state


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_rows_with_and_without_image_prompts_share_a_call(tiny_bundle, adapter, backend):
    requests = [
        {"seed": 1},
        {"seed": 2, "ip_adapter_image": photo(1)},
        {"seed": 3, "guidance_scale": 1.0},
    ]
    with sdrt.load(tiny_bundle, backend=backend, ip_adapter=adapter[2]) as pipe:
        scales = np.linspace(0.0, 1.0, pipe.ip_adapter.layers).tolist()
        requests.append({"seed": 4, "ip_adapter_image": photo(2), "ip_adapter_scale": scales})

        def run(requests):
            states = [prepared_state(pipe, request) for request in requests]
            keys = {state.conditioning.shapes for state in states}
            assert len(keys) == 1  # what the batcher groups by
            builder = BatchBuilder(8)  # results of some backends depend on the rows of a call
            for _ in range(STEPS):
                builder.evaluate(pipe.engines, states)
            return [state.latents for state in states]

        alone = [run([request])[0] for request in requests]
        for one, other in zip(alone, run(requests), strict=True):
            assert one.tobytes() == other.tobytes()


def test_bad_image_prompts_are_refused(pipe, tiny_bundle, tiny_xl_bundle, adapter):
    with pytest.raises(UsageError, match="ip_adapter_scale"):
        pipe(PROMPT, ip_adapter_image=photo(), ip_adapter_scale=[0.1, 0.2])
    with pytest.raises(UsageError, match="feature_reuse"):
        pipe(PROMPT, ip_adapter_image=photo(), feature_reuse=2)
    without = replace(pipe, ip_adapter=None)
    with pytest.raises(UsageError, match="without an IP-Adapter"):
        without(PROMPT, ip_adapter_image=photo())
    with pytest.raises(UsageError, match="keys and values"):
        sdrt.load(tiny_xl_bundle, backend="onnxruntime", ip_adapter=adapter[2])


def test_the_bundle_of_an_adapter_is_verified_without_a_model(adapter, capsys):
    assert main(["verify", "--bundle", str(adapter[2]), "-q"]) == 0
    printed = capsys.readouterr().out
    assert "image_encoder, float32" in printed and "ip_adapter, float32" in printed
    assert "full pipeline" not in printed
