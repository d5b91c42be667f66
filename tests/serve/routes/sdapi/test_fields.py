"""Which fields and options of `/sdapi` are used, rejected or ignored, and that the docs say so."""

import base64
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webuiapi
from PIL import Image
from serving import PROMPT, client, get_engine
from starlette.testclient import TestClient

from sdrt.serve.app import create_app
from sdrt.serve.model_manager import ModelSource
from sdrt.serve.routes.sdapi import fields as sdapi_fields
from sdrt.serve.routes.sdapi import options as sdapi_options
from sdrt.serve.routes.sdapi.control import ControlNetUnit
from sdrt.serve.schemas import HiresRequest, ImageToImageRequest
from sdrt.serve.settings import Settings

pytestmark = pytest.mark.integration

DOCS = Path(__file__).parents[4] / "docs" / "serving" / "sdapi.md"
BODY = {"prompt": PROMPT, "steps": 2, "seed": 3}


def encoded(image, kind="PNG"):
    buffer = BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def image_of(response, index=0):
    assert response.status_code == 200, response.text[:300]
    return np.asarray(Image.open(BytesIO(base64.b64decode(response.json()["images"][index]))))


@pytest.fixture(scope="module")
def http(server):
    with client(server) as opened:
        yield opened


def txt2img(http, **fields):
    return http.post("/sdapi/v1/txt2img", json={**BODY, **fields})


def img2img(http, **fields):
    start = fields.pop("init_images", [encoded(Image.new("RGB", (64, 64), "red"))])
    return http.post("/sdapi/v1/img2img", json={**BODY, "init_images": start, **fields})


CHANGED = {
    "enable_hr": (True, 1, "true"),
    "restore_faces": (True,),
    "tiling": (True,),
    "styles": (["anime"],),
    "subseed_strength": (0.5, "0.5"),
    "seed_resize_from_h": (512,),
    "seed_resize_from_w": (512,),
    "s_churn": (0.1,),
    "s_noise": (0.9,),
    "s_min_uncond": (1.5,),
    "script_name": ("X/Y/Z plot",),
    "infotext": ("Steps: 3",),
    "firstpass_image": ("AAAA",),
    "latent_mask": ("AAAA",),
    "mask_round": (False,),
    "initial_noise_multiplier": (1.1,),
    "disable_extra_networks": (True,),
}


@pytest.mark.parametrize("name", sdapi_fields.NEUTRAL)
def test_field_is_rejected_unless_it_changes_nothing(http, name):
    plain = image_of(txt2img(http))
    for neutral in (None, *sdapi_fields.NEUTRAL[name]):
        assert np.array_equal(image_of(txt2img(http, **{name: neutral})), plain)
    used = name in HiresRequest.model_fields
    for value in CHANGED[name]:
        for send in (img2img,) if used else (txt2img, img2img):
            response = send(http, **{name: value})
            assert response.status_code == 400 and name in response.json()["detail"]


HIRES = {
    "enable_hr": True,
    "denoising_strength": 0.5,
    "hr_scale": 2,
    "hr_second_pass_steps": 3,
    "hr_upscaler": "Latent (nearest-exact)",
    "hr_prompt": "a green square",
    "hr_sampler_name": "Euler a",
}


def test_a_second_pass_has_the_image_of_the_library(http, pipe):
    response = txt2img(http, **HIRES)
    expected = pipe(
        PROMPT,
        num_inference_steps=2,
        guidance_scale=7.0,
        seed=3,
        hires_scale=2.0,
        hires_strength=0.5,
        hires_steps=3,
        hires_upscaler="Latent (nearest-exact)",
        hires_prompt="a green square",
        hires_scheduler="Euler a",
    )
    np.testing.assert_array_equal(image_of(response), expected.images[0])
    (text,) = json.loads(response.json()["info"])["infotexts"]
    assert "Hires upscaler: Latent (nearest-exact)" in text and "Hires sampler: Euler a" in text


