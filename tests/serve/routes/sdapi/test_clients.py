"""Requests to `/sdapi`: those of A1111's own tests, and those of known clients."""

import base64
import json
from io import BytesIO

import numpy as np
import pytest
import webuiapi
from PIL import Image
from serving import PROMPT, client

from sdrt.cli.main import main
from sdrt.runtime.images import save_image


def encoded(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decoded(text):
    return Image.open(BytesIO(base64.b64decode(text)))


START = Image.new("RGB", (64, 64), "navy")
START.paste("white", (16, 16, 48, 48))
MASK = Image.new("L", (64, 64))
MASK.paste(255, (24, 24, 40, 40))
IMAGE = encoded(START)

SHARED = {
    "batch_size": 1,
    "cfg_scale": 7,
    "eta": 0,
    "height": 64,
    "n_iter": 1,
    "negative_prompt": "",
    "prompt": "example prompt",
    "restore_faces": False,
    "s_churn": 0,
    "s_noise": 1,
    "s_tmax": 0,
    "s_tmin": 0,
    "sampler_index": "Euler a",
    "seed": -1,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "steps": 3,
    "styles": [],
    "subseed": -1,
    "subseed_strength": 0,
    "tiling": False,
    "width": 64,
}
TEXT = {
    **SHARED,
    "denoising_strength": 0,
    "enable_hr": False,
    "firstphase_height": 0,
    "firstphase_width": 0,
}
FROM_IMAGE = {
    **SHARED,
    "denoising_strength": 0.75,
    "include_init_images": False,
    "init_images": [IMAGE],
    "inpaint_full_res": False,
    "inpaint_full_res_padding": 0,
    "inpainting_fill": 0,
    "inpainting_mask_invert": False,
    "mask": None,
    "mask_blur": 4,
    "override_settings": {},
    "resize_mode": 0,
}
EXTRA = {
    "resize_mode": 0,
    "show_extras_results": True,
    "gfpgan_visibility": 0,
    "codeformer_visibility": 0,
    "codeformer_weight": 0,
    "upscaling_resize": 2,
    "upscaling_resize_w": 128,
    "upscaling_resize_h": 128,
    "upscaling_crop": True,
    "upscaler_1": "Lanczos",
    "upscaler_2": "None",
    "extras_upscaler_2_visibility": 0,
    "image": IMAGE,
}
COMPLEX = "((emphasis)), (emphasis1:1.1), [to:1], [from::2], [from:to:0.3], [alt|alt1]"
UPSCALE = {"script_name": "sd upscale", "script_args": ["", 8, "Lanczos", 2.0]}
# What the original's own suite sends: endpoint, body (none: a GET), and what a refusal names.
ORIGINAL = [
    ("txt2img", TEXT, None),
    ("txt2img", {**TEXT, "negative_prompt": "example negative prompt"}, None),
    ("txt2img", {**TEXT, "prompt": COMPLEX}, None),
    ("txt2img", {**TEXT, "height": 128}, None),
    ("txt2img", {**TEXT, "enable_hr": True, "denoising_strength": 0.5}, None),
    ("txt2img", {**TEXT, "enable_hr": True}, "denoising_strength"),  # 0, a pass of no steps
    ("txt2img", {**TEXT, "tiling": True}, "tiling"),
    ("txt2img", {**TEXT, "restore_faces": True}, "restore_faces"),
    ("txt2img", {**TEXT, "sampler_index": "PLMS"}, None),
    ("txt2img", {**TEXT, "sampler_index": "DDIM"}, None),
    ("txt2img", {**TEXT, "sampler_index": "UniPC"}, None),
    ("txt2img", {**TEXT, "n_iter": 2}, None),
    ("txt2img", {**TEXT, "batch_size": 2}, None),
    ("img2img", FROM_IMAGE, None),
    ("img2img", {**FROM_IMAGE, "mask": encoded(MASK)}, None),
    ("img2img", {**FROM_IMAGE, "mask": encoded(MASK), "inpainting_mask_invert": True}, None),
    ("img2img", {**FROM_IMAGE, **UPSCALE}, "script_name"),
    ("extra-single-image", EXTRA, None),
    ("extra-single-image", {"image": IMAGE}, None),
    ("extra-single-image", {"image": IMAGE, "model": ""}, None),
    ("png-info", {"image": IMAGE}, None),
    ("interrogate", {"image": IMAGE, "model": "clip"}, "interrogate"),
    ("options", {"send_seed": True}, None),
    ("options", None, None),
    ("progress", None, None),
    ("cmd-flags", None, None),
    ("samplers", None, None),
    ("upscalers", None, None),
    ("sd-models", None, None),
    ("hypernetworks", None, None),
    ("face-restorers", None, None),
    ("realesrgan-models", None, None),
    ("prompt-styles", None, None),
    ("embeddings", None, None),
    ("txt2img", {**TEXT, "sampler_index": "Euler a", "alwayson_scripts": {}}, None),
]


@pytest.fixture(scope="module")
def http(server):
    with client(server) as opened:
        yield opened


def post(http, path, body):
    path = f"/sdapi/v1/{path}"
    return http.get(path) if body is None else http.post(path, json=body)


@pytest.mark.parametrize(
    ("path", "body", "refused"), ORIGINAL, ids=[f"{i}-{item[0]}" for i, item in enumerate(ORIGINAL)]
)
def test_requests_of_a1111s_own_tests(http, path, body, refused):
    response = post(http, path, body)
    if refused is None:
        assert response.status_code == 200, response.text[:300]
        return
    message = response.json()
    assert response.status_code == 400 and refused in message["detail"]
    assert set(message) == {"error", "detail", "body", "errors"}


def test_options_are_stored_and_read(http):
    before = http.get("/sdapi/v1/options").json()["send_seed"]
    for value in (not before, before):
        assert http.post("/sdapi/v1/options", json={"send_seed": value}).status_code == 200
        assert http.get("/sdapi/v1/options").json()["send_seed"] == value


# In the shape of each client, its fields and its spellings.
OPEN_WEBUI = {
    "prompt": PROMPT,
    "batch_size": 1,
    "width": 64,
    "height": 64,
    "steps": 3,
    "negative_prompt": "",
    "cfg_scale": 7.0,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
}
CHAT_FRONT_END = {
    "prompt": PROMPT,
    "negative_prompt": "blurry",
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True,
    "sampler_name": "DPM++ 2M",
    "scheduler": "karras",
    "steps": 3,
    "cfg_scale": 7,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": -1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
TOOL = {
    "prompt": PROMPT,
    "negative_prompt": "",
    "width": 64,
    "height": 64,
    "cfg_scale": 4.5,
    "sampler_index": "DPM++ 2M Karras",
    "steps": 3,
}
PAINTING_PLUGIN = {
    **CHAT_FRONT_END,
    "init_images": [f"data:image/png;base64,{IMAGE}"],
    "mask": encoded(Image.merge("RGBA", [*START.split(), MASK])),
    "sampler_name": "Euler a",
    "scheduler": "SGM Uniform",
    "mask_blur": 2,
    "inpainting_fill": 1,
    "inpaint_full_res": True,
    "inpaint_full_res_padding": 8,
    "inpainting_mask_invert": 0,
    "resize_mode": 1,
    "image_cfg_scale": 1.5,
    "seed": "12",
    "alwayson_scripts": {"controlnet": {"args": [{"enabled": False}] * 2}},
    "script_args": [],
    "tiling": False,
}
FORK = {**OPEN_WEBUI, "distilled_cfg_scale": 3.5, "hr_cfg": 7.0, "comments": {}, "styles": None}


@pytest.mark.parametrize("body", [OPEN_WEBUI, CHAT_FRONT_END, TOOL, PAINTING_PLUGIN, FORK])
def test_requests_of_known_clients(http, body):
    path = "img2img" if "init_images" in body else "txt2img"
    response = post(http, path, body)
    assert response.status_code == 200, response.text[:300]
    message = response.json()
    info = json.loads(message["info"])
    assert decoded(message["images"][0]).info["parameters"] == info["infotexts"][0]
    assert info["all_seeds"][0] == info["seed"]


def test_inpainting_infotext_in_the_image(http, tmp_path, capsys):
    body = {**FROM_IMAGE, "mask": encoded(MASK)}
    image = decoded(post(http, "img2img", body).json()["images"][0])
    assert "Mask blur: 4" in image.info["parameters"]
    save_image(image, tmp_path / "a.png", image.info["parameters"])
    assert main(["run", "--from", str(tmp_path / "a.png")]) == 2
    assert "Mask blur" in capsys.readouterr().err  # the command line does not use masks so


def test_client_library_round_trip(server):
    api = webuiapi.WebUIApi(port=server.port, sampler="DPM++ 2M", scheduler="karras", steps=3)
    result = api.txt2img(prompt=PROMPT, width=64, height=64, seed=5, n_iter=2)
    assert len(result.images) == 2 and result.info["seed"] == 5
    again = api.img2img(
        images=[result.image], prompt=PROMPT, width=64, height=64, denoising_strength=0.5, steps=8
    )
    assert again.image.size == (64, 64)
    painted = api.img2img(
        images=[START], mask_image=MASK, prompt=PROMPT, width=64, height=64, mask_blur=0, steps=8
    )
    stored = np.asarray(MASK) == 0
    assert np.array_equal(np.asarray(painted.image)[stored], np.asarray(START)[stored])
    larger = api.extra_single_image(START, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=2)
    assert larger.image.size == (128, 128)
    both = api.extra_batch_images(
        [START, MASK.convert("RGB")], upscaler_1=webuiapi.Upscaler.Nearest, upscaling_resize=1.5
    )
    assert [item.size for item in both.images] == [(96, 96)] * 2
    assert api.png_info(result.image) is not None
    for get in ("upscalers", "latent_upscale_modes", "hypernetworks", "face_restorers"):
        assert isinstance(getattr(api, f"get_{get}")(), list), get
    for get in ("realesrgan_models", "prompt_styles", "loras", "sd_vae", "schedulers"):
        assert isinstance(getattr(api, f"get_{get}")(), list), get
    assert api.get_memory()["ram"]["used"] > 2**20
    assert set(api.get_scripts()) == {"txt2img", "img2img"}
    assert set(api.get_embeddings()) == {"loaded", "skipped"}
    assert api.get_cmd_flags()["api"] is True
    api.refresh_checkpoints()
    assert api.util_get_current_model() == "shapes"
    api.util_set_model("shapes")


@pytest.mark.parametrize("name", ["Lanczos", "Nearest", "Bicubic", "bilinear"])
def test_extras_equal_pillows_resize(http, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    kind = Image.Resampling[name.upper()]
    by_factor = {"upscaler_1": name, "upscaling_resize": "1.5", "image": encoded(noise)}
    result = decoded(post(http, "extra-single-image", by_factor).json()["image"])
    assert np.array_equal(result, noise.resize((48, 36), kind))
    to_size = {**by_factor, "resize_mode": 1, "upscaling_resize_w": 48, "upscaling_resize_h": 48}
    result = decoded(post(http, "extra-single-image", to_size).json()["image"])
    assert np.array_equal(result, noise.resize((64, 48), kind).crop((8, 0, 56, 48)))
    full = {**to_size, "upscaling_crop": False}
    result = decoded(post(http, "extra-single-image", full).json()["image"])
    assert np.array_equal(result, noise.resize((64, 48), kind))
    two = {**by_factor, "upscaler_2": "Nearest", "extras_upscaler_2_visibility": 0.5}
    result = decoded(post(http, "extra-single-image", two).json()["image"])
    other = noise.resize((48, 36), Image.Resampling.NEAREST)
    assert np.array_equal(result, Image.blend(noise.resize((48, 36), kind), other, 0.5))


def test_unsupported_extras_are_rejected_by_name(http):
    for fields, named in (
        ({"upscaler_1": "R-ESRGAN 4x+"}, "upscaler_1"),
        ({"upscaler_2": "LDSR"}, "upscaler_2"),
        ({"gfpgan_visibility": 0.5}, "gfpgan_visibility"),
        ({"codeformer_visibility": 1}, "codeformer_visibility"),
        ({"upscaling_resize": 99}, "6336x6336"),
        ({"image": ""}, "readable"),
    ):
        response = post(http, "extra-single-image", {**EXTRA, **fields})
        assert response.status_code == 400 and named in response.json()["detail"], fields


def test_available_lists(http, home):
    folder = home / "loras"
    folder.mkdir(exist_ok=True)
    (folder / "some.safetensors").write_bytes(b"")
    try:
        listed = post(http, "loras", None).json()
    finally:
        (folder / "some.safetensors").unlink()
    assert {"name": "some", "alias": "some", "path": "some.safetensors", "metadata": {}} in listed
    names = [item["name"] for item in post(http, "upscalers", None).json()]
    assert names[:3] == ["None", "Lanczos", "Nearest"]
    ram = post(http, "memory", None).json()["ram"]
    assert 0 < ram["used"] < ram["total"] and 0 < ram["free"] <= ram["total"]
    for path in ("sd-vae", "sd-modules", "script-info", "extensions"):
        assert post(http, path, None).json() == []
    assert post(http, "scripts", None).json() == {"txt2img": [], "img2img": []}
    assert http.get("/internal/ping").json() == {}
    for path in ("refresh-vae", "refresh-loras", "reload-checkpoint"):
        assert post(http, path, {}).status_code == 200
    refused = post(http, "unload-checkpoint", {})
    assert refused.status_code == 400 and "loaded" in refused.json()["detail"]
