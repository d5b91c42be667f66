"""Jobs: submitted, polled, fetched, cancelled, and kept over a restart of the server."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from serving import PROMPT, api_keys, client, run_server, start_process, wait_for

from sdrt.errors import UsageError
from sdrt.serve.job_store import JobStore

pytestmark = pytest.mark.integration
BODY = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 3, "n": 2}
LONG = {"prompt": PROMPT, "num_inference_steps": 900}


@pytest.fixture(scope="module")
def server(shapes, tmp_path_factory):
    with run_server(shapes, jobs_folder=tmp_path_factory.mktemp("jobs")) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with client(server) as opened:
        yield opened


def submit(http, body=BODY, **headers):
    response = http.post("/v1/jobs", json=body, headers=headers)
    assert response.status_code in (200, 202), response.text
    return response.json()


def wait_for_end(http, job):
    last = {}

    def has_ended():
        last.update(http.get(f"/v1/jobs/{job['id']}").json())
        return last["completed_at"] is not None

    wait_for(has_ended, 60.0)
    return last


def test_a_job_gives_the_images_of_a_call(http, pipe):
    submitted = submit(http)
    assert submitted["object"] == "image.job" and submitted["status"] in ("queued", "in_progress")
    assert submitted["data"] == [] and submitted["expires_at"] is None
    job = wait_for_end(http, submitted)
    assert (job["status"], job["progress"], job["error"]) == ("completed", 100, None)
    assert job["expires_at"] == job["completed_at"] + 86_400
    expected = pipe(PROMPT, num_inference_steps=3, seed=3, num_images_per_prompt=2)
    for index, image in enumerate(expected.images):
        item = job["data"][index]
        response = http.get(item["url"])
        assert response.headers["content-type"] == "image/png" and item["seed"] == 3 + index
        stored = Image.open(BytesIO(response.content))
        assert np.array_equal(stored, image)
        assert stored.text["parameters"] == expected.parameters[index]
    assert http.get(f"/v1/jobs/{job['id']}/images/2").status_code == 404


def test_events_end_with_the_job(http):
    job = submit(http, {**BODY, "output_format": "webp"})
    with http.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        lines = [line for line in response.iter_lines() if line.startswith("data:")]
    last = json.loads(lines[-1].removeprefix("data:"))
    assert last["type"] == "job" and last["status"] == "completed"
    assert http.get(last["data"][0]["url"]).headers["content-type"] == "image/webp"


def test_a_repeated_request_is_the_same_job(http):
    first = submit(http, **{"Idempotency-Key": "a"})
    assert submit(http, **{"Idempotency-Key": "a"})["id"] == first["id"]
    with ThreadPoolExecutor(4) as pool:
        same = list(pool.map(lambda _: submit(http, **{"Idempotency-Key": "b"})["id"], range(4)))
    assert len(set(same)) == 1 and same[0] != first["id"]
    assert submit(http)["id"] != first["id"]
    changed = http.post("/v1/jobs", json={**BODY, "seed": 4}, headers={"Idempotency-Key": "a"})
    assert changed.status_code == 409
    assert changed.json()["error"]["code"] == "idempotency_key_reused"


def test_a_job_can_be_cancelled_and_deleted(http, server):
    job = submit(http, LONG)
    wait_for(lambda: http.get(f"/v1/jobs/{job['id']}").json()["progress"] > 0)
    assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "in_progress"
    cancelled = http.post(f"/v1/jobs/{job['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert http.post(f"/v1/jobs/{job['id']}/cancel").json() == cancelled
    folder = server.jobs.store.folder / job["id"]
    assert folder.exists()
    assert http.delete(f"/v1/jobs/{job['id']}").json()["deleted"] is True
    assert not folder.exists() and http.get(f"/v1/jobs/{job['id']}").status_code == 404


def test_jobs_are_listed_newest_first(http):
    ids = [submit(http)["id"] for _ in range(2)]
    listed = http.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in listed["data"]] == ids[::-1] and listed["has_more"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({**BODY, "stream": True}, "stream"),
        ({**BODY, "size": "63x64"}, "size"),
        ({**BODY, "steps": 3}, "steps"),
        ({**BODY, "controlnet": "canny"}, "control_image"),
    ],
)
def test_what_cannot_be_generated_is_no_job(http, server, body, word):
    before = len(server.jobs.store.jobs)
    response = http.post("/v1/jobs", json=body)
    assert response.status_code == 400 and word in response.json()["error"]["message"]
    assert len(server.jobs.store.jobs) == before


def test_a_failed_job_says_why(server, http, monkeypatch):
    monkeypatch.setattr("sdrt.serve.routes.jobs.encode_image_file", lambda *_: 1 / 0)
    job = wait_for_end(http, submit(http))
    assert job["status"] == "failed" and job["error"]["code"] == "internal_error"


def test_jobs_need_a_folder(shapes):
    with run_server(shapes) as running, client(running) as http:
        response = http.post("/v1/jobs", json=BODY)
    assert response.status_code == 400 and "--jobs" in response.json()["error"]["message"]


def test_keys_see_their_own_jobs(shapes, tmp_path):
    keys = api_keys("one", "two")
    with run_server(shapes, jobs_folder=tmp_path, keys=keys) as running, client(running) as http:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        job = submit(http, **one)
        path = f"/v1/jobs/{job['id']}"
        assert http.get(path, headers=one).status_code == 200
        assert http.get(path, headers=two).status_code == 404
        assert http.delete(path, headers=two).status_code == 404
        assert http.get("/v1/jobs", headers=two).json()["data"] == []


def test_ended_jobs_expire(tmp_path, http, server):
    job = wait_for_end(http, submit(http))
    store = server.jobs.store
    assert JobStore(store.folder, 0.0).keep_seconds == 0.0
    again = JobStore(tmp_path, 0.0)
    again.open()
    again.jobs = dict(store.jobs)
    assert again.find(job["id"], "") is None and again.owned_by("") == []
    assert store.find(job["id"], "")
    again.remove_expired()
    assert job["id"] not in again.jobs


def test_a_folder_serves_one_server(tmp_path):
    first, second = JobStore(tmp_path, 1.0), JobStore(tmp_path, 1.0)
    first.open()
    with pytest.raises(UsageError, match="another server"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_a_damaged_record_is_ignored(tmp_path, caplog):
    for name, text in (("job_a", "{"), ("job_b", "{}"), ("job_c", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(text)
    store = JobStore(tmp_path, 1.0)
    store.open()
    assert store.jobs == {} and len(caplog.records) == 3
    store.close()


def test_a_killed_server_loses_no_finished_job(shapes, tmp_path):
    """Jobs that were finished are there after SIGKILL; the others say that they were lost."""
    process, http = start_process(shapes, tmp_path)
    try:
        finished = wait_for_end(http, submit(http))
        image = http.get(finished["data"][0]["url"]).content
        lost = submit(http, LONG)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    process, http = start_process(shapes, tmp_path)
    try:
        assert http.get(f"/v1/jobs/{finished['id']}").json() == finished
        assert http.get(finished["data"][0]["url"]).content == image
        job = http.get(f"/v1/jobs/{lost['id']}").json()
        assert job["status"] == "failed" and job["error"]["code"] == "job_lost"
        shut_down = submit(http, BODY)
    finally:
        process.terminate()
        process.wait()
    store = JobStore(tmp_path, 60.0)
    store.open()
    assert store.jobs[shut_down["id"]].status == "completed"  # drained before it ended
    store.close()