def test_a_second_pass_may_ask_for_a_size(http):
    lax = {"enable_hr": "true", "hr_resize_x": "96", "hr_resize_y": 64.0, "hr_upscaler": "None"}
    assert image_of(txt2img(http, **lax)).shape == (64, 96, 3)
    off = HIRES | {"enable_hr": False}
    assert np.array_equal(image_of(txt2img(http, **off)), image_of(txt2img(http)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hr_upscaler", "4x-Nothing"),
        ("hr_upscaler", "/tmp/folder"),
        ("hr_upscaler", "../folder"),
        ("hr_scale", 0.5),
        ("hr_scale", "x"),
        ("hr_sampler_name", "nonsense"),
        ("hr_checkpoint_name", "other"),
        ("firstphase_width", 32),
        ("eta", 0.5),
    ],
)
def test_an_unsupported_second_pass_is_rejected_by_name(http, field, value):
    response = txt2img(http, **{**HIRES, field: value})
    assert response.status_code in (400, 422), response.text
    assert field.removeprefix("hr_") in json.dumps(response.json())


def test_latent_upscalers_are_listed(http):
    names = [entry["name"] for entry in http.get("/sdapi/v1/latent-upscale-modes").json()]
    assert len(names) == 6
    for name in names:
        assert txt2img(http, **HIRES | {"hr_upscaler": name}, steps=1).status_code == 200


def test_fields_without_effect_are_ignored(http):
    plain = image_of(txt2img(http))
    ignored = sdapi_fields.IGNORED | sdapi_fields.IMG2IMG_ONLY
    for value in (1, True, "x"):
        assert np.array_equal(image_of(txt2img(http, **dict.fromkeys(ignored, value))), plain)


@pytest.mark.parametrize("value", [1, "x", [0], {"a": 1}, True])
def test_unknown_field_is_rejected_unless_empty(http, value):
    response = txt2img(http, cfg_scal=value)
    assert response.status_code == 400 and "cfg_scal" in response.json()["detail"]
    for unused in (None, "", False, 0, [], {}):
        assert txt2img(http, hr_new_field=unused, steps=1).status_code == 200


OFF = (
    None,
    {},
    {"controlnet": {"args": []}},
    {"controlnet": {"args": [{"enabled": False, "model": "canny"}] * 3}},
    {"ControlNet": {"args": [{"enabled": False}, None]}},
    {"ADetailer": {"args": [False, {"ad_model": "face_yolov8n.pt"}]}},
    {"ADetailer": {"args": [{"ad_model": "None"}]}},
    {"Refiner": {"args": [False, "", 0.8]}},
)
ON = (
    {"controlnet": {"args": [{"model": "canny", "image": "AAAA"}]}},
    {"controlnet": {"args": [{"enabled": False}, {"enabled": True}]}},
    {"ADetailer": {"args": [True, False, {"ad_model": "face_yolov8n.pt"}]}},
    {"ADetailer": {"args": [{"ad_model": "face_yolov8n.pt"}]}},
    {"Refiner": {"args": [True, "xl", 0.8]}},
    {"Sampler": {"args": [20, "Euler", "Karras"]}},
    {"x": {"args": "no"}},
)


@pytest.mark.parametrize("scripts", OFF)
def test_disabled_scripts_are_ignored(http, scripts):
    assert txt2img(http, alwayson_scripts=scripts, steps=1).status_code == 200


@pytest.mark.parametrize("scripts", ON)
def test_enabled_scripts_are_rejected_by_name(http, scripts):
    response = txt2img(http, alwayson_scripts=scripts)
    assert response.status_code == 400
    assert all(name in response.json()["detail"] for name in ("alwayson_scripts", *scripts))


@pytest.mark.parametrize(
    ("plain", "lax"),
    [
        ({"steps": 3}, {"steps": "3"}),
        ({"steps": 3}, {"steps": 3.0}),
        ({"seed": 7}, {"seed": "7"}),
        ({"seed": 7}, {"seed": 7.0}),
        ({"cfg_scale": 5.0}, {"cfg_scale": "5"}),
        ({"cfg_scale": 1}, {"cfg_scale": 0}),
        ({}, {"width": "64", "height": 64.0}),
        ({}, dict.fromkeys(("steps", "cfg_scale", "width", "height", "n_iter", "styles"))),
        ({}, dict.fromkeys(("sampler_name", "scheduler", "eta", "override_settings"))),
    ],
)
def test_numbers_may_be_strings_or_floats(http, plain, lax):
    lax = {name: value for name, value in lax.items() if name != "steps" or value is not None}
    assert np.array_equal(image_of(txt2img(http, **lax)), image_of(txt2img(http, **plain)))


