"""A refiner over HTTP: tiny bundles of SDXL's kind."""

import argparse
import base64
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from serving import PROMPT, client, run_server

import sdrt
from sdrt.cli.arguments import add_serve, sources_from_arguments
from sdrt.errors import UsageError

pytestmark = pytest.mark.integration
STEPS, SEED = 4, 3


@pytest.fixture(scope="module")
def pipe(tiny_xl_bundle, tiny_refiner_bundle):
    with sdrt.load(tiny_xl_bundle, backend="onnxruntime", refiner=tiny_refiner_bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(tiny_xl_bundle, tiny_refiner_bundle):
    with run_server(tiny_xl_bundle, ("tiny",), refiner=tiny_refiner_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with client(server) as opened:
        yield opened


def expected_image(pipe, **options):
    call = {"num_inference_steps": STEPS, "guidance_scale": 7.0, "seed": SEED, **options}
    return np.asarray(pipe(PROMPT, **call).images[0])


def decode(text):
    return np.asarray(Image.open(BytesIO(base64.b64decode(text))))


def generate(http, **fields):
    body = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 7.0, "seed": SEED}
    return http.post("/v1/images/generations", json={**body, **fields})


def txt2img(http, **fields):
    body = {"prompt": PROMPT, "steps": STEPS, "cfg_scale": 7.0, "seed": SEED}
    return http.post("/sdapi/v1/txt2img", json={**body, **fields})


def test_a_switch_gives_the_image_of_a_call(http, pipe):
    refined, plain = expected_image(pipe, refiner_switch_at=0.5), expected_image(pipe)
    assert not np.array_equal(refined, plain)
    for fields, expected in (({"refiner_switch_at": 0.5}, refined), ({}, plain)):
        response = generate(http, **fields)
        assert response.status_code == 200, response.text
        assert np.array_equal(decode(response.json()["data"][0]["b64_json"]), expected)
    (model,) = http.get("/v1/models").json()["data"]
    assert model["refiner"] == pipe.refiner.manifest.name


@pytest.mark.parametrize("spell", [str, str.upper, "{}.safetensors [0123abcd]".format])
def test_a1111s_fields_give_the_image_of_a_call(http, pipe, spell):
    name = spell(pipe.refiner.manifest.name)
    response = txt2img(http, refiner_checkpoint=name, refiner_switch_at=0.5)
    assert response.status_code == 200, response.text
    expected = expected_image(pipe, refiner_switch_at=0.5)
    assert np.array_equal(decode(response.json()["images"][0]), expected)
    assert "Refiner switch at: 0.5" in response.json()["info"]


def test_a1111s_fields_have_defaults(http, pipe):
    name = pipe.refiner.manifest.name
    default = txt2img(http, refiner_checkpoint=name).json()["images"][0]
    assert np.array_equal(decode(default), expected_image(pipe, refiner_switch_at=0.8))
    for off in ("", "None", None):
        plain = txt2img(http, refiner_checkpoint=off, refiner_switch_at=0.5).json()["images"][0]
        assert np.array_equal(decode(plain), expected_image(pipe))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"refiner_checkpoint": "other"}, "refiner_checkpoint"),
        ({"refiner_switch_at": 1}, "refiner_switch_at"),
        ({"refiner_switch_at": 0}, "refiner_switch_at"),
        ({"enable_hr": True}, "refiner_switch_at"),
    ],
)
def test_a1111s_fields_are_rejected_by_name(http, pipe, fields, word):
    fields = {"refiner_checkpoint": pipe.refiner.manifest.name, **fields}
    response = txt2img(http, **fields)
    assert response.status_code == 400 and word in response.json()["detail"]


def test_an_image_to_start_from_has_no_refiner(http, pipe):
    buffer = BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    start = [base64.b64encode(buffer.getvalue()).decode()]
    fields = {"init_images": start, "refiner_checkpoint": pipe.refiner.manifest.name}
    response = http.post("/sdapi/v1/img2img", json={"prompt": PROMPT, **fields})
    assert response.status_code == 400 and "refiner_switch_at" in response.json()["detail"]


def test_a_server_without_a_refiner_rejects_it_by_name(shapes):
    with run_server(shapes) as running, client(running) as http:
        response = generate(http, refiner_switch_at=0.5)
        message = response.json()["error"]["message"]
        assert response.status_code == 400 and "refiner_switch_at" in message
        rejected = txt2img(http, refiner_checkpoint="xl")
        assert rejected.status_code == 400 and "--refiner" in rejected.json()["detail"]


def test_a_refiner_goes_to_the_bundles_that_it_can_follow(
    shapes, tiny_xl_bundle, tiny_refiner_bundle
):
    parser = argparse.ArgumentParser()
    add_serve(parser)
    bundles = ["--bundle", str(shapes), "--bundle", str(tiny_xl_bundle)]
    refiner = ["--refiner", str(tiny_refiner_bundle)]
    sources = sources_from_arguments(parser.parse_args(bundles + refiner))
    assert [bool(source.load.keywords["refiner"]) for source in sources.values()] == [False, True]
    with pytest.raises(UsageError, match="cannot follow shapes"):
        sources_from_arguments(parser.parse_args(bundles[:2] + refiner))
