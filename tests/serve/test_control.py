"""ControlNets over HTTP, with `outline`, the ControlNet of the embedded model."""

import argparse
import base64
import json
from io import BytesIO

import numpy as np
import pytest
import webuiapi
from PIL import Image, ImageDraw
from serving import PROMPT, client, run_server

import sdrt
from sdrt.cli.arguments import add_serve, sources_from_arguments
from sdrt.errors import UsageError

pytestmark = pytest.mark.integration
STEPS, SEED = 4, 3
BOX = (32, 0, 96, 64)  # the middle of a wide image


@pytest.fixture(scope="module")
def edges():
    """A circle's outline."""
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((6, 6, 38, 38), outline="white")
    return image


@pytest.fixture(scope="module")
def pipe(shapes):
    with sdrt.load(shapes, backend="onnxruntime", controlnet="outline") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(shapes):
    with run_server(shapes, controlnet="outline") as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with client(server) as opened:
        yield opened


def encode(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decode(text):
    return Image.open(BytesIO(base64.b64decode(text)))


def draw(pipe, guidance_scale=7.5, **options):
    """The image of a call in Python."""
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, **options}
    return np.asarray(pipe(PROMPT, seed=SEED, **options).images[0])


def generate(http, **fields):
    body = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": SEED, **fields}
    response = http.post("/v1/images/generations", json=body)
    assert response.status_code == 200, response.text
    return np.asarray(decode(response.json()["data"][0]["b64_json"]))


def txt2img(http, unit, **fields):
    scripts = {"controlnet": {"args": [unit]}}
    body = {"prompt": PROMPT, "steps": STEPS, "seed": SEED, "cfg_scale": 7.5, **fields}
    return http.post("/sdapi/v1/txt2img", json={**body, "alwayson_scripts": scripts})


def first_image(response):
    assert response.status_code == 200, response.text
    return np.asarray(decode(response.json()["images"][0]))


def test_openai_requests_give_the_image_of_a_call(http, pipe, edges):
    control = {"controlnet": "outline", "controlnet_conditioning_scale": 0.8}
    part = {"control_guidance_start": 0.0, "control_guidance_end": 0.7}
    image = generate(http, control_image=encode(edges), **control, **part)
    assert np.array_equal(image, draw(pipe, control_image=edges, **control, **part))
    assert not np.array_equal(image, draw(pipe))
    assert np.array_equal(generate(http), draw(pipe))


def test_edits_take_control_images_as_files_and_text(http, pipe, edges):
    start = Image.new("RGB", (64, 64), "blue")
    form = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": SEED, "strength": 0.9}
    expected = draw(pipe, image=start, strength=0.9, control_image=edges, guess_mode=True)
    files = {
        "image": BytesIO(base64.b64decode(encode(start))),
        "control_image": BytesIO(base64.b64decode(encode(edges))),
    }
    as_file = http.post("/v1/images/edits", data={**form, "guess_mode": "true"}, files=files)
    assert as_file.status_code == 200, as_file.text
    assert np.array_equal(decode(as_file.json()["data"][0]["b64_json"]), expected)
    files = {"image": BytesIO(base64.b64decode(encode(start)))}
    fields = {**form, "guess_mode": "true", "control_image": encode(edges)}
    as_text = http.post("/v1/images/edits", data=fields, files=files)
    assert as_text.json()["data"][0]["b64_json"] == as_file.json()["data"][0]["b64_json"]


def test_guidance_options_are_those_of_a_call(http, pipe):
    options = {"guidance_rescale": 0.7, "guidance_interval": [0.0, 0.5], "clip_skip": 1}
    assert np.array_equal(generate(http, **options), draw(pipe, **options))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"controlnet": "canny"}, "control_image"),
        ({"controlnet_conditioning_scale": 0.5}, "control_image"),
        ({"control_image": "x"}, "image"),
        ({"control_image": "/etc/passwd"}, "image"),
        ({"control_image": ["$", "$"]}, "2 control images"),
        ({"control_image": "$", "controlnet": "canny"}, "canny"),
        ({"control_image": "$", "control_guidance_start": 0.9, "control_guidance_end": 0.1}, "0.9"),
        ({"ip_adapter_image": "$"}, "IP-Adapter"),
        ({"guidance_interval": [0.5]}, "guidance_interval"),
    ],
)
def test_requests_that_cannot_be_steered_are_rejected(http, edges, fields, word):
    text = json.dumps({"prompt": PROMPT, **fields}).replace("$", encode(edges))
    headers = {"content-type": "application/json"}
    response = http.post("/v1/images/generations", content=text, headers=headers)
    assert response.status_code == 400
    assert word in response.json()["error"]["message"]