@pytest.mark.parametrize("field", ["steps", "seed", "width", "batch_size"])
def test_non_integer_is_rejected_by_name(http, field):
    for value in (4.5, "4.5", "many", [4], {}):
        response = txt2img(http, **{field: value})
        assert response.status_code == 422 and field in response.json()["detail"]


def test_random_seed_spellings(http):
    for seed in (-1, "-1", -1.0, None):
        assert txt2img(http, seed=seed, steps=1).status_code == 200


def test_zero_strength_returns_the_image(http):
    start = Image.new("RGB", (64, 64), "red")
    expected = image_of(img2img(http, denoising_strength=0))
    assert np.abs(expected.astype(float) - np.asarray(start)).mean() < 20


def as_data_url(text):
    return f"data:image/png;base64,{text}"


@pytest.mark.parametrize(
    "spell",
    [
        as_data_url,
        lambda text: as_data_url(text).replace("data:image", "DATA:Image"),
        lambda text: f"data:image/png;charset=utf-8;base64,{text}",
        lambda text: f"data:application/octet-stream;base64,{text}",
        lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        lambda text: f" {text}\n",
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "-").replace("/", "_"),
    ],
)
def test_base64_variants_are_accepted(http, spell):
    rng = np.random.default_rng(1)
    text = encoded(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)))
    plain = image_of(img2img(http, init_images=[text]))
    assert np.array_equal(image_of(img2img(http, init_images=[spell(text)])), plain)


def test_invalid_image_inputs_are_explained(http):
    text = encoded(Image.new("RGB", (64, 64)))
    for fields, named in (
        ({"init_images": [text, text]}, "init_images"),
        ({"init_images": ["https://example.org/a.png"]}, "base64"),
        ({"resize_mode": 3}, "resize_mode"),
        ({"mask": text, "inpainting_fill": 2}, "inpainting_fill"),
    ):
        response = img2img(http, **fields)
        assert response.status_code == 400 and named in response.json()["detail"]


def test_mask_in_the_alpha_channel(http):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 40))
    generated = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    generated.putalpha(mask)
    result = [image_of(img2img(http, mask=encoded(item))) for item in (mask, generated)]
    assert np.array_equal(*result)
    plain = image_of(img2img(http))
    assert not np.array_equal(result[0], plain)
    stored = [image_of(img2img(http, mask=encoded(mask), mask_blur=n)) for n in (0, 4)]
    assert (stored[0][60:] == (255, 0, 0)).all() and not np.array_equal(*stored)


def test_init_images_are_echoed_on_request(http):
    assert img2img(http).json()["parameters"]["init_images"] is None
    again = img2img(http, include_init_images=True).json()
    assert len(again["parameters"]["init_images"]) == len(again["images"]) == 1


def test_sampler_and_scheduler_equal_the_pipelines(http, pipe):
    for sampler, scheduler, name in (
        ("Euler a", "Karras", "Euler a Karras"),
        ("Euler", "sgm_uniform", "Euler SGM Uniform"),
        ("DPM++ 2S a", "KARRAS", "DPM++ 2S a Karras"),
        ("DDIM", "Karras", "DDIM"),
        ("UniPC", "Beta", "UniPC"),
        ("DPM++ 2M", None, "DPM++ 2M Karras"),
        ("DPM++ 2M", "Automatic", "DPM++ 2M Karras"),
        ("DPM++ 2M SDE", "", "DPM++ 2M SDE Exponential"),
        ("k_dpmpp_2m_ka", None, "DPM++ 2M Karras"),
        ("dpmpp_2m", "simple", "DPM++ 2M Simple"),
        (None, "Karras", "Euler Karras"),
    ):
        response = txt2img(http, sampler_name=sampler, scheduler=scheduler)
        expected = pipe.with_scheduler(name)(
            PROMPT, seed=3, num_inference_steps=2, guidance_scale=7.0
        )
        assert np.array_equal(image_of(response), expected.images[0]), name
        assert f"Sampler: {name}," in response.json()["info"]
    plain = pipe(PROMPT, seed=3, num_inference_steps=2, guidance_scale=7.0).images[0]
    assert np.array_equal(image_of(txt2img(http)), plain)


