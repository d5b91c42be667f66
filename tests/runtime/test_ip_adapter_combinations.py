"""Images as prompts next to ControlNets, input images, second passes, long prompts and XL."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from control_nets import tiny_controlnet
from exports import built_control, built_ip_adapter
from ip_adapters import load_pipeline, photo, write_ip_adapter
from PIL import Image
from safetensors.torch import load_file

import sdrt
from sdrt.cli.main import main
from sdrt.runtime import GenerationOptions

pytestmark = [
    pytest.mark.reference,
    pytest.mark.exports,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PROMPT = "a red circle on a blue background"
LONG = ", ".join([PROMPT] * 6)
STEPS, SIDE, SCALE = 5, 32, 0.8
IMAGE_PROMPT = {"ip_adapter_image": photo(), "ip_adapter_scale": SCALE}


def load_vae(folder):
    vae = diffusers.AutoencoderKL.from_config(
        {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        | diffusers.AutoencoderKL.load_config(folder)
    )
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae.eval()


def load_unet(checkpoint):
    return diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()


def load_tokenizer(folder, pad="<|endoftext|>"):
    return transformers.CLIPTokenizer.from_pretrained(
        str(folder), pad_token=pad, model_max_length=32
    )


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """The tiny model's adapter, ControlNet and networks."""
    folder = tmp_path_factory.mktemp("adapter")
    adapter = write_ip_adapter(folder, "base", load_unet(tiny))
    net = tiny_controlnet(load_unet(tiny), 1)
    net.save_pretrained(folder / "net")
    built_control(str(folder / "net"), name="net", sizes=((SIDE, SIDE),))
    yield SimpleNamespace(
        adapter=adapter,
        bundle=built_ip_adapter(*adapter, folder / "bundle"),
        net=net,
        parts={
            "vae": load_vae(tiny / "vae"),
            "text_encoder": transformers.CLIPTextModel.from_pretrained(tiny / "text_encoder"),
            "tokenizer": load_tokenizer(tiny / "tokenizer"),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        },
    )
    main(["remove", "net"])


@pytest.fixture(scope="module")
def own(tiny_bundle, first):
    with sdrt.load(
        tiny_bundle, backend="onnxruntime", ip_adapter=first.bundle, controlnet="net"
    ) as pipe:
        yield pipe.with_scheduler("DDIMScheduler")


@pytest.fixture
def reference(tiny, first, own):
    """A function that runs one of diffusers' pipelines with the adapter."""

    def run(kind, prompt=PROMPT, **arguments):
        nets = {"controlnet": first.net} if "ControlNet" in kind else {}
        theirs = load_pipeline(
            *(kind, own, first.adapter, SCALE), **first.parts, **nets, unet=load_unet(tiny)
        )
        generator = torch.Generator("cpu").manual_seed(3)
        shared = {"num_inference_steps": STEPS, "output_type": "np", "generator": generator}
        return theirs(prompt, ip_adapter_image=photo(), **shared, **arguments).images[0]

    return run


def noise(seed):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8))


def mask():
    light = np.zeros((SIDE, SIDE), np.uint8)
    light[8:24, 0:16] = 255
    return Image.fromarray(light)


def psnr(actual, expected):
    error = np.mean((np.asarray(actual, np.float64) - np.asarray(expected, np.float64)) ** 2)
    return 10 * np.log10(1.0 / max(error, 1e-12))


def decibels(pipe, expected, prompt=PROMPT, **options):
    *_, last = pipe.steps(prompt, num_inference_steps=STEPS, seed=3, **options)
    pixels = pipe.decode_to_array(last.latents)[0].transpose(1, 2, 0)
    return psnr(np.clip(pixels * 0.5 + 0.5, 0, 1), expected)


