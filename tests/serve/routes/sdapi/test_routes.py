"""The `/sdapi` endpoints, called by a client library written for them."""

import base64
import shutil
import threading
from io import BytesIO

import numpy as np
import pytest
import webuiapi
from PIL import Image
from safetensors.numpy import save_file
from serving import PROMPT, client, get_engine, wait_for

from sdrt.bundle.token_embeddings import read_table
from sdrt.runtime.textual_inversion.files import embeddings_folder

pytestmark = pytest.mark.integration

LONG = {"steps": 900, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def api(server):
    return webuiapi.WebUIApi(port=server.port, sampler="Euler", steps=4)


def text_to_image(api, **options):
    return api.txt2img(prompt=PROMPT, seed=3, width=64, height=64, **options)


def test_image_equals_the_pipelines(api, pipe):
    response = text_to_image(
        api, batch_size=2, n_iter=2, sampler_name="DPM++ 2M", scheduler="karras"
    )
    expected = pipe.with_scheduler("DPM++ 2M Karras")(
        PROMPT, seed=3, num_inference_steps=4, guidance_scale=7.0, num_images_per_prompt=4
    )
    assert response.info["all_seeds"] == [3, 4, 5, 6]
    assert response.info["infotexts"] == expected.parameters
    for result, image in zip(response.images, expected.images, strict=True):
        assert np.array_equal(result, image)


def test_random_seed_is_reported(api):
    response = api.txt2img(prompt=PROMPT, width=64, height=64, seed=-1)
    again = api.txt2img(prompt=PROMPT, width=64, height=64, seed=response.info["seed"])
    assert np.array_equal(response.image, again.image)


def test_image_to_image_with_a_mask(api, pipe):
    start = pipe("a green square on a white background", seed=1).images[0]
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 32, 12))

    def changed(**options):
        response = api.img2img(
            images=[start],
            mask_image=mask,
            prompt=PROMPT,
            seed=3,
            steps=10,
            denoising_strength=1.0,
            width=64,
            height=64,
            **options,
        )
        change = np.abs(np.asarray(response.image, float) - np.asarray(start)).mean(axis=2)
        return change[:20].mean(), change[32:].mean()

    inside, outside = changed()
    assert inside > 3 * outside
    inside, outside = changed(inpainting_mask_invert=1)
    assert outside > 3 * inside


def test_png_info_reads_the_text_back(api):
    result = text_to_image(api).image
    with client_of(api) as http:
        buffer = BytesIO()
        result.save(buffer, "PNG", pnginfo=_info(result.info["parameters"]))
        image = base64.b64encode(buffer.getvalue()).decode()
        response = http.post("/sdapi/v1/png-info", json={"image": image}).json()
    assert response["info"] == result.info["parameters"]
    assert response["parameters"]["Prompt"] == PROMPT
    assert response["parameters"]["Seed"] == "3"
    assert response["parameters"]["Sampler"] == "Euler"


def _info(text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", text)
    return info


def client_of(api):
    import httpx

    return httpx.Client(base_url=api.baseurl.removesuffix("/sdapi/v1"), timeout=60)


def test_progress_and_interrupt(api, server):
    assert api.get_progress()["progress"] == 0.0
    responses = []
    asking = threading.Thread(
        target=lambda: responses.append(api.txt2img(prompt=PROMPT, seed=0, **LONG))
    )
    asking.start()
    wait_for(lambda: api.get_progress()["state"]["sampling_step"] > 2)
    message = api.get_progress()
    assert 0.0 < message["progress"] < 1.0
    assert message["eta_relative"] > 0.0
    assert Image.open(BytesIO(base64.b64decode(message["current_image"]))).size == (256, 256)
    api.interrupt()
    asking.join()
    assert responses[0].images == []
    wait_for(lambda: not get_engine(server).unfinished())
    assert api.get_progress()["state"]["job_count"] == 0


def test_every_listed_sampler_is_accepted(api, server):
    names = [sampler["name"] for sampler in api.get_samplers()]
    assert {"Euler a", "DPM++ 2M Karras", "UniPC"} <= set(names)
    pipe = get_engine(server).pipe
    for name in names:
        pipe.with_scheduler(name)


def test_lists(api):
    (model,) = api.get_sd_models()
    assert model["title"] == model["model_name"] == "shapes"
    assert api.get_options()["sd_model_checkpoint"] == "shapes"
    assert {"Karras", "Automatic"} <= {item["label"] for item in api.get_schedulers()}


NUMBERS = ("seed", "steps", "cfg_scale", "width", "height", "batch_size", "n_iter")
VALUES = ("0", "-1", "1e9", str(2**63), "NaN", "true", '"7"')


def test_invalid_numbers_are_rejected(server):
    allowed = {("seed", item) for item in ("0", "-1", "1e9", str(2**63))}
    allowed |= {("cfg_scale", "0")}
    allowed |= {(name, "true") for name in ("seed", "steps", "cfg_scale", "batch_size", "n_iter")}
    allowed |= {(n, '"7"') for n in ("seed", "steps", "cfg_scale", "batch_size", "n_iter")}
    with client(server) as http:
        for name in NUMBERS:
            for value in VALUES:
                steps = "" if name == "steps" else '"steps": 1, '
                body = f'{{"prompt": "x", {steps}"{name}": {value}}}'
                response = http.post(
                    "/sdapi/v1/txt2img",
                    content=body,
                    headers={"content-type": "application/json"},
                )
                expected = (200,) if (name, value) in allowed else (400, 422)
                assert response.status_code in expected, (name, value, response.text[:200])
                if response.status_code != 200:
                    assert response.json()["detail"]
        assert http.get("/health/ready").status_code == 200


@pytest.mark.parametrize("image", ["", "?", "AAAA", "data:image/png;base64,AAAA"])
def test_invalid_images_are_rejected(server, image):
    with client(server) as http:
        body = {"prompt": "x", "init_images": [image]}
        assert http.post("/sdapi/v1/img2img", json=body).status_code == 400
        assert http.post("/sdapi/v1/png-info", json={"image": image}).status_code == 400


def test_embeddings_of_the_folder_are_words_once_refreshed(api, pipe, shapes):
    _, table = read_table(shapes / "text_encoder")
    folder = embeddings_folder()
    folder.mkdir()
    try:
        vectors = np.array(table[pipe.tokenizer.ids("green square")])
        save_file({"emb_params": vectors}, folder / "gsq.safetensors")
        save_file({"emb_params": vectors[:, :5].copy()}, folder / "narrow.safetensors")
        assert api.get_embeddings()["loaded"] == {}
        api.session.post(f"{api.baseurl}/refresh-embeddings").raise_for_status()
        listed = api.get_embeddings()
        assert (listed["loaded"]["gsq"]["shape"], listed["loaded"]["gsq"]["vectors"]) == (128, 2)
        assert "5 wide" in listed["skipped"]["narrow"]["reason"]
        response = api.txt2img(prompt="a gsq", seed=3, width=64, height=64)
        expected = pipe.with_scheduler("Euler")(
            "a green square", seed=3, num_inference_steps=4, guidance_scale=7.0
        )
        assert np.array_equal(response.image, expected.images[0])
        assert 'TI hashes: "gsq: ' in response.info["infotexts"][0]
    finally:
        shutil.rmtree(folder)
        api.session.post(f"{api.baseurl}/refresh-embeddings").raise_for_status()