def test_unsupported_pair_is_rejected_by_name(http):
    for fields in (
        {"scheduler": "Turbo"},
        {"sampler_name": "Euler", "scheduler": "Linear Quadratic"},
        {"sampler_name": "DPM adaptive"},
        {"sampler_name": "Restart", "scheduler": "Karras"},
        {"sampler_name": "DPM++ 2M SDE", "eta": 0.5},
    ):
        response = txt2img(http, **fields)
        assert response.status_code == 400
        detail = response.json()["detail"]
        assert str(fields.get("eta") or fields.get("scheduler")) in detail or (
            fields["sampler_name"] in detail
        )


@pytest.mark.rest
def test_every_listed_pair_is_accepted(http):
    samplers = http.get("/sdapi/v1/samplers").json()
    schedulers = http.get("/sdapi/v1/schedulers").json()
    names = {item["name"] for item in samplers}
    assert {"Euler", "DPM++ 2S a", "DPM++ 2M SDE Heun", "DPM++ 2M Karras"} <= names
    for item in ("Euler a", "DPM2 a", "DPM++ 3M SDE", "PLMS"):
        for scheduler in schedulers:
            for spelling in (scheduler["name"], scheduler["label"]):
                fields = {"sampler_name": item, "scheduler": spelling, "steps": 1}
                assert txt2img(http, **fields).status_code == 200, fields


def test_eta_scales_fresh_noise(http, pipe):
    plain, least = (image_of(txt2img(http, sampler_name="Euler a", eta=n)) for n in (1, 0))
    assert np.array_equal(plain, image_of(txt2img(http, sampler_name="Euler a")))
    config = pipe.with_scheduler("Euler a").scheduler_config | {"eta": 0.0}
    expected = pipe.with_scheduler(config)(
        PROMPT, seed=3, num_inference_steps=2, guidance_scale=7.0
    )
    assert np.array_equal(least, expected.images[0]) and not np.array_equal(plain, least)
    assert "eta" in expected.parameters[0]


SET = {
    "sd_vae": "some.vae",
    "eta_noise_seed_delta": 31337,
    "token_merging_ratio": 0.5,
    "a_new_option": 3,
    "CLIP_stop_at_last_layers": "two",
    "samples_format": "gif",
    "sd_model_checkpoint": "shapez",
}


@pytest.mark.parametrize("name", SET)
def test_options_are_rejected_by_the_same_rule(http, name):
    before = http.get("/sdapi/v1/options").json()
    for response in (
        http.post("/sdapi/v1/options", json={"send_size": False, name: SET[name]}),
        txt2img(http, override_settings={name: SET[name]}),
    ):
        named = "unknown model 'shapez'; similar: shapes" if "model" in name else name
        assert response.status_code == 400 and named in response.json()["detail"]
    assert http.get("/sdapi/v1/options").json() == before


def test_options_are_stored_and_returned(server, http):
    api = webuiapi.WebUIApi(port=server.port)
    before = api.get_options()
    assert before["sd_model_checkpoint"] == "shapes"
    api.set_options(before)  # as clients do: all of them again
    assert api.get_options() == before
    plain = image_of(txt2img(http))
    try:
        chosen = {"samples_format": "jpg", "CLIP_stop_at_last_layers": 2, "send_seed": False}
        api.set_options({"sd_model_checkpoint": "shapes.safetensors [0123456789]", **chosen})
        assert api.get_options() == before | chosen
        response = txt2img(http)
        skipped = txt2img(http, override_settings={"samples_format": "png"})
        result = Image.open(BytesIO(base64.b64decode(response.json()["images"][0])))
        assert result.format == "JPEG" and response.json()["info"].count("Clip skip: 2")
        assert not np.array_equal(image_of(skipped), plain)
    finally:
        api.set_options(before)
    assert np.array_equal(image_of(txt2img(http)), plain)


def test_override_settings_apply_to_one_request(http):
    settings = {"CLIP_stop_at_last_layers": 2, "sd_vae": "Automatic"}
    plain, skipped = image_of(txt2img(http)), image_of(txt2img(http, override_settings=settings))
    assert np.array_equal(image_of(txt2img(http)), plain)
    try:
        txt2img(
            http, override_settings=settings, override_settings_restore_afterwards=False
        ).raise_for_status()
        assert np.array_equal(image_of(txt2img(http)), skipped)
    finally:
        reset = {"CLIP_stop_at_last_layers": 1}
        http.post("/sdapi/v1/options", json=reset).raise_for_status()


