"""Ray Serve on this machine: two CPU replicas, real clients, one replica killed."""

import asyncio
import base64
import io
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("ray", reason="pip install 'sdrt[ray]', 450 MB with what it needs")
pytestmark = pytest.mark.slow
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
log = logging.getLogger("fleet")
PROMPT = "a red circle on a blue background"
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def cluster(home):
    """The address of an empty Ray Serve on this machine."""
    import ray
    from ray import serve

    port = free_port()
    ray.init(num_cpus=6, log_to_driver=False, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def deploy(cluster):
    """Deploys the application with options of `sdrt serve`; deleted after the test."""
    from ray import serve

    from sdrt.serve.ray.app import app

    def deployed(**options):
        arguments = {"backend": "onnxruntime", "replicas": "2", **options}
        serve.run(app(arguments), name="fleet")
        until(lambda: httpx.get(f"{cluster}/health/ready").status_code == 200)
        return cluster

    yield deployed
    serve.delete("fleet")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def until(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def replica_pids():
    """Process ids of the replicas, by Ray's process titles."""
    pids = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes()
        except OSError:
            continue
        if b"ServeReplica:fleet:Replica" in title:
            pids.add(int(path.parent.name))
    return pids


def samples(url, name):
    """[(labels, value)] of one figure."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text)
    return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


def replicas_in(url):
    return {labels["replica"] for labels, _ in samples(url, "process_resident_memory_bytes")}


def decode_image(base64_text):
    image = Image.open(io.BytesIO(base64.b64decode(base64_text)))
    image.load()
    assert image.size == (64, 64)
    return image


async def post(client, number, steps):
    """The outcome of one request of the real client: "image", or the code of a typed error."""
    import openai

    body = {"negative_prompt": "blurred", "num_inference_steps": steps, "seed": number}
    try:
        if number % 3:
            response = await client.images.generate(prompt=PROMPT, model="shapes", extra_body=body)
            decode_image(response.data[0].b64_json)
            return "image"
        stream = await client.images.generate(
            prompt=PROMPT, model="shapes", stream=True, partial_images=2, extra_body=body
        )
        kinds = [event async for event in stream]
        decode_image(kinds[-1].b64_json)
        assert kinds[-1].type == "image_generation.completed"
        return "image"
    except openai.APIStatusError as error:
        assert error.body["message"] and error.body["type"], error.body
        return error.body["code"]
    except openai.APIConnectionError:
        raise  # neither an image nor a typed error
    except openai.APIError as error:  # the last event of a stream
        assert error.body["message"] and error.body["type"], error.body
        return error.body["code"]


async def load(url, count, steps, meanwhile):
    """Many concurrent requests; `meanwhile` runs in a thread once they have started."""
    import openai

    limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(limits=limits, timeout=3000)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http
    ) as client:
        asking = [asyncio.create_task(post(client, i, steps)) for i in range(count)]
        await asyncio.sleep(1.0)
        assert not all(task.done() for task in asking)
        await asyncio.to_thread(meanwhile)
        return Counter(await asyncio.gather(*asking))


def test_killed_replica_loses_no_request(deploy, shapes):
    url = deploy(bundle=str(shapes), slots=8, waiting=64)
    before = replica_pids()
    assert len(before) == 2

    def kill():
        os.kill(min(before), signal.SIGKILL)

    outcomes = asyncio.run(load(url, 36, 100, kill))
    log.info("%s", dict(outcomes))
    assert outcomes.total() == 36
    # What had not begun to be answered was made elsewhere; streams that had say what happened.
    assert set(outcomes) <= {"image", "unavailable"}
    assert outcomes["unavailable"] <= 12
    until(lambda: len(replica_pids()) == 2 and len(replicas_in(url)) == 2)
    assert len(replica_pids() & before) == 1
    assert asyncio.run(load(url, 12, 100, lambda: None)) == {"image": 12}


def test_stream_of_a_killed_replica_ends_with_an_error(deploy, shapes):
    url = deploy(bundle=str(shapes))
    body = {"prompt": PROMPT, "num_inference_steps": 900, "stream": True, "progress": True}
    with httpx.stream("POST", f"{url}{PATH}", json=body, timeout=300) as response:
        lines = response.iter_lines()
        assert any("image_generation.progress" in line for line in lines)
        for pid in replica_pids():
            os.kill(pid, signal.SIGKILL)
        rest = [line for line in lines if line.startswith("data: ")]
    last = json.loads(rest[-1].removeprefix("data: "))
    assert (last["type"], last["error"]["code"]) == ("error", "unavailable")
    until(lambda: len(replica_pids()) == 2)


def with_sampler(bundle, folder, kind):
    """A copy of a bundle with another default sampler."""
    from dataclasses import replace

    from sdrt.bundle.integrity import describe_files
    from sdrt.bundle.manifest import json_from_manifest, manifest_from_json
    from sdrt.json_validation import read_json

    shutil.copytree(bundle, folder)
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": kind}))
    path = folder / "sdrt.json"
    manifest = manifest_from_json(read_json(path), path)
    path.write_text(json_from_manifest(replace(manifest, files=describe_files(folder))))
    return folder


def test_rolling_update_loses_no_request(deploy, shapes, tmp_path):
    url = deploy(bundle=str(shapes), slots=8)
    new = with_sampler(shapes, tmp_path / "new", "EulerDiscreteScheduler")
    before, updated = replica_pids(), []

    def texts():
        response = httpx.post(f"{url}{PATH}", json={"prompt": PROMPT}, timeout=300)
        return decode_image(response.json()["data"][0]["b64_json"]).text["parameters"]

    assert "Sampler: PLMS" in texts()

    def update():
        deploy(bundle=str(new), slots=8)
        updated.append(time.monotonic())

    async def ask_until_updated():
        outcomes = Counter()
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:

            async def ask():
                while not updated or time.monotonic() < updated[0] + 2.0:
                    response = await client.post(
                        PATH, json={"prompt": PROMPT, "num_inference_steps": 40}
                    )
                    outcomes[response.status_code] += 1

            await asyncio.gather(asyncio.to_thread(update), *(ask() for _ in range(8)))
        return outcomes

    outcomes = asyncio.run(ask_until_updated())
    log.info("%s", dict(outcomes))
    assert set(outcomes) == {200}
    assert outcomes[200] > 20
    until(lambda: len(replica_pids()) == 2 and not replica_pids() & before)
    assert "Sampler: Euler" in texts()


def test_requests_are_routed_to_loaded_models(deploy, shapes, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(shapes, other)
    path = other / "sdrt.json"
    path.write_text(path.read_text().replace('"name": "shapes"', '"name": "other"'))
    url = deploy(bundle=[str(shapes), str(other)], models_per_replica=1)

    def ask(model):
        body = {"prompt": PROMPT, "model": model, "num_inference_steps": 5}
        response = httpx.post(f"{url}{PATH}", json=body, timeout=300)
        assert response.status_code == 200, response.text

    def image_counts():
        return {
            (labels["replica"], labels["model"]): value
            for labels, value in samples(url, "sdrt_pictures_total")
        }

    ask("other")
    time.sleep(3.0)  # Ray hears of it
    before = image_counts()
    for _ in range(8):
        ask("other")
        ask("shapes")
    grown = {key: value - before.get(key, 0.0) for key, value in image_counts().items()}
    homes = [(replica, model) for (replica, model), count in grown.items() if count]
    assert sorted(model for _, model in homes) == ["other", "shapes"], grown
    assert len({replica for replica, _ in homes}) == 2, grown
    assert httpx.get(f"{url}/v1/models/other").json()["state"] == "ready"
    models = httpx.get(f"{url}/v1/models").json()["data"]
    assert {one["id"]: one["state"] for one in models} == {"shapes": "ready", "other": "ready"}


def test_requests_are_routed_by_lora_files(deploy, shapes, home, embedded):
    from lora_files import lora_file

    (home / "loras").mkdir()
    lora_file(home / "loras" / "style.safetensors", embedded, "kohya")
    url = deploy(bundle=str(shapes))

    def image_counts():
        return {labels["replica"]: value for labels, value in samples(url, "sdrt_pictures_total")}

    def ask(prompt):
        """The replica that generates the image."""
        before = image_counts()
        body = {"prompt": prompt, "num_inference_steps": 2}
        response = httpx.post(f"{url}{PATH}", json=body, timeout=300)
        assert response.status_code == 200, response.text
        (replica,) = (r for r, n in image_counts().items() if n > before.get(r, 0.0))
        return replica

    replicas = {prompt: [] for prompt in (f"{PROMPT} <lora:style:0.8>", PROMPT)}
    for _ in range(6):
        for prompt, served_by in replicas.items():
            served_by.append(ask(prompt))
    with_file, without = map(set, replicas.values())
    assert len(with_file) == len(without) == 1 and with_file != without, replicas


def test_api_equals_that_of_a_single_server(deploy, shapes, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    url = deploy(bundle=str(shapes), keys=str(keys))
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/health/live").json() == {"status": "live"}
    with httpx.Client(base_url=url, headers={"x-api-key": "one"}, timeout=300) as http:
        wrong = http.post(PATH, json={"prompt": "x", "model": "none"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
        wrong = http.post(PATH, json={"prompt": "x", "stesp": 3})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "unknown_parameter")
        invalid = http.post(PATH, content=b"{", headers={"content-type": "application/json"})
        assert invalid.status_code == 400
        assert http.post(PATH, content=b"x" * 40_000_000).status_code == 413
        late = http.post(PATH, json={"prompt": "x", "deadline_seconds": 1e-6})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline")
        assert int(late.headers["retry-after"]) >= 1

        # Events come as they are made, and a client that leaves frees its slot.
        body = {"prompt": PROMPT, "num_inference_steps": 900, "stream": True, "progress": True}
        with http.stream("POST", PATH, json=body) as response:
            lines = itertools.islice(response.iter_lines(), 1500)
            times = [time.monotonic() for _ in lines]
        assert times[-1] - times[0] > 0.1
        until(lambda: all(value == 0 for _, value in _running(http)))
        ended = [(labels["state"], value) for labels, value in _of(http, "sdrt_pictures_total")]
        assert ("cancelled", 1.0) in ended

        # Another's key does not interrupt; one's own does, whichever replica works.
        with httpx.Client(base_url=url, headers={"x-api-key": "two"}) as other_client:
            assert asyncio.run(_interrupted(url, http, other_client)) == [0]


async def _interrupted(url, http, other_client):
    """The number of images in the response to an interrupted request."""
    async with httpx.AsyncClient(base_url=url, headers=http.headers, timeout=300) as client:
        asking = asyncio.create_task(
            client.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": 900})
        )
        await asyncio.to_thread(
            until, lambda: 0.0 < http.get("/sdapi/v1/progress").json()["progress"] < 1.0
        )
        assert other_client.get("/sdapi/v1/progress").json()["progress"] == 0.0
        other_client.post("/sdapi/v1/interrupt")
        await asyncio.sleep(0.3)
        assert 0.0 < http.get("/sdapi/v1/progress").json()["progress"] < 1.0
        assert not asking.done()
        http.post("/sdapi/v1/interrupt")
        response = await asking
        assert response.status_code == 200, response.text
        return [len(response.json()["images"])]


def _of(http, name):
    families = text_string_to_metric_families(http.get("/metrics").text)
    return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


def _running(http):
    return _of(http, "sdrt_running")


def test_replica_with_a_broken_engine_is_replaced(cluster, shapes, tmp_path):
    from ray import serve

    from sdrt.serve.model_manager import ModelSource
    from sdrt.serve.ray.app import RayOptions, build_application
    from sdrt.serve.settings import Settings

    flag = tmp_path / "broken"  # holds the process whose device fails

    def breakable():
        import os

        import sdrt

        pipe = sdrt.load(shapes, backend="onnxruntime")
        unet = pipe.engines["unet"]

        class Breakable:
            inputs, outputs = unet.inputs, unet.outputs

            def __call__(self, feeds):
                if flag.exists() and flag.read_text() == str(os.getpid()):
                    raise sdrt.BackendError("the device fell off")
                return unet(feeds)

            def close(self):
                unet.close()

        pipe.engines["unet"] = Breakable()
        return pipe

    serve.run(
        build_application(
            {"shapes": ModelSource(breakable)}, Settings(), RayOptions((2, 2), 1, 0.0)
        ),
        name="fleet",
    )
    broken = min(replica_pids())
    flag.write_text(str(broken))
    codes = Counter()

    def replaced():
        response = httpx.post(f"{cluster}{PATH}", json={"prompt": PROMPT}, timeout=300)
        codes[response.status_code, response.json().get("error", {}).get("code")] += 1
        return broken not in replica_pids() and len(replica_pids()) == 2

    until(replaced, 120.0)
    log.info("%s", dict(codes))
    assert set(codes) <= {(200, None), (500, "engine_error"), (503, "broken")}
    assert codes[500, "engine_error"] >= 1
    assert codes[200, None] > 3 * codes[503, "broken"]  # the other one takes what it refuses
    assert httpx.get(f"{cluster}/health/ready").status_code == 200
    serve.delete("fleet")


def test_command_serves_until_terminated(shapes, tmp_path):
    port = free_port()
    words = ["--bundle", shapes, "--backend", "onnxruntime", "--port", str(port)]
    log_file = tmp_path / "log"
    with log_file.open("w") as stderr:
        command = [sys.executable, "-m", "sdrt", "serve", "--ray", *words]
        process = subprocess.Popen(command, stderr=stderr)
    url, responses = f"http://127.0.0.1:{port}", []
    until(lambda: "Listening on" in log_file.read_text())  # signals are handled from here on
    assert httpx.get(f"{url}/health/ready").status_code == 200
    body = {"prompt": PROMPT, "num_inference_steps": 900}
    asking = threading.Thread(
        target=lambda: responses.append(httpx.post(f"{url}{PATH}", json=body, timeout=300))
    )
    asking.start()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    asking.join()
    assert responses[0].status_code == 200  # what was begun was finished
    decode_image(responses[0].json()["data"][0]["b64_json"])
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    "options",
    [{"replicas": "0"}, {"replicas": "3:2"}, {"replicas": "x"}, {"models_per_replica": 0}]
    + [{"none": 1}, {"slots": "many"}, {"host": "0.0.0.0"}],
)
def test_invalid_options(shapes, options, capfd):
    from sdrt.errors import UsageError
    from sdrt.serve.ray.app import app

    with pytest.raises(UsageError):
        app({"bundle": str(shapes), **options})


def test_queued_requests_add_a_replica(deploy, shapes):
    url = deploy(bundle=str(shapes), slots=2, replicas="1:2")
    assert len(replicas_in(url)) == 1

    async def asked_for(seconds):
        end = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:

            async def ask():
                while time.monotonic() < end and len(replica_pids()) < 2:
                    response = await client.post(PATH, json={"prompt": PROMPT})
                    assert response.status_code == 200

            await asyncio.gather(*(ask() for _ in range(10)))

    asyncio.run(asked_for(60.0))
    until(lambda: len(replicas_in(url)) == 2)
