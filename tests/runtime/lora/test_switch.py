"""Prompts with LoRA tags in flight: each image is the one that its own set gives alone."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from lora_files import lora_file
from safetensors.torch import save_file

import sdrt
from sdrt.errors import BackendError, UsageError
from sdrt.runtime import LoraWeight
from sdrt.runtime.batching.engine import InflightBatcher

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"
OPTIONS = {"num_inference_steps": 3, "seed": 0, "guidance_scale": 2.0}
SECONDS = 60


@pytest.fixture(scope="module")
def folder(home, embedded):
    folder = home / "loras"
    folder.mkdir(exist_ok=True)
    lora_file(folder / "first.safetensors", embedded, "kohya")
    lora_file(folder / "second.safetensors", embedded, "peft", seed=1, strength=0.2)
    misfit = {"lora_unet_nowhere_to_q.lora_down.weight": torch.zeros(2, 8)}
    misfit |= {"lora_unet_nowhere_to_q.lora_up.weight": torch.zeros(8, 2)}
    save_file(misfit, folder / "misfit.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def loaded(shapes, folder):
    with sdrt.load(shapes, backend="onnxruntime") as pipe:
        yield pipe


@pytest.fixture
def lora_pipe(loaded):
    loaded.set_lora({})
    return loaded


def alone(pipe, loras, prompt=PROMPT, **options):
    """The image that a pipeline makes which carries these files and no others."""
    pipe.set_lora(loras)
    (image,) = pipe(prompt, **{**OPTIONS, **options}).images
    pipe.set_lora({})
    return image.tobytes()


def result(handle):
    return handle.future.result(SECONDS)


SETS = {
    "": {},
    " <lora:first:0.8>": {"first": 0.8},
    " <lora:second>": {"second": 1.0},
    " <lyco:first:-0.5>": {"first": -0.5},
    " <lora:first:1:0.2>": {"first": LoraWeight(1.0, 0.2)},
    "<lora:first:0.5> <lora:second:0.3>": {"first": 0.5, "second": 0.3},
    " <lora:first:0.5> <lora:FIRST:0.25>": {"first": 0.75},
}


@pytest.fixture(scope="module")
def expected(loaded):
    """The image of every set alone."""
    output = {tags: alone(loaded, loras) for tags, loras in SETS.items()}
    assert len(set(output.values())) == len(SETS)
    return output


@pytest.mark.slow
def test_a_stream_of_several_sets_from_several_threads(lora_pipe, expected):
    jobs = [*SETS] * 3

    def ask(tags):
        (handle,) = engine.submit(PROMPT + tags, OPTIONS)
        return result(handle)

    with InflightBatcher(lora_pipe, rows=16) as engine, ThreadPoolExecutor(6) as pool:
        for tags, output in zip(jobs, pool.map(ask, jobs), strict=True):
            assert output.image.tobytes() == expected[tags], tags
            assert output.parameters.splitlines()[0] == PROMPT + tags


def test_prompts_of_one_call_have_each_its_own(lora_pipe, expected):
    prompts = [PROMPT + tags for tags in [*SETS][:4]]
    with InflightBatcher(lora_pipe, rows=16) as engine:
        handles = engine.submit(prompts, {**OPTIONS, "seed": [0] * len(prompts)})
        output = [result(handle) for handle in handles]
    for prompt, tags, item in zip(prompts, SETS, output, strict=False):
        assert item.image.tobytes() == expected[tags], prompt
        assert item.parameters.splitlines()[0] == prompt


def test_files_passed_with_the_prompt_and_those_that_the_pipeline_carries(lora_pipe, folder):
    together = alone(lora_pipe, {"first": 0.75, "second": 0.5})
    lora_pipe.set_lora({"first": 0.5})
    with InflightBatcher(lora_pipe, rows=16) as engine:
        (handle,) = engine.submit(f"{PROMPT} <lora:first:0.25>", OPTIONS, loras={"second": 0.5})
        output = result(handle)
        (handle,) = engine.submit(PROMPT, OPTIONS)
        bare = result(handle)
        path = folder / "second.safetensors"
        (handle,) = engine.submit(f"{PROMPT} <lora:first:-0.5>", OPTIONS, loras={path: 1.0})
        other = result(handle)
    assert output.image.tobytes() == together
    text = f"{PROMPT} <lora:first:0.25> <lora:second:0.5> <lora:first:0.5>"
    assert output.parameters.splitlines()[0] == text
    assert bare.image.tobytes() == alone(lora_pipe, {"first": 0.5})
    assert bare.parameters.splitlines()[0] == f"{PROMPT} <lora:first:0.5>"
    assert other.image.tobytes() == alone(lora_pipe, {"second": 1.0})


class Held:
    """The real UNet, which waits until it may go on."""

    def __init__(self, engine):
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, feeds):
        self.entered.set()
        assert self.open.wait(SECONDS)
        return self.engine(feeds)

    def close(self):
        pass


@pytest.fixture
def held(lora_pipe):
    """A pipeline and its UNet, which a test can hold up."""
    unet = Held(lora_pipe.engines["unet"])
    return replace(lora_pipe, engines={**lora_pipe.engines, "unet": unet}), unet


def busy(engine, unet, prompt=PROMPT):
    """A handle whose evaluation waits for `unet.open`."""
    unet.entered.clear()
    unet.open.clear()
    (handle,) = engine.submit(prompt, OPTIONS)
    assert unet.entered.wait(SECONDS)
    return handle


def test_who_comes_later_does_not_pass_one_of_another_set(held):
    pipe, unet = held
    with InflightBatcher(pipe, rows=16) as engine:
        busy(engine, unet, f"{PROMPT} <lora:first:1>")
        (other,) = engine.submit(f"{PROMPT} <lora:second:1>", OPTIONS)
        later = [engine.submit(f"{PROMPT} <lora:first:1>", OPTIONS)[0] for _ in range(4)]
        assert [handle.state for handle in (other, *later)] == ["waiting"] * 5
        unet.open.set()
        result(other)
        for handle in later:
            result(handle)
            assert other.times.decoded <= handle.times.started


def test_those_that_wait_for_one_set_take_one_change(held):
    pipe, unet = held
    with InflightBatcher(pipe, rows=16) as engine:
        busy(engine, unet)
        before = pipe.leases.changes
        handles = [
            engine.submit(f"{PROMPT} <lora:{name}:1>", OPTIONS)[0]
            for _ in range(4)
            for name in ("first", "second")
        ]
        unet.open.set()
        for handle in handles:
            result(handle)
        assert pipe.leases.changes - before == 2


def test_one_that_is_cancelled_while_it_waits_for_its_set(held):
    pipe, unet = held
    with InflightBatcher(pipe, rows=16) as engine:
        busy(engine, unet)
        (other,) = engine.submit(f"{PROMPT} <lora:second:1>", OPTIONS)
        (later,) = engine.submit(PROMPT, OPTIONS)
        other.cancel()
        unet.open.set()
        result(later)
        assert other.state == "cancelled"
        assert pipe.adapters.chosen == ()


def test_a_set_that_does_not_fit_fails_its_own_images_only(held):
    pipe, unet = held
    with InflightBatcher(pipe, rows=16) as engine:
        first = busy(engine, unet, f"{PROMPT} <lora:first:1>")
        prompts = [f"{PROMPT} <lora:misfit:1>", f"{PROMPT} <lora:first:1>"] * 2
        handles = engine.submit(prompts, {**OPTIONS, "seed": [0] * 4})
        unet.open.set()
        expected = result(first).image.tobytes()
        for handle in handles[::2]:
            with pytest.raises(UsageError, match="made for another architecture"):
                result(handle)
        for handle in handles[1::2]:
            assert result(handle).image.tobytes() == expected
    assert expected == alone(pipe, {"first": 1.0})


def test_a_backend_that_takes_no_other_weights_refuses_by_name(lora_pipe, monkeypatch):
    def refit(weights):
        if weights:
            raise BackendError("the plan of unet takes no other weights")

    with InflightBatcher(lora_pipe, rows=16) as engine:
        monkeypatch.setattr(lora_pipe.engines["unet"], "refit", refit)
        (handle,) = engine.submit(f"{PROMPT} <lora:first:1>", OPTIONS)
        with pytest.raises(UsageError, match="takes no other weights"):
            result(handle)
        (handle,) = engine.submit(PROMPT, OPTIONS)
        output = result(handle).image.tobytes()
    monkeypatch.undo()
    assert output == alone(lora_pipe, {})


@pytest.mark.rest
def test_a_pipeline_that_is_loaded_again_carries_the_set(shapes, lora_pipe):
    """The device breaks in the middle of an image, which goes on with the weights that it had."""
    expected = alone(lora_pipe, {"first": 1.0}, num_inference_steps=20)
    broken = threading.Event()

    class Breaking(Held):
        def __call__(self, feeds):
            if broken.is_set():
                raise BackendError("the device is lost")
            return super().__call__(feeds)

    unet = Breaking(lora_pipe.engines["unet"])
    pipe = replace(lora_pipe, engines={**lora_pipe.engines, "unet": unet})
    output = []

    def reload():
        output.append(sdrt.load(shapes, backend="onnxruntime"))
        return output[-1]

    with InflightBatcher(pipe, rows=2, reload=reload) as engine:  # one image a call
        options = {**OPTIONS, "num_inference_steps": 20}
        handles = [engine.submit(f"{PROMPT} <lora:first:1>", options)[0] for _ in range(2)]
        while not all(handle.state == "running" for handle in handles):
            time.sleep(0.001)
        broken.set()
        results = []
        for handle in handles:
            try:
                results.append(result(handle).image.tobytes())
            except BackendError:
                results.append(None)
        (again,) = engine.submit(f"{PROMPT} <lora:first:1>", options)
        assert result(again).image.tobytes() == expected
        assert output[-1].adapters.chosen
    assert sorted(results, key=bool) == [None, expected]


def test_a_file_that_was_written_again_is_read_again(lora_pipe, folder, embedded):
    path = folder / "trained.safetensors"
    with InflightBatcher(lora_pipe, rows=16) as engine:
        output = []
        for seed in range(2):
            lora_file(path, embedded, "kohya", seed=seed, rank=4 + seed)
            (handle,) = engine.submit(f"{PROMPT} <lora:trained:1>", OPTIONS)
            output.append(result(handle).image.tobytes())
        assert output[1] != output[0]
    assert output[1] == alone(lora_pipe, {"trained": 1.0})


@pytest.mark.rest
def test_what_others_make_the_pipeline_carry_meanwhile_stays(lora_pipe):
    with InflightBatcher(lora_pipe, rows=16) as engine:
        result(engine.submit(f"{PROMPT} <lora:first:1>", OPTIONS)[0])
        lora_pipe.set_lora({"second": 1.0})
        bare = result(engine.submit(PROMPT, OPTIONS)[0])
        both = result(engine.submit(f"{PROMPT} <lora:first:0.5>", OPTIONS)[0])
    assert bare.image.tobytes() == alone(lora_pipe, {"second": 1.0})
    assert both.image.tobytes() == alone(lora_pipe, {"second": 1.0, "first": 0.5})


def test_tags_are_text_where_the_weighting_syntax_is_off(lora_pipe):
    prompt, options = f"{PROMPT} <lora:nothere:1>", {**OPTIONS, "weighting": False}
    with InflightBatcher(lora_pipe, rows=16) as engine:
        output = result(engine.submit(prompt, options)[0])
    assert output.image.tobytes() == alone(lora_pipe, {}, prompt, weighting=False)
    assert output.parameters.splitlines()[0] == prompt


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (
            f"{PROMPT} <lora:frist:1>",
            {},
            r"no LoRA named 'frist' in .*loras\nhint: did you mean first",
        ),
        (f"{PROMPT} <lora:first:x>", {}, "not a number"),
        (f"{PROMPT} <hypernet:first:1>", {}, "hypernet"),
        (f"{PROMPT} <lora:first:6> <lora:first:6>", {}, "LoRA weight 12"),
        (PROMPT, {"negative_prompt": "<lora:first:1>"}, "in the negative prompt is not applied"),
    ],
)
def test_what_is_refused_is_refused_at_once(lora_pipe, prompt, options, message):
    with InflightBatcher(lora_pipe, rows=16) as engine, pytest.raises(UsageError, match=message):
        engine.submit(prompt, {**OPTIONS, **options})


def test_a_call_of_the_pipeline_says_what_to_do_instead(lora_pipe):
    for call in (lora_pipe, lambda *prompts, **options: list(lora_pipe.steps(*prompts, **options))):
        with pytest.raises(UsageError, match=r"pipe.set_lora\(\{'first': 0.8\}\)"):
            call(f"{PROMPT} <lora:first:0.8>", **OPTIONS)
    with pytest.raises(UsageError, match="kind 'hypernet'"):
        lora_pipe(f"{PROMPT} <hypernet:first:0.8>", **OPTIONS)
