"""Several models under a memory budget, over HTTP: each is loaded on first use, none is lost."""

import base64
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serving import PROMPT, client, get_engine, run_sources, wait_for

import sdrt
from sdrt.errors import BackendError, UsageError
from sdrt.runtime.images import parse_parameters, read_parameters
from sdrt.serve.model_manager import ModelSource
from sdrt.serve.settings import Settings

pytestmark = pytest.mark.integration

PATH = "/v1/images/generations"
# One model under three names: the scheduler shows in the image and in its parameters.
SAMPLERS = {"one": "Euler", "two": "DDIM", "three": "DPM++ 2M"}
SIZE = 200_000_000  # estimated, above what loading the embedded model takes
FAST = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 7}
ONE, TWO = {"memory_budget": SIZE}, {"memory_budget": 2 * SIZE}


@pytest.fixture
def sources(shapes):
    def load(sampler):
        return sdrt.load(shapes, backend="onnxruntime").with_scheduler(sampler)

    manifest = sdrt.bundle.open_bundle(shapes).manifest
    return {
        name: ModelSource(lambda sampler=sampler: load(sampler), None, manifest, SIZE)
        for name, sampler in SAMPLERS.items()
    }


@pytest.fixture(scope="module")
def expected(pipe):
    return {
        name: np.asarray(
            pipe.with_scheduler(sampler)(PROMPT, num_inference_steps=3, seed=7).images[0], int
        )
        for name, sampler in SAMPLERS.items()
    }


def decode_image(response):
    return Image.open(BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))


def check_image(response, name, expected):
    """The image is that of this model and not of another one."""
    assert response.status_code == 200, response.text
    image = decode_image(response)
    assert parse_parameters(read_parameters(image))["Sampler"].startswith(SAMPLERS[name])
    errors = {other: np.abs(np.asarray(image, int) - expected[other]).mean() for other in expected}
    assert min(errors, key=errors.get) == name and errors[name] < 0.1