def test_models_name_their_nets(http):
    (model,) = http.get("/v1/models").json()["data"]
    assert model["controlnets"] == ["outline"] and model["ip_adapter"] is None


def test_a_client_of_a1111_steers_with_units(server, pipe, edges):
    api = webuiapi.WebUIApi(port=server.port, sampler=None, scheduler=None)
    assert api.get_scripts()["txt2img"] == ["controlnet"]
    assert api.controlnet_model_list() == ["outline"]
    assert api.controlnet_module_list() == ["none", "canny"]
    assert api.controlnet_version() == 3
    unit = webuiapi.ControlNetUnit(image=edges, model="outline [0123abcd]", weight=0.8)
    common = {"prompt": PROMPT, "steps": STEPS, "seed": SEED, "cfg_scale": 7.5}

    def scripts():  # the client would change its default argument, for all calls that follow
        return {"controlnet_units": [unit], "alwayson_scripts": {}}

    image = api.txt2img(**common, width=64, height=64, **scripts()).image
    scale = {"controlnet_conditioning_scale": 0.8}
    assert np.array_equal(image, draw(pipe, control_image=edges, **scale))
    plain = api.txt2img(**common, width=64, height=64, alwayson_scripts={}).image
    assert np.array_equal(plain, draw(pipe))
    start = Image.new("RGB", (64, 64), "blue")
    size = {"width": 64, "height": 64, "denoising_strength": 0.9}
    result = api.img2img(images=[start], **common, **size, **scripts())
    assert np.array_equal(
        result.image, draw(pipe, image=start, strength=0.9, control_image=edges, **scale)
    )


def test_a_unit_without_an_image_reads_that_of_img2img(http, pipe, edges):
    scripts = {"ControlNet": {"args": [{"model": "outline", "guidance_end": 0.5}]}}
    body = {"prompt": PROMPT, "steps": STEPS, "seed": SEED, "cfg_scale": 7.5}
    fields = {"init_images": [encode(edges)], "denoising_strength": 0.8}
    response = http.post("/sdapi/v1/img2img", json={**body, **fields, "alwayson_scripts": scripts})
    options = {"image": edges, "strength": 0.8, "control_image": edges, "control_guidance_end": 0.5}
    assert np.array_equal(first_image(response), draw(pipe, **options))


@pytest.mark.parametrize(
    ("mode", "box"),
    [("Just Resize", None), ("Crop and Resize", (32, 0, 96, 64)), (1, (32, 0, 96, 64))],
)
def test_a_control_image_of_another_ratio_is_resized_by_mode(http, pipe, edges, mode, box):
    wide = Image.new("RGB", (128, 64))
    wide.paste(edges, (40, 0))
    expected = draw(pipe, control_image=wide.crop(box) if box else wide)
    unit = {"model": "outline", "image": encode(wide), "resize_mode": mode}
    assert np.array_equal(first_image(txt2img(http, unit)), expected)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model": "canny"}, "canny"),
        ({"module": "depth_midas"}, "module"),
        ({"module": "canny", "threshold_a": 300}, "low_threshold"),
        ({"module": "canny", "processor_res": 10**6}, "processor_res"),
        ({"control_mode": "ControlNet is more important"}, "control_mode"),
        ({"mask": "x"}, "mask"),
        ({"image": None}, "without an image"),
        ({"weight": 3}, "weight"),
        ({"guidance_start": "x"}, "guidance_start"),
        ({"resize_mode": "Zoom"}, "resize_mode"),
        ({"surprise": 5}, "surprise"),
    ],
)
def test_units_that_are_not_understood_are_rejected_by_name(http, edges, fields, word):
    unit = {"model": "outline", "image": encode(edges), **fields}
    response = txt2img(http, unit)
    assert response.status_code == 400
    assert word in response.json()["detail"]


