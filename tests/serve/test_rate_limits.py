"""Limits of API keys: of one key with a clock, and over HTTP with a real model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import PROMPT, api_keys, client, get_engine, run_server, wait_for

from sdrt.serve.api_keys import ApiKey, KeyLimits
from sdrt.serve.errors import ApiError
from sdrt.serve.rate_limits import KeyUsage

PATH = "/v1/images/generations"
FAST = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 1}
ONE = {"x-api-key": "one"}
MINUTES, DAYS = 60.0, 86_400.0


class Clock:
    def __init__(self):
        self.now = 20_000 * DAYS + 3600.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def limited(clock, **limits):
    return KeyUsage(ApiKey(b"", "alice", KeyLimits(**limits)), clock, clock)


def headers(usage):
    return {k.decode().removeprefix("x-ratelimit-"): v.decode() for k, v in usage.headers()}


def test_requests_of_any_minute_are_limited(clock):
    usage = limited(clock, requests_per_minute=2)
    usage.count_request()
    clock.now += 50.0
    usage.count_request()
    clock.now += 9.0
    with pytest.raises(ApiError) as refused:
        usage.count_request()
    assert (refused.value.status_code, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.retry_after == pytest.approx(1.0)
    assert "alice is limited to 2 requests per minute" in refused.value.message
    assert headers(usage) == {
        "limit-requests": "2",
        "remaining-requests": "0",
        "reset-requests": "51s",
    }
    clock.now += 1.0  # the first is a minute old, the second is not
    usage.count_request()
    with pytest.raises(ApiError):
        usage.count_request()
    clock.now += MINUTES
    assert headers(usage)["remaining-requests"] == "2"
    assert usage.requests == 3 and usage.refused["requests"] == 2


def test_work_of_a_day_is_limited_until_midnight(clock):
    usage = limited(clock, pixel_steps_per_day=100)
    usage.reserve(1, 60)
    with pytest.raises(ApiError) as refused:
        usage.reserve(1, 41)
    assert (refused.value.status_code, refused.value.code) == (429, "insufficient_quota")
    assert refused.value.retry_after == DAYS - 3600.0
    usage.reserve(1, 40)
    assert headers(usage)["remaining-pixel-steps"] == "0"
    assert headers(usage)["reset-pixel-steps"] == "82800s"
    clock.now += DAYS - 3601.0
    with pytest.raises(ApiError):
        usage.reserve(1, 1)
    clock.now += 1.0
    usage.reserve(1, 100)
    assert usage.total_pixel_steps == 200


def test_images_in_flight_are_limited(clock):
    usage = limited(clock, images_in_flight=3)
    usage.reserve(2, 10)
    with pytest.raises(ApiError) as refused:
        usage.reserve(2, 10)
    assert refused.value.status_code == 429 and refused.value.retry_after == 1.0
    usage.finish_image()
    usage.reserve(2, 10)
    assert headers(usage) == {"limit-images": "3", "remaining-images": "0"}


def test_what_is_not_accepted_is_refunded(clock):
    usage = limited(clock, images_in_flight=3, pixel_steps_per_day=100)
    usage.reserve(3, 100)
    usage.refund(3, 100)
    usage.reserve(3, 100)
    assert usage.images == 3 and usage.total_pixel_steps == 100


def test_requests_that_can_never_be_accepted_are_errors_of_the_client(clock):
    usage = limited(clock, images_in_flight=3, pixel_steps_per_day=100)
    for work in ((4, 1), (1, 101)):
        with pytest.raises(ApiError) as refused:
            usage.reserve(*work)
        assert refused.value.status_code == 400 and refused.value.code == "too_much_work"


def test_keys_without_limits_are_counted_only(clock):
    usage = limited(clock)
    for _ in range(1000):
        usage.count_request()
        usage.reserve(10, 10**12)
    assert headers(usage) == {} and usage.images == 10_000


def test_counts_hold_among_threads(clock):
    usage = limited(clock, images_in_flight=50, requests_per_minute=500)

    def work(_):
        for _ in range(200):
            try:
                usage.count_request()
                usage.reserve(7, 1)
            except ApiError:
                continue
            for _ in range(7):
                usage.finish_image()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert usage.requests == 500
    assert headers(usage)["remaining-images"] == "50"


def scrape(http, name):
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {tuple(s.labels.values()): s.value for s in samples if s.name == name}


@pytest.mark.integration
def test_a_rate_is_limited_for_one_key_and_not_for_another(shapes):
    keys = api_keys("one", requests_per_minute=2) + api_keys("two")
    with run_server(shapes, keys=keys) as server:
        one, two = (client(server, headers={"x-api-key": name}) for name in ("one", "two"))
        with one, two:
            first, second, third = (one.post(PATH, json=FAST) for _ in range(3))
            assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
            assert first.headers["x-ratelimit-limit-requests"] == "2"
            assert first.headers["x-ratelimit-remaining-requests"] == "1"
            assert 1 <= int(third.headers["retry-after"]) <= 60
            error = third.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            a1111 = one.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, "steps": 1})
            assert a1111.status_code == 429 and "requests per minute" in a1111.json()["detail"]
            assert one.get("/v1/models").status_code == 200  # no request for images
            other = two.post(PATH, json=FAST)
            assert other.status_code == 200 and "x-ratelimit-limit-requests" not in other.headers
            assert scrape(two, "sdrt_key_requests_total") == {("one",): 2.0, ("two",): 1.0}
            assert scrape(two, "sdrt_key_refused_total")["one", "requests"] == 2.0
            text = two.get("/metrics").text
        assert keys[0].digest.hex() not in text
        api = openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="one", max_retries=0
        )
        with pytest.raises(openai.RateLimitError, match="2 requests per minute"):
            api.images.generate(prompt=PROMPT)


@pytest.mark.integration
def test_images_in_flight_and_work_are_limited(shapes):
    quota = 64 * 64 * 1840
    keys = api_keys("one", images_in_flight=2, pixel_steps_per_day=quota)
    with run_server(shapes, keys=keys) as server, client(server, headers=ONE) as http:
        body = {**FAST, "num_inference_steps": 900, "n": 2}
        responses = []
        asking = threading.Thread(target=lambda: responses.append(http.post(PATH, json=body)))
        asking.start()
        wait_for(lambda: get_engine(server).unfinished())
        refused = http.post(PATH, json=FAST)
        assert refused.status_code == 429 and "2 images in flight" in refused.text
        assert refused.headers["x-ratelimit-remaining-images"] == "0"
        for handle in get_engine(server).unfinished():
            handle.cancel()
        asking.join()
        assert responses[0].json()["error"]["code"] == "cancelled"
        left = "x-ratelimit-remaining-images"
        wait_for(lambda: http.get("/v1/models").headers[left] == "2")
        # 1800 of 1840 steps are used, finished or not; a request that the engine refuses uses none.
        rejected = http.post(PATH, json={**FAST, "deadline_seconds": 1e-6})
        assert rejected.status_code == 503
        assert rejected.headers["x-ratelimit-remaining-pixel-steps"] == str(64 * 64 * 40)
        assert rejected.headers["x-ratelimit-remaining-images"] == "2"
        over = http.post(PATH, json={**FAST, "num_inference_steps": 41})
        assert over.status_code == 429 and over.json()["error"]["code"] == "insufficient_quota"
        assert over.headers["x-ratelimit-reset-pixel-steps"].endswith("s")
        assert http.post(PATH, json={**FAST, "num_inference_steps": 40}).status_code == 200
        too_many = http.post(PATH, json={**FAST, "n": 3})
        assert too_many.status_code == 400
        assert scrape(http, "sdrt_key_pixel_steps_total") == {("one",): float(quota)}
        assert scrape(http, "sdrt_key_images_total") == {("one",): 3.0}
