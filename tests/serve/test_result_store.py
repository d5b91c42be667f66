"""Images of jobs in a bucket, of moto's server of S3, and the bounds of what jobs occupy."""

import boto3
import httpx
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from serving import PROMPT, client, run_server, wait_for

from sdrt.errors import StorageError, UsageError
from sdrt.serve.job_store import COMPLETED, JobStore, StoredJob
from sdrt.serve.result_store import open_s3_results

pytestmark = pytest.mark.integration
BODY = {"prompt": PROMPT, "num_inference_steps": 1, "seed": 3, "n": 2, "output_format": "webp"}
URL = "s3://images/of/jobs"


@pytest.fixture
def s3(monkeypatch):
    """A server of S3 with a bucket, and a client for it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    opened = boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"])
    opened.create_bucket(Bucket="images")
    yield opened
    httpx.post(f"{variables['AWS_ENDPOINT_URL']}/moto-api/reset")
    server.stop()


def names(s3):
    return sorted(item["Key"] for item in s3.list_objects_v2(Bucket="images").get("Contents", ()))


def wait_for_job(http):
    job = http.post("/v1/jobs", json=BODY).json()
    path = f"/v1/jobs/{job['id']}"
    wait_for(lambda: http.get(path).json()["completed_at"], 60.0)
    return http.get(path).json()


def test_images_are_objects_of_the_bucket(shapes, tmp_path, s3):
    settings = {"jobs_folder": tmp_path, "results_url": URL}
    with run_server(shapes, **settings) as running, client(running) as http:
        job = wait_for_job(http)
        assert job["status"] == "completed"
        keys = [f"of/jobs/{job['id']}/{i}.webp" for i in range(2)]
        assert names(s3) == keys
        assert [path.name for path in (tmp_path / job["id"]).iterdir()] == ["job.json"]
        for key, item in zip(keys, job["data"], strict=True):
            stored = s3.get_object(Bucket="images", Key=key)
            content = stored["Body"].read()
            assert content[8:12] == b"WEBP" and stored["ContentType"] == "image/webp"
            assert http.get(item["url"]).content == content
            presigned = httpx.get(item["presigned_url"])
            assert presigned.content == content and "X-Amz-Signature" in item["presigned_url"]
        s3.delete_object(Bucket="images", Key=keys[1])
        missing = http.get(job["data"][1]["url"])
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "image_not_found"
        assert http.delete(f"/v1/jobs/{job['id']}").json()["deleted"]
        assert names(s3) == []


def test_a_url_that_cannot_be_signed_is_left_out(tmp_path, s3, monkeypatch, caplog):
    def fail(*_):
        raise StorageError("no credentials")

    store = JobStore(tmp_path, 60.0, results=open_s3_results(URL))
    store.open()
    complete(store, "job_1", [b"image"])
    assert "X-Amz-Signature" in store.presign_image(store.jobs["job_1"], 0)
    monkeypatch.setattr("sdrt.serve.result_store.S3Results.presign", fail)
    assert store.presign_image(store.jobs["job_1"], 0) is None
    assert "no credentials" in caplog.text
    store.close()


def test_a_store_that_fails_fails_the_job(shapes, tmp_path, s3):
    settings = {"jobs_folder": tmp_path, "results_url": URL}
    with run_server(shapes, **settings) as running, client(running) as http:
        s3.delete_bucket(Bucket="images")
        job = wait_for_job(http)
        assert job["status"] == "failed" and job["data"] == []
        assert job["error"]["code"] == "storage_error"
        assert "secret" not in job["error"]["message"]


def test_expired_jobs_leave_no_object(tmp_path, s3):
    store = JobStore(tmp_path, 0.0, results=open_s3_results(URL))
    store.open()
    complete(store, "job_1", [b"image"])
    store.remove_expired()
    assert store.jobs == {} and names(s3) == []
    store.close()


def test_a_bucket_is_tried_before_anything_runs(s3, monkeypatch):
    with pytest.raises(UsageError, match="cannot write to s3://other") as caught:
        open_s3_results("s3://other")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.hint)
    for url in ("images", "s3://", "https://images", "s3://images?x=1"):
        with pytest.raises(UsageError, match="s3://BUCKET"):
            open_s3_results(url)
    results = open_s3_results("s3://images")
    with pytest.raises(FileNotFoundError):
        results.read("job_1", "0.png")
    s3.delete_bucket(Bucket="images")
    with pytest.raises(StorageError):
        results.write("job_1", "0.png", b"", "image/png")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UsageError, match="cannot write"):
        open_s3_results("s3://images")


def complete(store, job_id, images):
    about = {"owner": "", "model": "m", "digest": "", "idempotency_key": None, "size": "8x8"}
    job = StoredJob(job_id, output_format="png", created_at=1.0, **about)
    store.add(job)
    store.complete(job, images, [0] * len(images))


def test_the_oldest_jobs_make_room_for_new_ones(tmp_path):
    store = JobStore(tmp_path, 60.0, max_bytes=100)
    store.open()
    image = np.random.default_rng(0).bytes(40)
    for job_id in ("job_1", "job_2", "job_3"):
        complete(store, job_id, [image])
    assert sorted(store.jobs) == ["job_2", "job_3"]
    assert not (tmp_path / "job_1").exists()
    assert store.read_image(store.jobs["job_3"], 0) == image
    complete(store, "job_4", [image * 10])
    assert sorted(store.jobs) == ["job_4"]  # the newest stays, however large
    store.close()
    reopened = JobStore(tmp_path, 60.0, max_bytes=100)
    reopened.open()
    assert reopened.jobs["job_4"].size_bytes == 400
    reopened.close()


def test_records_of_earlier_versions_are_read(tmp_path):
    store = JobStore(tmp_path, 60.0)
    store.open()
    complete(store, "job_1", [b"image"])
    store.close()
    path = tmp_path / "job_1" / "job.json"
    lines = path.read_text().splitlines()
    old = [line for line in lines if '"size_bytes"' not in line and '"delivery"' not in line]
    path.write_text("\n".join(old).replace(",\n}", "\n}"))
    again = JobStore(tmp_path, 60.0)
    again.open()
    assert again.jobs["job_1"].status == COMPLETED and again.jobs["job_1"].size_bytes == 0
    again.close()