def test_noise_source_option(http, pipe):
    generated = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 7.0}
    for source, rng in (("CPU", "cpu"), ("NV", "cuda"), ("GPU", "cuda")):
        result = image_of(txt2img(http, override_settings={"randn_source": source}))
        assert np.array_equal(result, pipe(PROMPT, rng=rng, **generated).images[0])


def test_sizes_equal_those_of_the_command_line(http, server, pipe):
    for size in ((128, 64), (48, 80), (96, 96)):
        result = txt2img(http, width=size[0], height=size[1])
        assert image_of(result).shape[:2] == size[::-1]
        text = f"{size[0]}x{size[1]}"
        expected = pipe(PROMPT, seed=3, num_inference_steps=2, guidance_scale=7.0, size=text)
        assert np.array_equal(image_of(result), expected.images[0])
    image = http.post(
        "/v1/images/generations",
        json={"prompt": PROMPT, "size": "128x64", "num_inference_steps": 2},
    ).json()
    assert image["size"] == "128x64" and image["data"]
    odd = txt2img(http, width=72)
    assert odd.status_code == 400 and "multiples of 16" in odd.json()["detail"]
    assert (128, 64) in get_engine(server).cost_model.estimated


def test_missing_content_type_is_explained(http):
    images = ("/sdapi/v1/txt2img", "/v1/images/generations", "/v1/jobs")
    for path in (*images, "/sdapi/v1/options", "/controlnet/detect"):
        for headers in ({}, {"content-type": "text/plain"}):
            response = http.post(path, content='{"prompt": "x"}', headers=headers)
            assert response.status_code == 415
            received = headers.get("content-type", "none")
            message = f"expected Content-Type application/json, received {received}"
            assert message in response.text
    assert txt2img(http, steps=1).status_code == 200


@pytest.mark.parametrize("body", ["[]", "3", '"x"', "null"])
def test_non_object_body_is_explained(http, body):
    for path in ("/sdapi/v1/txt2img", "/v1/images/generations", "/sdapi/v1/options"):
        headers = {"content-type": "application/json; charset=utf-8"}
        response = http.post(path, content=body, headers=headers)
        assert response.status_code in (400, 422) and "JSON" in response.text


def test_options_cannot_be_stored_on_ray():
    guard, models = create_app({"shapes": ModelSource(lambda: None)}, Settings())
    models.on_demand = True
    with TestClient(guard, base_url="http://localhost") as fleet:
        stored = {"sd_model_checkpoint": "Shapes.safetensors", "send_seed": False}
        assert fleet.post("/sdapi/v1/options", json=stored).status_code == 200
        for changed in ({"CLIP_stop_at_last_layers": 2}, {"samples_format": "jpg"}):
            response = fleet.post("/sdapi/v1/options", json=changed)
            assert response.status_code == 400 and "override_settings" in response.json()["detail"]


def test_number_of_options_is_limited(http):
    many = {f"save_{i}": i for i in range(500)}
    for sent in (many, {"save_x": "x" * 200_000}):
        response = http.post("/sdapi/v1/options", json=sent)
        assert response.status_code == 400 and "too many" in response.json()["detail"]


def rows(section):
    text = DOCS.read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}


def test_docs_describe_every_used_field():
    text = DOCS.read_text()
    hires = {**HiresRequest.model_fields}
    del hires["denoising_strength"]  # described once
    for name, field in (hires | ImageToImageRequest.model_fields).items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        assert f"| `{name}` | {default} | {field.description or ''} |\n" in text


def test_docs_describe_every_field_of_a_controlnet_unit():
    assert rows("Units of ControlNet") == set(ControlNetUnit.model_fields)
    for name, field in ControlNetUnit.model_fields.items():
        row = f"| `{name}` | `{json.dumps(field.default)}` | {field.description or ''} |\n"
        assert row in DOCS.read_text()


def test_docs_name_every_field_and_option():
    used = {*ImageToImageRequest.model_fields, *HiresRequest.model_fields}
    assert rows("Fields that are used") == used
    assert rows("Fields that are rejected") == {*sdapi_fields.NEUTRAL, "alwayson_scripts"}
    ignored = sdapi_fields.IGNORED | sdapi_fields.IMG2IMG_ONLY
    assert rows("Fields without effect") == set(ignored) - used
    assert rows("Options that are used") == set(sdapi_options.USED)
    assert rows("Options that are rejected") == set(sdapi_options.NEUTRAL)
