"""OpenAI's endpoints, called by OpenAI's client, and by httpx for what that client cannot send."""

import base64
import json
from contextlib import ExitStack
from io import BytesIO

import numpy as np
import openai
import pytest
from PIL import Image
from serving import PROMPT, client, get_engine, run_server, wait_for

from sdrt.runtime.images import parse_parameters, read_parameters

pytestmark = pytest.mark.integration

FAST = {"num_inference_steps": 4, "seed": 3}
FEWER = {"guidance_scale": 5.0, "feature_reuse": 2}


@pytest.fixture(scope="module")
def api(server):
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    )


def decode_image(data):
    return Image.open(BytesIO(base64.b64decode(data)))


def generate(api, **options):
    extra = {**FAST, **options.pop("extra_body", {})}
    return api.images.generate(prompt=PROMPT, model="shapes", extra_body=extra, **options)


def test_image_equals_the_pipelines(api, pipe):
    response = generate(api, n=2, extra_body={**FEWER, "scheduler": "Euler"})
    expected = pipe.with_scheduler("Euler")(PROMPT, num_images_per_prompt=2, **FEWER, **FAST)
    assert response.size == "64x64"
    for data, image, text in zip(response.data, expected.images, expected.parameters, strict=True):
        result = decode_image(data.b64_json)
        assert np.array_equal(result, image)
        assert read_parameters(result) == text
    assert [data.seed for data in response.data] == [3, 4]


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats_contain_parameters(api, kind):
    response = generate(api, output_format=kind, output_compression=80)
    result = decode_image(response.data[0].b64_json)
    assert result.format == kind.upper()
    assert parse_parameters(read_parameters(result))["Seed"] == "3"


def test_single_colour_image_has_a_warning(api, server):
    decoder = get_engine(server).pipe.engines["vae_decoder"]
    decoder.refit({"decoder.conv_out.weight": np.zeros((3, 16, 3, 3), np.float32)})
    try:
        flat = generate(api).data[0]
        event = list(generate(api, stream=True))[-1]
    finally:
        decoder.refit({})
    assert "one colour all over" in flat.warning and event.warning == flat.warning
    assert not hasattr(generate(api).data[0], "warning")


def test_stream_events(api, pipe):
    events = list(generate(api, stream=True, partial_images=3, extra_body={"progress": True}))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds.count("partial_image") == 3
    assert kinds[-1] == "completed"
    steps = [(event.step, event.total) for event in events if event.type.endswith("progress")]
    total = steps[0][1]
    assert steps == [(i + 1, total) for i in range(total)]
    partial = [event for event in events if event.type.endswith("partial_image")]
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert decode_image(partial[0].b64_json).size == (256, 256)
    expected = pipe(PROMPT, **FAST).images[0]
    assert np.array_equal(decode_image(events[-1].b64_json), expected)
    # The last preview is closer to the image than the first.
    small = expected.resize((256, 256))

    def far(event):
        return np.abs(np.asarray(decode_image(event.b64_json), float) - np.asarray(small)).mean()

    assert far(partial[-1]) < far(partial[0])


def test_stream_reports_queue_positions(shapes):
    """One slot; the second and third wait, and move up when the first one finishes."""
    with run_server(shapes, slots=1) as server, client(server) as http, ExitStack() as stack:
        body = {"prompt": PROMPT, "stream": True, "progress": True, "num_inference_steps": 900}
        post, streams = [], []
        for _ in range(3):
            post.append(ExitStack())
            stack.push(post[-1])
            response = post[-1].enter_context(
                http.stream("POST", "/v1/images/generations", json=body)
            )
            streams.append(response.iter_lines())
            first = _event(streams[-1])
        wait_for(lambda: len(get_engine(server).unfinished()) == 3)
        assert (first["type"], first["position"]) == ("image_generation.queued", 1)
        assert next(line for line in streams[2] if line).startswith(":")  # nothing new, but alive
        post[0].close()
        assert _event(streams[2])["position"] == 0
        while _event(streams[1])["type"] != "image_generation.progress":
            pass