CONTROL = {"controlnet": "net", "control_image": noise(9), "controlnet_conditioning_scale": 0.7}
CONTROL_OF_DIFFUSERS = {"image": noise(9), "controlnet_conditioning_scale": 0.7}
EDIT = {"image": noise(7), "strength": 0.6}
MASKED = {"image": noise(7), "mask_image": mask(), "strength": 0.8}
CASES = {
    "ControlNet": ("StableDiffusionControlNetPipeline", CONTROL_OF_DIFFUSERS, CONTROL),
    "guess mode": (
        "StableDiffusionControlNetPipeline",
        CONTROL_OF_DIFFUSERS | {"guess_mode": True},
        CONTROL | {"guess_mode": True},
    ),
    "image to image": ("StableDiffusionImg2ImgPipeline", EDIT, EDIT),
    "mask": (
        "StableDiffusionInpaintPipeline",
        MASKED | {"height": SIDE, "width": SIDE},
        MASKED,
    ),
    "ControlNet and mask": (
        "StableDiffusionControlNetInpaintPipeline",
        MASKED | {"control_image": noise(9), "controlnet_conditioning_scale": 0.7},
        MASKED | CONTROL,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_image_prompt_and_another_input_combine_as_in_diffusers(own, reference, case):
    kind, theirs, options = CASES[case]
    expected = reference(kind, **theirs)
    plain = decibels(own, expected, **options)
    assert decibels(own, expected, **options, **IMAGE_PROMPT) >= 50 > plain


def test_a_prompt_of_several_chunks(own, reference):
    job = own.create_job(LONG, GenerationOptions())
    timelines = [job.get_timeline(request) for request in job.requests]
    (schedule,) = own.encode_conditioning(job.requests, timelines, job.options, job.size)
    negative, positive = torch.from_numpy(schedule.inputs["context"]).split(1)
    assert positive.shape[1] >= 2 * 32
    expected = reference(
        "StableDiffusionPipeline",
        None,
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        height=SIDE,
        width=SIDE,
    )
    assert decibels(own, expected, LONG, **IMAGE_PROMPT) >= 50 > decibels(own, expected, LONG)


def test_both_passes_at_two_sizes_read_the_image_prompt(tiny, first, own):
    """Against diffusers' UNet and scheduler, in a loop from the enlarged latents."""
    options = {"num_inference_steps": STEPS, "seed": 3, "output_type": "latent", **IMAGE_PROMPT}
    start = torch.from_numpy(own(PROMPT, **options).images)
    actual = own(PROMPT, **options, hires_scale=1.5, hires_strength=1.0).images
    shape = actual.shape[2:]
    start = torch.nn.functional.interpolate(start, size=shape, mode="bilinear")
    kind, unet = "StableDiffusionPipeline", load_unet(tiny)
    theirs = load_pipeline(kind, own, first.adapter, SCALE, **first.parts, unet=unet)
    context = torch.cat(theirs.encode_prompt(PROMPT, "cpu", 1, True)[::-1])
    embeds = theirs.prepare_ip_adapter_image_embeds([photo()], None, "cpu", 1, True)
    grid = int(STEPS / 0.999)
    theirs.scheduler.set_timesteps(grid)
    noisy = torch.randn(start.shape, generator=torch.Generator("cpu").manual_seed(3))
    latents = theirs.scheduler.add_noise(start, noisy, theirs.scheduler.timesteps[:1])
    for timestep in theirs.scheduler.timesteps:
        with torch.no_grad():
            output = theirs.unet(
                latents.repeat(2, 1, 1, 1),
                timestep,
                context,
                added_cond_kwargs={"image_embeds": embeds},
            ).sample
        unguided, guided = output.chunk(2)
        output = unguided + 7.5 * (guided - unguided)
        latents = theirs.scheduler.step(output, timestep, latents).prev_sample
    images = [own.decode_to_array(np.asarray(of)) * 0.5 + 0.5 for of in (actual, latents)]
    assert psnr(*images) >= 50


def test_low_memory_and_a_batch_have_the_bytes_of_images_alone(tiny_bundle, first, own):
    options = {"num_inference_steps": STEPS, **IMAGE_PROMPT}
    plain = sdrt.load(tiny_bundle, backend="onnxruntime", ip_adapter=first.bundle)
    low = sdrt.load(tiny_bundle, backend="onnxruntime", ip_adapter=first.bundle, low_memory=True)
    with plain, low:
        alone = [plain(PROMPT, seed=seed, **options).images[0] for seed in (1, 2)]
        several = plain(PROMPT, seed=1, num_images_per_prompt=2, **options).images
        stepped = low(PROMPT, seed=1, num_images_per_prompt=2, **options).images
    for one, *others in zip(alone, several, stepped, strict=True):
        assert all(one.tobytes() == other.tobytes() for other in others)


@pytest.mark.parametrize("kind", ["plus", pytest.param("base", marks=pytest.mark.build)])
def test_an_adapter_of_xl(tiny_xl, tiny_xl_bundle, tmp_path, kind):
    clip = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    parts = {
        name: getattr(transformers, model).from_pretrained(tiny_xl / name).eval()
        for name, model in clip.items()
    }
    parts |= {
        "tokenizer": load_tokenizer(tiny_xl / "tokenizer"),
        "tokenizer_2": load_tokenizer(tiny_xl / "tokenizer_2", "!"),
        "vae": diffusers.AutoencoderKL.from_pretrained(tiny_xl / "vae").eval(),
        "unet": load_unet(tiny_xl),
        "add_watermarker": False,
    }
    adapter = write_ip_adapter(tmp_path, kind, load_unet(tiny_xl))
    bundle = built_ip_adapter(*adapter, tmp_path / "bundle")
    with sdrt.load(tiny_xl_bundle, backend="onnxruntime", ip_adapter=bundle) as loaded:
        own = loaded.with_scheduler("EulerDiscreteScheduler")
        theirs = load_pipeline("StableDiffusionXLPipeline", own, adapter, SCALE, **parts)
        expected = theirs(
            PROMPT,
            ip_adapter_image=photo(),
            guidance_scale=7.5,
            num_inference_steps=STEPS,
            generator=torch.Generator("cpu").manual_seed(3),
            output_type="np",
        ).images[0]
        assert decibels(own, expected, **IMAGE_PROMPT) >= 50 > decibels(own, expected)
