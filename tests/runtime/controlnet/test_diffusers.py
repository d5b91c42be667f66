"""Control against diffusers' own pipelines, on a tiny model of random weights."""

from dataclasses import replace

import numpy as np
import pytest
from control_nets import tiny_adapter, tiny_controlnet
from diffusers_images import (
    PROMPT,
    SIDE,
    STEPS,
    decibels,
    diffusers_image,
    left_half,
    load_parts,
    noise,
)
from exports import built_control
from tiny_checkpoints import write_tiny

import sdrt
from sdrt.cli.main import main
from sdrt.errors import UsageError
from sdrt.runtime.batching.engine import InflightBatcher

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.exports,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def parts(tiny):
    return load_parts(tiny)


@pytest.fixture(scope="module")
def nets(parts, home):
    """diffusers' nets by the names of their bundles."""
    nets = {
        "first": tiny_controlnet(parts["unet"], 1),
        "second": tiny_controlnet(parts["unet"], 2),
        "sketch": tiny_adapter((8, 16)),
    }
    for name, net in nets.items():
        net.save_pretrained(home / "nets" / name)
        built_control(str(home / "nets" / name), name=name, sizes=((SIDE, SIDE),))
    yield nets
    for name in nets:
        main(["remove", name])


@pytest.fixture(scope="module")
def pipe(tiny_bundle, nets):
    with sdrt.load(tiny_bundle, backend="onnxruntime", controlnet=list(nets)) as loaded:
        yield loaded


CASES = [
    ("DDIMScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {"controlnet_conditioning_scale": 0.6}),
    ("HeunDiscreteScheduler", {"control_guidance_start": 0.2, "control_guidance_end": 0.7}),
    ("DPMSolverMultistepScheduler", {"guess_mode": True, "guidance_scale": 4.0}),
    ("PNDMScheduler", {"guess_mode": True, "guidance_scale": 1.0}),
    ("UniPCMultistepScheduler", {"control_guidance_end": 0.6}),
    ("DPM++ 2M SDE", {"controlnet_conditioning_scale": 1.4}),
]


@pytest.mark.parametrize("seed", [3, 11])
@pytest.mark.parametrize(("scheduler", "options"), CASES)
def test_a_net_steers_as_in_diffusers(pipe, parts, nets, scheduler, options, seed):
    own, kind = pipe.with_scheduler(scheduler), "StableDiffusionControlNetPipeline"
    net = {"controlnet": nets["first"]}
    reference = diffusers_image(kind, parts, own, seed, nets=net, image=noise(9), **options)
    plain = decibels(own, reference, seed, guidance_scale=options.get("guidance_scale", 7.5))
    options = {"controlnet": "first", "control_image": noise(9), **options}
    assert decibels(own, reference, seed, **options) >= 50 > plain


def test_two_nets_at_once_are_summed(pipe, parts, nets):
    own, kind = pipe.with_scheduler("DDIMScheduler"), "StableDiffusionControlNetPipeline"
    both = diffusers.MultiControlNetModel([nets["first"], nets["second"]])
    scales = {
        "controlnet_conditioning_scale": [0.7, 1.2],
        "control_guidance_start": [0.0, 0.4],
        "control_guidance_end": [0.5, 1.0],
    }
    images = [noise(9), noise(8)]
    net = {"controlnet": both}
    reference = diffusers_image(kind, parts, own, 4, nets=net, image=images, **scales)
    options = {"controlnet": ["first", "second"], "control_image": images, **scales}
    assert decibels(own, reference, 4, **options) >= 50


def test_control_of_an_image_to_image_run(pipe, parts, nets):
    own, kind = pipe.with_scheduler("DDIMScheduler"), "StableDiffusionControlNetImg2ImgPipeline"
    own_noise = {"image": noise(7), "strength": 0.6}
    reference = diffusers_image(
        *(kind, parts, own, 5),
        nets={"controlnet": nets["first"]},
        control_image=noise(9),
        controlnet_conditioning_scale=1.0,
        **own_noise,
    )
    options = {"controlnet": "first", "control_image": noise(9), **own_noise}
    assert decibels(own, reference, 5, **options) >= 50


EDITS = [
    ("DDIMScheduler", {"strength": 1.0}),
    ("EulerAncestralDiscreteScheduler", {"strength": 0.7, "control_guidance_end": 0.5}),
    ("DPM++ 2M SDE", {"strength": 0.7, "guess_mode": True}),
]


@pytest.mark.parametrize(("scheduler", "options"), EDITS)
def test_control_of_inpainting(pipe, parts, nets, scheduler, options):
    own, kind = pipe.with_scheduler(scheduler), "StableDiffusionControlNetInpaintPipeline"
    options = {"image": noise(7), "mask_image": left_half(), "control_image": noise(9), **options}
    net = {"controlnet": nets["first"]}
    # diffusers' default is 0.5
    scale = {"controlnet_conditioning_scale": 1.0}
    reference = diffusers_image(kind, parts, own, 5, nets=net, **scale, **options)
    assert decibels(own, reference, 5, controlnet="first", **options) >= 50


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory, embedded, build_once):
    """(checkpoint, bundle) of a model that also reads a mask and what it leaves of an image."""
    folder = tmp_path_factory.mktemp("inpainting")
    model = write_tiny(folder / "model", embedded, in_channels=9)
    return model, build_once(str(model), folder / "bundle", sizes=((SIDE, SIDE),))