def _event(lines):
    line = next(line for line in lines if line.startswith("data: "))
    return json.loads(line.removeprefix("data: "))


def test_stream_has_openais_fields(api):
    events = list(generate(api, stream=True, partial_images=1))
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert events[1].output_format == "png"


def test_edits_start_from_an_image(api, pipe):
    start = pipe("a green square on a white background", seed=1).images[0]
    response = api.images.edit(
        image=_file(start), prompt=PROMPT, model="shapes", extra_body={**FAST, "strength": 0.5}
    )
    expected = pipe(PROMPT, image=start, strength=0.5, **FAST).images[0]
    assert np.array_equal(decode_image(response.data[0].b64_json), expected)


def test_zero_guidance_and_zero_strength(api, pipe):
    unguided = {**FAST, "guidance_scale": 1.0}
    expected = pipe(PROMPT, **unguided).images[0]
    result = api.images.generate(prompt=PROMPT, extra_body={**unguided, "guidance_scale": 0})
    assert np.array_equal(decode_image(result.data[0].b64_json), expected)
    expected = pipe(PROMPT, image=expected, strength=0.0, **FAST).images[0]
    start = _file(pipe(PROMPT, **unguided).images[0])
    again = api.images.edit(image=start, prompt=PROMPT, extra_body={**FAST, "strength": 0})
    assert np.array_equal(decode_image(again.data[0].b64_json), expected)


def test_edit_repaints_the_transparent_area(api, pipe):
    start = pipe("a green square on a white background", seed=1).images[0]
    mask = Image.new("RGBA", start.size, "black")
    mask.paste((0, 0, 0, 0), (0, 0, 64, 24))
    response = api.images.edit(
        image=_file(start),
        mask=_file(mask),
        prompt=PROMPT,
        extra_body={**FAST, "num_inference_steps": 10},
    )
    result = np.asarray(decode_image(response.data[0].b64_json), float)
    change = np.abs(result - np.asarray(start)).mean(axis=2)
    assert change[:20].mean() > 3 * change[32:].mean()
    mask.putalpha(128)  # nowhere fully transparent
    with pytest.raises(openai.BadRequestError, match="transparent"):
        api.images.edit(image=_file(start), mask=_file(mask), prompt=PROMPT, extra_body=FAST)


