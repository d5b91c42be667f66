"""Control of SDXL against diffusers' own pipelines, on a tiny model of three stages."""

import pytest
from control_nets import tiny_adapter, tiny_controlnet_like
from diffusers_images import decibels, diffusers_image, left_half, load_parts, noise
from exports import built_control
from tiny_checkpoints import write_tiny_xl

import sdrt
from sdrt.cli.main import main

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.exports,
    pytest.mark.build,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SIDE = 64
STAGES = {
    "block_out_channels": [8, 16, 24],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 4],
}
LAYOUTS = {
    "xl-full": {},
    "xl-mid": {
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "transformer_layers_per_block": [0, 0, 1],
    },
    "xl-small": {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"},
}
KIND = "StableDiffusionXLControlNetPipeline"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, embedded):
    return write_tiny_xl(tmp_path_factory.mktemp("xl") / "model", embedded, **STAGES)


@pytest.fixture(scope="module")
def parts(checkpoint):
    return load_parts(checkpoint)


@pytest.fixture(scope="module")
def nets(parts, home):
    """diffusers' nets by the names of their bundles."""
    nets = {
        name: tiny_controlnet_like(parts["unet"], seed, **layout)
        for seed, (name, layout) in enumerate(LAYOUTS.items())
    }
    nets["xl-sketch"] = tiny_adapter((8, 16, 24, 24), kind="full_adapter_xl", factor=16)
    for name, net in nets.items():
        net.save_pretrained(home / "nets" / name)
        built_control(str(home / "nets" / name), name=name, sizes=((SIDE, SIDE),))
    yield nets
    for name in nets:
        main(["remove", name])


@pytest.fixture(scope="module")
def pipe(checkpoint, nets, build_once):
    bundle = build_once(str(checkpoint), checkpoint.with_name("bundle"), sizes=((SIDE, SIDE),))
    with sdrt.load(bundle, backend="onnxruntime", controlnet=list(nets)) as loaded:
        yield loaded


CASES = [
    ("xl-full", "EulerDiscreteScheduler", {}, 3),
    ("xl-full", "DPM++ 2M SDE", {"guess_mode": True, "guidance_scale": 4.0}, 11),
    ("xl-mid", "DDIMScheduler", {"controlnet_conditioning_scale": 0.6}, 11),
    ("xl-mid", "UniPCMultistepScheduler", {"control_guidance_end": 0.6}, 3),
    ("xl-small", "EulerAncestralDiscreteScheduler", {"control_guidance_start": 0.3}, 11),
    ("xl-small", "DDIMScheduler", {"guess_mode": True, "guidance_scale": 1.0}, 3),
]


@pytest.mark.parametrize(("name", "scheduler", "options", "seed"), CASES)
def test_every_layout_steers_as_in_diffusers(pipe, parts, nets, name, scheduler, options, seed):
    own, net = pipe.with_scheduler(scheduler), {"controlnet": nets[name]}
    guidance = {"guidance_scale": options.get("guidance_scale", 6.0)}
    options = {"controlnet_conditioning_scale": 1.0, **guidance, **options}
    image = noise(9, SIDE)
    reference = diffusers_image(KIND, parts, own, seed, nets=net, image=image, **options)
    plain = decibels(own, reference, seed, **guidance)
    options |= {"controlnet": name, "control_image": image}
    assert decibels(own, reference, seed, **options) >= 50 > plain


@pytest.mark.parametrize("guess_mode", [False, True])
def test_two_nets_of_different_layouts_are_summed(pipe, parts, nets, guess_mode):
    own, names = pipe.with_scheduler("EulerDiscreteScheduler"), ["xl-mid", "xl-small"]
    both = diffusers.MultiControlNetModel([nets[name] for name in names])
    options = {
        "controlnet_conditioning_scale": [0.7, 1.2],
        "control_guidance_start": [0.0, 0.4],
        "control_guidance_end": [0.5, 1.0],
        "guess_mode": guess_mode,
        "guidance_scale": 6.0,
    }
    images = [noise(9, SIDE), noise(8, SIDE)]
    nets = {"controlnet": both}
    reference = diffusers_image(KIND, parts, own, 4, nets=nets, image=images, **options)
    assert decibels(own, reference, 4, controlnet=names, control_image=images, **options) >= 50


EDITS = {
    "StableDiffusionXLControlNetImg2ImgPipeline": {"strength": 0.6},
    "StableDiffusionXLControlNetInpaintPipeline": {
        "strength": 0.7,
        "mask_image": left_half(SIDE),
        "control_guidance_end": 0.6,
    },
}


@pytest.mark.parametrize("kind", EDITS)
def test_control_of_an_edit(pipe, parts, nets, kind):
    own = pipe.with_scheduler("DDIMScheduler")
    options = {
        "image": noise(7, SIDE),
        "control_image": noise(9, SIDE),
        "controlnet_conditioning_scale": 0.9,
        "guidance_scale": 6.0,
        **EDITS[kind],
    }
    side = {"height": SIDE, "width": SIDE}
    net = {"controlnet": nets["xl-mid"]}
    reference = diffusers_image(kind, parts, own, 5, nets=net, **side, **options)
    assert decibels(own, reference, 5, controlnet="xl-mid", **options) >= 50


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDIMScheduler"])
def test_a_t2i_adapter_steers_as_in_diffusers(pipe, parts, nets, scheduler):
    own = pipe.with_scheduler(scheduler)
    factors = {"adapter_conditioning_scale": 0.8, "adapter_conditioning_factor": 0.5}
    options = {"guidance_scale": 6.0, **factors}
    reference = diffusers_image(
        *("StableDiffusionXLAdapterPipeline", parts, own, 6),
        nets={"adapter": nets["xl-sketch"]},
        image=noise(9, SIDE),
        height=SIDE,
        width=SIDE,
        **options,
    )
    plain = decibels(own, reference, 6, guidance_scale=6.0)
    options |= {"controlnet": "xl-sketch", "control_image": noise(9, SIDE)}
    assert decibels(own, reference, 6, **options) >= 50 > plain