@pytest.mark.build
@pytest.mark.parametrize(("scheduler", "options"), EDITS)
def test_control_of_an_inpainting_model(inpainting, nets, scheduler, options):
    model, bundle = inpainting
    options = {"image": noise(7), "mask_image": left_half(), "control_image": noise(9), **options}
    with sdrt.load(bundle, backend="onnxruntime", controlnet="first") as pipe:
        own, kind = pipe.with_scheduler(scheduler), "StableDiffusionControlNetInpaintPipeline"
        reference = diffusers_image(
            *(kind, load_parts(model), own, 5),
            nets={"controlnet": nets["first"]},
            controlnet_conditioning_scale=1.0,
            **options,
        )
        plain = {name: options[name] for name in ("image", "mask_image", "strength")}
        assert decibels(own, reference, 5, **options) >= 50 > decibels(own, reference, 5, **plain)


def test_a_t2i_adapter_steers_as_in_diffusers(pipe, parts, nets):
    own, kind = pipe.with_scheduler("DDIMScheduler"), "StableDiffusionAdapterPipeline"
    factors = {"adapter_conditioning_scale": 0.8}
    reference = diffusers_image(
        *(kind, parts, own, 6),
        nets={"adapter": nets["sketch"]},
        image=noise(9),
        height=SIDE,
        width=SIDE,
        **factors,
    )
    options = {"controlnet": "sketch", "control_image": noise(9), **factors}
    assert decibels(own, reference, 6, **options) >= 50


@pytest.mark.build
def test_half_precision_is_close_to_diffusers(tiny, parts, nets, home, tmp_path, build_once):
    options = {"sizes": ((SIDE, SIDE),), "dtype": "float16"}
    bundle = build_once(str(tiny), tmp_path / "model", **options)
    net = built_control(str(home / "nets" / "first"), tmp_path / "half", name="half", **options)
    with sdrt.load(bundle, backend="onnxruntime", controlnet=str(net)) as pipe:
        own, kind = pipe.with_scheduler("DDIMScheduler"), "StableDiffusionControlNetPipeline"
        arguments = {"nets": {"controlnet": nets["first"]}, "image": noise(9)}
        reference = diffusers_image(kind, parts, own, 3, **arguments)
        assert (
            decibels(own, reference, 3, control_image=noise(9)) >= 35 > decibels(own, reference, 3)
        )


REQUESTS = [
    {"controlnet": "first", "control_image": 9, "seed": 1},
    {"seed": 2},
    {"controlnet": "second", "control_image": 8, "seed": 3, "control_guidance_end": 0.5},
    {"controlnet": ["first", "second"], "control_image": [9, 8], "seed": 4, "guess_mode": True},
    {
        "controlnet": ["sketch", "first"],
        "control_image": [9, 8],
        "seed": 5,
        "controlnet_conditioning_scale": [0.3, 1.1],
        "control_guidance_start": 0.3,
    },
    {"seed": 6, "guidance_scale": 1.0},
    {"controlnet": "first", "control_image": 9, "seed": 7, "guidance_scale": 1.0},
]


def with_images(request):
    """The request with images in place of their numbers."""
    images = request.get("control_image")
    if images is None:
        return {"num_inference_steps": STEPS, **request}
    several = [noise(i) for i in images] if isinstance(images, list) else noise(images)
    return {"num_inference_steps": STEPS, **request, "control_image": several}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_images_in_flight_share_calls_and_keep_their_bytes(tiny_bundle, nets, backend):
    requests = [with_images(request) for request in REQUESTS]
    with sdrt.load(tiny_bundle, backend=backend, controlnet=list(nets)) as pipe:
        plain = np.asarray(pipe(PROMPT, **requests[1]).images[0])
        counted = CountedEngine(pipe.engines["unet_control"])
        pipe = replace(pipe, engines={**pipe.engines, "unet_control": counted})
        with InflightBatcher(pipe, rows=16, deterministic=backend != "onnxruntime") as batcher:

            def run(*requests):
                handles = [h for r in requests for h in batcher.submit(PROMPT, r)]
                return [np.asarray(handle.future.result(60).image) for handle in handles]

            alone = [run(request)[0] for request in requests]
            together = run(*requests)
        assert max(counted.rows) > 2
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one, other)
        if backend == "onnxruntime":
            assert np.array_equal(alone[1], plain)


class CountedEngine:
    """An engine that stores the rows of its calls."""

    def __init__(self, engine):
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.rows = []

    def __call__(self, feeds):
        self.rows.append(len(feeds["sample"]))
        return self.engine(feeds)


BAD = {
    "no image": ({"controlnet": "first"}, "control_image"),
    "no such net": ({"controlnet": "third", "control_image": 9}, "third"),
    "more scales than nets": (
        {"controlnet": "first", "control_image": 9, "controlnet_conditioning_scale": [1, 2]},
        "controlnet_conditioning_scale",
    ),
    "an empty interval": (
        {
            "controlnet": "first",
            "control_image": 9,
            "control_guidance_start": 0.5,
            "control_guidance_end": 0.5,
        },
        "control_guidance",
    ),
    "beyond the run": (
        {"controlnet": "first", "control_image": 9, "control_guidance_end": 1.5},
        "control_guidance_end",
    ),
    "reuse": ({"controlnet": "first", "control_image": 9, "feature_reuse": 2}, "reuse"),
    "hires": ({"controlnet": "first", "control_image": 9, "hires_scale": 2.0}, "hires"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_control_is_refused_by_name(pipe, bad):
    request, words = BAD[bad]
    with pytest.raises(UsageError, match=words):
        pipe(PROMPT, **with_images(request))


def test_a_net_of_another_family_is_refused_at_load(tiny_xl_bundle, nets):
    with pytest.raises(UsageError, match="first"):
        sdrt.load(tiny_xl_bundle, backend="onnxruntime", controlnet="first")
