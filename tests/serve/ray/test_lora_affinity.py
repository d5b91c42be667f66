"""Which replicas requests with LoRA files go to."""

import pytest
from lora_graphs import with_lora_graphs

from sdrt.bundle import open_bundle
from sdrt.serve.ray.lora_affinity import LoraAffinity, read_lora_tags, switches_weights

PATH = "/v1/images/generations"
A, B = "<lora:a:1>", "<lora:b:0.5>"


def test_tags_and_fields_of_the_same_files_are_equal():
    expected = A + B
    for fields in (
        {"prompt": "a cat <lora:a:1> <lora:b:0.5>"},
        {"prompt": "<lora:b:0.50> a dog <lyco:a>"},
        {"prompt": "<lora:a:1.0>", "loras": {"b": 0.5}},
        {"prompt": "", "loras": {"b": 0.5, "a": 1}},
    ):
        assert read_lora_tags(PATH, fields) == expected, fields
    assert read_lora_tags(PATH, {"prompt": "a cat <lora:a:0.9>", "loras": {"b": 0.5}}) != expected
    assert read_lora_tags("/sdapi/v1/txt2img", {"prompt": None, "steps": 4}) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "<lora:a:much>"},
        {"prompt": 5},
        {"prompt": ["<lora:a>"]},
        {"prompt": "", "loras": "a"},
        {"prompt": "", "loras": {"a": None}},
        {"prompt": "", "loras": {"a": 1e9}},
    ],
)
def test_invalid_requests_have_no_preference(fields):
    assert read_lora_tags(PATH, fields) is None


def test_what_generates_no_image_has_no_preference():
    assert read_lora_tags("/v1/tokens", {"prompt": "<lora:a:1>"}) is None


def test_replicas_that_carry_the_files_are_preferred():
    affinity = LoraAffinity(slots=2)
    idle = {"first": 0, "second": 0, "third": 0}
    affinity.record("first", "model", A)
    affinity.record("second", "model", B)
    assert affinity.find_preferred(idle, "model", A) == ["first"]
    assert affinity.find_preferred(idle, "model", B) == ["second"]
    assert affinity.find_preferred(idle, "model", A + B) == []
    assert affinity.find_preferred(idle, "model", "") == ["third"]  # carries none yet
    assert affinity.find_preferred(idle, "other", "") == [*idle]
    affinity.record("first", "model", B)
    assert affinity.find_preferred(idle, "model", A) == []
    assert affinity.find_preferred(idle, "model", B) == ["first", "second"]


def test_full_and_missing_replicas_are_not_preferred():
    affinity = LoraAffinity(slots=2)
    affinity.record("first", "model", A)
    assert affinity.find_preferred({"first": 1, "second": 0}, "model", A) == ["first"]
    assert affinity.find_preferred({"first": 2, "second": 0}, "model", A) == []
    assert affinity.find_preferred({"second": 0}, "model", A) == []


def test_replicas_that_are_gone_are_forgotten():
    affinity = LoraAffinity(slots=2)
    affinity.record("first", "model", A)
    affinity.forget_others(["second"])
    assert affinity.find_preferred({"first": 0}, "model", A) == []


def test_bundles_whose_rows_have_factors_switch_no_weights(shapes, tmp_path):
    assert switches_weights(None)
    assert switches_weights(open_bundle(shapes).manifest)
    assert not switches_weights(with_lora_graphs(shapes, tmp_path / "rows", 2).manifest)