@pytest.fixture(scope="module")
def photo():
    """Noise that is smooth enough for edges, wider than high."""
    noise = np.random.default_rng(0).integers(0, 255, (6, 12, 3), np.uint8)
    return Image.fromarray(noise).resize((120, 60), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("fields", [{}, {"pixel_perfect": True, "processor_res": 30}])
def test_a_unit_computes_edges_in_the_size_of_the_images(http, pipe, photo, fields):
    thresholds = {"threshold_a": 20, "threshold_b": 60}
    unit = {"model": "outline", "module": "Canny", "image": encode(photo), **thresholds, **fields}
    cropped = photo.resize((128, 64), Image.Resampling.LANCZOS).crop((32, 0, 96, 64))
    edges = sdrt.preprocess("canny", cropped, low_threshold=20, high_threshold=60)
    assert np.array_equal(first_image(txt2img(http, unit)), draw(pipe, control_image=edges))
    other = first_image(txt2img(http, {**unit, "threshold_b": 900, "threshold_a": 900}))
    assert not np.array_equal(other, draw(pipe, control_image=edges))


def test_a_unit_computes_edges_at_the_resolution_it_asks_for(http, pipe, photo):
    unit = {"model": "outline", "module": "canny", "image": encode(photo), "processor_res": 96}
    large = photo.resize((192, 96), Image.Resampling.LANCZOS)
    edges = sdrt.preprocess("canny", large).resize((128, 64), Image.Resampling.LANCZOS)
    expected = draw(pipe, control_image=edges.crop((32, 0, 96, 64)))
    assert np.array_equal(first_image(txt2img(http, unit)), expected)


def test_detect_computes_what_a_unit_would(server, http, photo):
    """Under the names of the extension, and those of a client that has older ones."""
    body = {"controlnet_module": "canny", "controlnet_processor_res": -1}
    body |= {"controlnet_threshold_a": -1, "controlnet_threshold_b": -1}
    response = http.post(
        "/controlnet/detect", json={**body, "controlnet_input_images": [encode(photo)]}
    )
    assert response.status_code == 200, response.text
    expected = np.asarray(sdrt.preprocess("canny", photo))
    assert np.array_equal(decode(response.json()["images"][0]), expected) and expected.any()
    result = webuiapi.WebUIApi(port=server.port).controlnet_detect(
        [photo], module="canny", processor_res=60, threshold_a=64, threshold_b=64
    )
    edges = sdrt.preprocess("canny", photo, low_threshold=64, high_threshold=64)
    assert np.array_equal(result.image, edges)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"controlnet_module": "openpose"}, "openpose"),
        ({"controlnet_input_images": []}, "controlnet_input_images"),
        ({"controlnet_masks": ["x"]}, "controlnet_masks"),
        ({"controlnet_processor_res": 0}, "processor_res"),
        ({"controlnet_res": 5}, "controlnet_res"),
    ],
)
def test_what_detect_does_not_compute_is_rejected_by_name(http, photo, fields, word):
    body = {"controlnet_module": "canny", "controlnet_input_images": [encode(photo)], **fields}
    response = http.post("/controlnet/detect", json=body)
    assert response.status_code == 400 and word in response.text


def test_disabled_units_change_nothing(http, pipe, edges):
    unit = {"enabled": False, "model": "canny", "module": "canny", "image": encode(edges)}
    assert np.array_equal(first_image(txt2img(http, unit)), draw(pipe))


def test_nets_are_given_to_the_bundles_that_they_fit(shapes, tiny_bundle):
    parser = argparse.ArgumentParser()
    add_serve(parser)
    both = ["--bundle", str(tiny_bundle), "--bundle", str(shapes), "--controlnet", "outline"]
    sources = sources_from_arguments(parser.parse_args(both))
    nets = [source.load.keywords["controlnet"] for source in sources.values()]
    assert [len(of) for of in nets] == [0, 1]
    with pytest.raises(UsageError, match="outline"):
        sources_from_arguments(parser.parse_args(both[:2] + both[4:]))