def scrape(http, sample_name):
    """{model: value} of a metric."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {s.labels["model"]: s.value for s in samples if s.name == sample_name}


def describe(http):
    return {model["id"]: model for model in http.get("/v1/models").json()["data"]}


@pytest.mark.parametrize("budget", [ONE, TWO], ids=["for one model", "for two"])
def test_interleaved_requests_for_three_models_are_all_answered(sources, expected, budget):
    """From six threads, streamed and not: each gets the image of its model."""
    names = [name for _ in range(4) for name in SAMPLERS] * 2
    with run_sources(sources, **budget) as server, client(server) as http:

        def ask(name):
            return name, http.post(PATH, json={**FAST, "model": name})

        with ThreadPoolExecutor(6) as pool:
            for name, response in pool.map(ask, names):
                check_image(response, name, expected)
        loads, evictions = (scrape(http, f"sdrt_model_{k}_total") for k in ("loads", "evictions"))
        loaded = scrape(http, "sdrt_model_loaded")
        assert min(loads.values()) >= 1 and sum(evictions.values()) >= 1
        assert sum(loaded.values()) <= budget["memory_budget"] // SIZE
        for name, model in describe(http).items():
            assert (model["loads"], model["evictions"]) == (loads[name], evictions[name])
            assert model["loaded"] == loaded[name] == loads[name] - evictions[name]


def test_models_are_loaded_on_first_use_and_described_before(sources):
    with run_sources(sources, **TWO) as server, client(server) as http:
        assert http.get("/health/ready").json()["status"] == "ready"
        described = describe(http)
        assert {model["state"] for model in described.values()} == {"unloaded"}
        assert {(*model["sizes"], model["size_multiple"]) for model in described.values()} == {
            ("64x64", 16)
        }
        assert http.post(PATH, json={**FAST, "model": "two"}).status_code == 200
        described = describe(http)
        assert [name for name, model in described.items() if model["loaded"]] == ["two"]
        assert described["two"]["state"] == "ready" and described["two"]["memory_bytes"] == SIZE
        assert http.post(PATH, json={**FAST, "model": "four"}).status_code == 404


def test_pinned_models_are_loaded_at_start_and_stay(sources):
    with run_sources(sources, **TWO, pinned_models=("two",)) as server, client(server) as http:
        assert [name for name, model in describe(http).items() if model["loaded"]] == ["two"]
        for name in ("one", "three", "one"):
            assert http.post(PATH, json={**FAST, "model": name}).status_code == 200
        described = describe(http)
        assert described["two"]["pinned"] and described["two"]["loads"] == 1
        assert described["two"]["evictions"] == 0 and described["one"]["loads"] == 2


def test_a_switch_waits_for_running_images_and_streams(sources, expected):
    with run_sources(sources, **ONE) as server, client(server) as http:
        responses = {}

        def ask(name, **fields):
            responses[name] = http.post(PATH, json={**FAST, "model": name, **fields})

        def follow():
            body = {**FAST, "model": "one", "num_inference_steps": 150, "stream": True}
            responses["stream"] = http.post(PATH, json=body)

        threads = [threading.Thread(target=follow)]
        threads[0].start()
        wait_for(lambda: describe(http)["one"]["loaded"] and get_engine(server).unfinished())
        threads.append(threading.Thread(target=ask, args=("two",)))
        threads[1].start()
        wait_for(lambda: describe(http)["one"]["state"] == "evicting")
        assert http.get("/health/ready").status_code == 200
        threads.append(threading.Thread(target=ask, args=("one",)))
        threads[2].start()
        for thread in threads:
            thread.join()
        assert "image_generation.completed" in responses["stream"].text
        for name in ("one", "two"):
            check_image(responses[name], name, expected)
        assert describe(http)["one"]["loads"] == 2


def test_who_waits_too_long_for_a_model_gets_503(sources):
    limits = {**ONE, "load_timeout_seconds": 0.2, "waiting": 1}
    with run_sources(sources, **limits) as server, client(server) as http:
        wait_for(lambda: http.post(PATH, json={**FAST, "model": "one"}).status_code == 200)
        body = {**FAST, "model": "one", "num_inference_steps": 500}
        long = threading.Thread(target=http.post, args=[PATH], kwargs={"json": body})
        long.start()
        wait_for(lambda: get_engine(server).unfinished())
        refused = http.post(PATH, json={**FAST, "model": "two"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
        assert "model two was not loaded within" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        # Nobody waits for its room any more.
        assert http.post(PATH, json={**FAST, "model": "one"}).status_code == 200
        for handle in get_engine(server).unfinished():
            handle.cancel()
        long.join()
        refused = scrape(http, "sdrt_refused_total")
        assert refused["two"] == 1


def test_a_model_that_fails_to_load_does_not_stop_the_others(sources):
    def fail():
        raise BackendError("no such device")

    sources["two"] = ModelSource(fail, None, None, SIZE)
    with run_sources(sources, **ONE) as server, client(server) as http:
        failed = http.post(PATH, json={**FAST, "model": "two"})
        assert failed.status_code == 500 and "no such device" in failed.json()["error"]["message"]
        assert http.post(PATH, json={**FAST, "model": "one"}).status_code == 200
        assert http.get("/health/ready").status_code == 200


def test_a1111_clients_choose_unload_and_reload_models(sources):
    with run_sources(sources, **TWO, pinned_models=("one",)) as server, client(server) as http:
        for name in ("three", "two"):
            options = {"sd_model_checkpoint": name}
            assert http.post("/sdapi/v1/options", json=options).status_code == 200
            body = {"prompt": PROMPT, "steps": 1}
            info = http.post("/sdapi/v1/txt2img", json=body).json()["info"]
            assert f'"sd_model_name": "{name}"' in info
        assert not describe(http)["three"]["loaded"]
        assert http.post("/sdapi/v1/unload-checkpoint").status_code == 200
        assert not describe(http)["two"]["loaded"]
        assert http.post("/sdapi/v1/reload-checkpoint").status_code == 200
        assert describe(http)["two"]["loaded"] and describe(http)["two"]["loads"] == 2
        assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "one"}).is_success
        refused = http.post("/sdapi/v1/unload-checkpoint")
        assert refused.status_code == 400 and "pinned" in refused.json()["detail"]


def test_jobs_keep_their_model_loaded(sources, tmp_path):
    with run_sources(sources, **ONE, jobs_folder=tmp_path) as server, client(server) as http:
        bodies = [{**FAST, "model": name, "num_inference_steps": 30} for name in SAMPLERS]
        jobs = [http.post("/v1/jobs", json=body).json() for body in bodies]

        def has_ended(job):
            return http.get(f"/v1/jobs/{job['id']}").json()["status"] not in (
                "queued",
                "in_progress",
            )

        wait_for(lambda: all(map(has_ended, jobs)))
        statuses = [http.get(f"/v1/jobs/{job['id']}").json()["status"] for job in jobs]
        assert statuses == ["completed"] * 3


def test_a_budget_that_no_model_fits_is_refused_at_start(sources):
    from sdrt.serve.app import create_app

    with pytest.raises(UsageError, match=r"model one needs 200 MB; the memory budget is 200 MB"):
        create_app(sources, Settings(memory_budget=SIZE - 1))