def _file(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return ("image.png", buffer.getvalue(), "image/png")


def test_stream_of_an_edit(api, pipe):
    start = pipe("a green square on a white background", seed=1).images[0]
    events = list(
        api.images.edit(
            image=_file(start), prompt=PROMPT, stream=True, partial_images=1, extra_body=FAST
        )
    )
    assert events[-1].type == "image_edit.completed"


def test_models(api):
    (model,) = api.models.list().data
    assert model.id == "shapes"
    assert model.sizes == ["64x64"]
    assert model.size_multiple == 16
    assert all("background" in prompt for prompt in model.prompt_examples)
    assert api.models.retrieve("shapes").id == "shapes"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("none")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"size": "500x512"}, "size"),
        ({"size": "64"}, "size"),
        ({"n": 11}, "n"),
        ({"response_format": "url"}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"),
        ({"extra_body": {"foo": 1}}, "foo"),
        ({"extra_body": {"scheduler": "Eulr"}}, None),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_body": {"progress": True}}, "stream"),
    ],
)
def test_invalid_fields_are_rejected_by_name(api, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        generate(api, **options)
    error = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_unknown_model_is_not_found(api):
    with pytest.raises(openai.NotFoundError, match="shapes"):
        api.images.generate(prompt=PROMPT, model="dall-e-3")


NUMBERS = (
    "n",
    "output_compression",
    "partial_images",
    "num_inference_steps",
    "guidance_scale",
    "feature_reuse",
    "output_reuse",
    "seed",
    "priority",
    "deadline_seconds",
)
VALUES = ("0", "-1", "1e9", str(2**63), "NaN", "Infinity", "true", '"7"', "1" * 5000, "1e999")


def test_invalid_numbers_are_rejected(server):
    allowed = {("seed", "0"), ("seed", str(2**63)), ("priority", "0"), ("priority", "-1")}
    allowed |= {("output_compression", "0"), ("partial_images", "0"), ("guidance_scale", "0")}
    with client(server) as http:
        for name in NUMBERS:
            for value in VALUES:
                kind = "webp" if name == "output_compression" else "png"
                steps = "" if name == "num_inference_steps" else '"num_inference_steps": 1,'
                body = f'{{"prompt": "x", "output_format": "{kind}", {steps} "{name}": {value}}}'
                response = http.post(
                    "/v1/images/generations",
                    content=body,
                    headers={"content-type": "application/json"},
                )
                if (name, value) in allowed:
                    assert response.status_code == 200, (name, value, response.text[:200])
                else:
                    assert response.status_code == 400, (name, value, response.text[:200])
                    assert response.json()["error"]["message"]
        assert http.get("/health/ready").status_code == 200


def test_request_over_the_work_limit_is_rejected(shapes):
    with run_server(shapes, max_work=64 * 64 * 30) as server, client(server) as http:
        ask = {"prompt": PROMPT, "n": 2, "num_inference_steps": 16}
        response = http.post("/v1/images/generations", json=ask)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "too_much_work"
        assert http.post("/v1/images/generations", json={**ask, "n": 1}).status_code == 200
        # A second pass of twice the size counts fourfold.
        hires = {"prompt": PROMPT, "num_inference_steps": 8, "hires_scale": 2.0}
        response = http.post("/v1/images/generations", json=hires)
        assert response.json()["error"]["code"] == "too_much_work"
        hires["hires_steps"] = 5
        body = http.post("/v1/images/generations", json=hires).json()
        assert body["size"] == "128x128"
        assert Image.open(BytesIO(base64.b64decode(body["data"][0]["b64_json"]))).size == (128, 128)


def test_an_image_that_would_hold_up_all_others_is_refused(shapes):
    ask = {"prompt": PROMPT, "num_inference_steps": 1}
    with run_server(shapes) as server, client(server) as http:
        for more in ({"size": "256x128"}, {"size": "128x64", "hires_scale": 2.0}):
            response = http.post("/v1/images/generations", json={**ask, **more})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, "size")
            assert "128x128" in error["message"] and "--max-size" in error["message"]
    with run_server(shapes, max_size=(256, 64)) as server, client(server) as http:
        for size, status in (("128x128", 200), ("256x128", 400)):
            response = http.post("/v1/images/generations", json={**ask, "size": size})
            assert response.status_code == status


def test_unmet_deadline_is_rejected_with_retry_after(api, server):
    with pytest.raises(openai.InternalServerError) as caught:
        generate(api, extra_body={"deadline_seconds": 0.0001, "num_inference_steps": 50})
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.body["code"] == "deadline"


def test_two_models(shapes):
    with run_server(shapes, ("shapes", "other")) as server, client(server) as http:
        listed = http.get("/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["shapes", "other"]
        for name, count in (("other", 2), ("shapes", 1), (None, 1)):
            body = {"prompt": PROMPT, "model": name, "n": count, "num_inference_steps": 1}
            assert http.post("/v1/images/generations", json=body).status_code == 200
        text = http.get("/metrics").text
    assert 'sdrt_picture_seconds_count{model="other"} 2.0' in text
    assert 'sdrt_picture_seconds_count{model="shapes"} 2.0' in text


def test_page_is_served(server):
    with client(server) as http:
        page = http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        module = http.get("/page/page.js")
        assert module.status_code == 200
        assert page.headers["cache-control"] == module.headers["cache-control"] == "no-cache"
        message = {"if-none-match": module.headers["etag"]}
        assert http.get("/page/page.js", headers=message).status_code == 304
        assert http.get("/page/%2e%2e/run.py").status_code == 404


def test_schema_names_every_endpoint(server):
    with client(server) as http:
        schema = http.get("/openapi.json").json()
    assert {"/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img"} <= set(
        schema["paths"]
    )
    form = schema["components"]["schemas"]["EditForm"]
    assert form["properties"]["image"]["format"] == "binary"
    assert json.dumps(schema)
