"""Images in flight, on the embedded model: who shares a call, and that nobody notices."""

import asyncio
import gc
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.errors import BackendError, DeviceLostError, SdrtError, UsageError
from sdrt.runtime.batching import cost_model
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.batching.request import RequestCancelled, RequestRejected
from sdrt.runtime.denoising import DenoisingState

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"
SECONDS = 60


class Watched:
    """The real UNet, which records what it was fed, and waits or fails on
    request.
    """

    def __init__(self, engine):
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.calls, self.fails, self.error = [], 0, BackendError
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def __call__(self, feeds):
        self.entered.set()
        assert self.open.wait(SECONDS)
        self.calls.append(np.array(feeds.get("timestep", ())))
        if self.fails:
            self.fails -= 1
            raise self.error("the device is lost")
        return self.engine(feeds)

    def close(self):
        pass


@pytest.fixture
def watched(pipe):
    unet = Watched(pipe.engines["unet"])
    return replace(pipe, engines={**pipe.engines, "unet": unet}), unet


def started(pipe, **options):
    return InflightBatcher(pipe, **{"rows": 16, **options})


def pixels(image):
    return np.asarray(image)


def result(handle):
    return handle.future.result(SECONDS)


def held(engine, unet, **options):
    """A long image whose next evaluation waits until `unet.open` is set again."""
    unet.entered.clear()
    unet.open.clear()
    (handle,) = engine.submit(PROMPT, {"num_inference_steps": 30, "seed": 0, **options})
    assert unet.entered.wait(SECONDS)
    return handle


def wait_for(condition):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_images_of_other_samplers_steps_and_guidance_share_calls_and_keep_their_bytes(watched):
    pipe, unet = watched
    sketch = Image.new("RGB", (64, 64), "orange")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    jobs = [
        (PROMPT, {"num_inference_steps": 12, "guidance_scale": 7.5}, "DPM++ 2M Karras"),
        ("a white cross", {"num_inference_steps": 20, "guidance_scale": 1.0}, "Euler a"),
        ("a square", {"num_inference_steps": 5, "guidance_interval": (0.2, 0.8)}, "Heun"),
        ("a black ring", {"num_inference_steps": 9, "image": sketch, "mask_image": mask}, None),
        (PROMPT, {"num_inference_steps": 6, "guidance_rescale": 0.7, "rng": "cuda"}, "UniPC"),
    ]
    with started(pipe) as engine:
        first = held(engine, unet)
        handles = [
            engine.submit(prompt, {**options, "seed": i}, scheduler=sampler)[0]
            for i, (prompt, options, sampler) in enumerate(jobs)
        ]
        wait_for(lambda: all(handle.state == "running" for handle in handles))
        unet.open.set()
        output = [result(handle) for handle in handles]
        result(first)
    shared = [set(call) for call in unet.calls if len(call) >= 8]
    assert max(len(timesteps) for timesteps in shared) >= 5  # each at a timestep of its own
    for i, (prompt, options, sampler) in enumerate(jobs):
        alone = (pipe.with_scheduler(sampler) if sampler else pipe)(prompt, **options, seed=i)
        assert (pixels(output[i].image) == pixels(alone.images[0])).all(), sampler
        assert output[i].parameters == alone.parameters[0]


def test_one_call_makes_all_its_images(pipe):
    with started(pipe) as engine:
        prompts = [PROMPT, "a white cross"]
        options = {"num_images_per_prompt": 2, "num_inference_steps": 3, "seed": 5}
        handles = engine.submit(prompts, options)
        output = [result(handle) for handle in handles]
    expected = pipe(prompts, **options)
    assert [item.seed for item in output] == expected.seeds == [5, 6, 7, 8]
    for item, image in zip(output, expected.images, strict=True):
        assert (pixels(item.image) == pixels(image)).all()


def test_a_newcomer_joins_at_the_next_evaluation_and_leaves_after_its_last(watched):
    pipe, unet = watched
    with started(pipe) as engine:
        long = held(engine, unet)
        options = {"num_inference_steps": 2, "guidance_scale": 1.0}
        (short,) = engine.submit("a square", options, scheduler="Euler")
        wait_for(lambda: short.state == "running")
        before = len(unet.calls)
        unet.open.set()
        result(long)
        assert short.times.decoded < long.times.decoded
    rows = [len(call) for call in unet.calls[before:]]
    assert rows[0] == 2 and rows[1:3] == [3, 3] and set(rows[3:]) == {2}


def test_the_loop_goes_on_while_an_image_is_decoded(pipe, watched):
    own, _ = watched
    gate = threading.Event()

    class Slow(Watched):
        def __call__(self, feeds):
            assert gate.wait(SECONDS)
            return self.engine(feeds)

    own = replace(own, engines={**own.engines, "vae_decoder": Slow(pipe.engines["vae_decoder"])})
    gate.set()
    with started(own) as engine:
        gate.clear()
        (short,) = engine.submit(PROMPT, {"num_inference_steps": 1, "seed": 0})
        (long,) = engine.submit(PROMPT, {"num_inference_steps": 20, "seed": 0})
        wait_for(lambda: long.state == "decoding" and short.state == "decoding")
        gate.set()
        assert result(short) and result(long)


def test_a_cancelled_task_leaves_the_engine_running(pipe):
    """asyncio cancels the future that a task awaits; only `cancel` of the handle ends an image."""
    options = {"num_inference_steps": 3, "seed": 1}

    async def give_up(handle):
        task = asyncio.ensure_future(asyncio.wrap_future(handle.future))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    with started(pipe) as engine:
        (left,) = engine.submit(PROMPT, options)
        asyncio.run(give_up(left))
        (other,) = engine.submit(PROMPT, options)
        images = [result(handle).image for handle in (left, other)]
    assert images[0].tobytes() == images[1].tobytes()


def test_a_cancelled_image_gives_its_slot_back(watched):
    pipe, unet = watched
    with started(pipe, slots=1) as engine:
        long = held(engine, unet)
        waiting, other = (
            engine.submit(PROMPT, {"num_inference_steps": 2, "seed": s})[0] for s in (1, 2)
        )
        waiting.cancel()
        assert waiting.state == "cancelled"
        long.cancel()
        unet.open.set()
        assert result(other)
        for handle in (long, waiting):
            with pytest.raises(RequestCancelled):
                result(handle)
        assert long.evaluations_done <= 1 and engine.unfinished() == []


def test_images_that_are_cancelled_at_any_moment_stop_nothing(pipe):
    rng = np.random.default_rng(0)
    with started(pipe, slots=4, waiting=1000) as engine:
        handles = []
        for seed in range(300):
            handles += engine.submit("a", {"num_inference_steps": 1, "seed": seed})
            for _ in range(2):
                handles[rng.integers(max(0, seed - 8), seed + 1)].cancel()
            time.sleep(float(rng.uniform(0.0, 0.01)))
        ended = [handle.future.exception(SECONDS) for handle in handles]
        assert all(error is None or isinstance(error, RequestCancelled) for error in ended)
        assert None in ended and engine.state == "ready" and engine.unfinished() == []


def test_a_slow_decoder_holds_the_newcomers_back(watched):
    own, _ = watched
    decoder = Watched(own.engines["vae_decoder"])
    with started(replace(own, engines={**own.engines, "vae_decoder": decoder}), slots=2) as engine:
        decoder.open.clear()
        handles = engine.submit("a", {"num_inference_steps": 1, "num_images_per_prompt": 5})
        wait_for(lambda: [t.state for t in handles].count("decoding") == 2)
        time.sleep(0.05)
        assert [t.state for t in handles].count("waiting") == 3
        decoder.open.set()
        assert all(result(handle) for handle in handles)


def test_a_mistake_of_the_engine_ends_it_for_all_to_see(pipe, monkeypatch):
    with started(pipe) as engine:
        monkeypatch.setattr(engine, "_after_evaluation", None)
        (handle,) = engine.submit("a", {"num_inference_steps": 2})
        with pytest.raises(BackendError):
            result(handle)
        assert engine.state == "closed"


def test_an_engine_error_ends_the_images_of_its_call_only(watched):
    pipe, unet = watched
    with started(pipe, rows=2) as engine:
        failed = held(engine, unet)
        (other,) = engine.submit("a square", {"num_inference_steps": 3, "seed": 3})
        wait_for(lambda: other.state == "running")
        unet.fails = 1
        unet.open.set()
        with pytest.raises(BackendError, match="the device is lost"):
            result(failed)
        output = result(other)
        assert engine.state == "ready"
    alone = pipe("a square", num_inference_steps=3, seed=3).images[0]
    assert (pixels(output.image) == pixels(alone)).all()


def test_a_broken_device_is_loaded_again_and_the_others_go_on(watched, pipe):
    own, unet = watched
    loads = []

    def reload():
        loads.append(1)
        if len(loads) == 1:
            raise BackendError("not yet")
        return replace(own, engines={**own.engines, "unet": Watched(pipe.engines["unet"])})

    with started(own, rows=2, reload=reload) as engine:
        failed = held(engine, unet, num_inference_steps=20)
        (other,) = engine.submit("a square", {"num_inference_steps": 3, "seed": 3})
        wait_for(lambda: other.state == "running")
        unet.fails = 1000
        unet.open.set()
        with pytest.raises(BackendError):
            result(failed)
        wait_for(lambda: engine.state == "broken" or loads)
        output = result(other)
        assert engine.state == "ready" and len(loads) == 2
        engine._reloaded = False  # its other engines are the session's
    alone = pipe("a square", num_inference_steps=3, seed=3).images[0]
    assert (pixels(output.image) == pixels(alone)).all()


def test_while_the_device_is_broken_nothing_is_accepted(watched):
    pipe, unet = watched
    with started(pipe) as engine:
        failed = held(engine, unet)
        unet.fails = 10**9
        unet.open.set()
        with pytest.raises(BackendError):
            result(failed)
        wait_for(lambda: engine.state == "broken")
        with pytest.raises(RequestRejected, match="device error") as refused:
            engine.submit(PROMPT, {})
        assert refused.value.cause == "broken"


def test_a_lost_device_ends_all_and_nothing_is_loaded_again(watched):
    """CUDA serves it to a new process alone."""
    pipe, unet = watched
    unet.error, loads = DeviceLostError, []
    with started(pipe, rows=2, reload=lambda: loads.append(1)) as engine:
        failed = held(engine, unet, num_inference_steps=20)
        (other,) = engine.submit("a square", {"num_inference_steps": 3, "seed": 3})
        wait_for(lambda: other.state == "running")
        unet.fails = 10**9
        unet.open.set()
        for handle in (failed, other):
            with pytest.raises(DeviceLostError):
                result(handle)
        wait_for(lambda: engine.state == "lost")
        with pytest.raises(RequestRejected, match="the device is lost"):
            engine.submit(PROMPT, {})
    assert loads == []


@pytest.mark.parametrize("error", [ValueError("mine"), KeyError("x"), UsageError("no")])
def test_an_error_of_a_callback_touches_its_own_image_only(watched, error):
    pipe, unet = watched

    def callback(pipeline, index, timestep, cached):
        raise error

    with started(pipe) as engine:
        other = held(engine, unet, num_inference_steps=3)
        options = {"num_inference_steps": 3, "callback_on_step_end": callback}
        (failing,) = engine.submit(PROMPT, options)
        (spoken,) = engine.submit(
            PROMPT, {"num_inference_steps": 3}, on_step=lambda *_: callback(0, 0, 0, 0)
        )
        unet.open.set()
        for handle in (failing, spoken):
            with pytest.raises(SdrtError):
                result(handle)
        assert result(other) and engine.state == "ready"


def test_an_image_without_numbers_fails_alone(pipe):
    def spoil(pipeline, index, timestep, cached):
        return {"latents": np.full_like(cached["latents"], np.nan)}

    with started(pipe) as engine:
        options = {"num_inference_steps": 2, "seed": 0}
        (spoiled,) = engine.submit(PROMPT, {**options, "callback_on_step_end": spoil})
        (full,) = engine.submit(PROMPT, options)
        with pytest.raises(SdrtError, match="NaN"):
            result(spoiled)
        assert result(full)


def test_steps_are_reported(pipe):
    seen = []
    with started(pipe) as engine:
        (handle,) = engine.submit(
            PROMPT,
            {"num_inference_steps": 4, "seed": 0},
            on_step=lambda handle, step: seen.append((handle, step)),
        )
        result(handle)
    expected = list(pipe.steps(PROMPT, num_inference_steps=4, seed=0))
    assert [step.index for _, step in seen] == [step.index for step in expected]
    for (conditioning, step), other in zip(seen, expected, strict=True):
        assert conditioning is handle and (step.latents == other.latents).all()
    times = handle.times
    assert times.submitted <= times.started <= times.prepared <= times.denoised <= times.decoded


def test_more_than_may_wait_are_refused_all_or_none(watched):
    pipe, unet = watched
    with started(pipe, slots=1, waiting=3) as engine:
        held(engine, unet)
        engine.submit(PROMPT, {"num_inference_steps": 1})
        with pytest.raises(RequestRejected, match="wait") as refused:
            engine.submit(PROMPT, {"num_images_per_prompt": 3, "num_inference_steps": 1})
        assert refused.value.cause == "queue" and refused.value.retry_after >= 1.0
        assert len(engine.unfinished()) == 2
        unet.open.set()


def test_what_cannot_be_in_time_is_refused_at_once(watched):
    pipe, _ = watched
    refusals = []

    class Recorder:
        def batch_evaluated(self, rows, seconds): ...
        def request_finished(self, handle): ...
        def request_rejected(self, cause):
            refusals.append(cause)

    with started(pipe, observer=Recorder()) as engine:
        seconds = engine.cost_model.sizes[64, 64].seconds(2)
        (cached,) = engine.submit(PROMPT, {"num_inference_steps": 5}, deadline=20.0)
        with pytest.raises(RequestRejected, match="cannot be met") as refused:
            engine.submit(PROMPT, {"num_inference_steps": 900}, deadline=100 * seconds)
        assert refused.value.cause == "deadline" and refusals == ["deadline"]
        result(cached)
        assert cached.times.decoded - cached.times.submitted < 20.0


def test_an_accepted_promise_is_not_broken_for_a_later_one(watched):
    pipe, unet = watched
    with started(pipe, rows=2) as engine:
        alone = engine.estimates.solo_seconds(held(engine, unet, num_inference_steps=100).scheduled)
        engine.submit(PROMPT, {"num_inference_steps": 100}, deadline=3 * alone)
        with pytest.raises(RequestRejected, match="deadline of an earlier one"):
            engine.submit(PROMPT, {"num_inference_steps": 200}, deadline=2.9 * alone, priority=1)
        for handle in engine.unfinished():
            handle.cancel()
        unet.open.set()


def test_too_little_memory_is_a_refusal(pipe):
    with started(pipe) as engine:
        grown = engine.cost_model.sizes[64, 64].call_bytes
        engine.cost_model.sizes[64, 64].call_bytes = {rows: 2**50 for rows in grown}
        with pytest.raises(RequestRejected, match="memory") as refused:
            engine.submit(PROMPT, {})
        assert refused.value.cause == "memory"


def test_draining_finishes_what_was_accepted(pipe):
    with started(pipe) as engine:
        handles = engine.submit(PROMPT, {"num_inference_steps": 5, "num_images_per_prompt": 3})
        assert engine.drain(SECONDS)
        assert all(handle.future.done() for handle in handles)
        with pytest.raises(RequestRejected) as refused:
            engine.submit(PROMPT, {})
        assert refused.value.cause == "draining"


def test_what_is_unfinished_at_the_end_is_cancelled(watched):
    pipe, unet = watched
    engine = started(pipe, slots=1)
    engine.start()
    handles = [held(engine, unet), *engine.submit(PROMPT, {"num_inference_steps": 5})]
    assert not engine.drain(0.01)
    unet.open.set()
    engine.close()
    for handle in handles:
        with pytest.raises(RequestCancelled):
            result(handle)


def test_a_size_that_was_not_measured_costs_by_its_area(pipe):
    with started(pipe) as engine:
        sizes = ("128x64", "48x32", "64x64")
        handles = [
            engine.submit(PROMPT, {"seed": 1, "num_inference_steps": 4, "size": size})[0]
            for size in sizes
        ]
        for handle, size in zip(handles, sizes, strict=True):
            expected = pipe(PROMPT, seed=1, num_inference_steps=4, size=size).images[0]
            assert np.array_equal(handle.future.result().image, expected)
        known = engine.cost_model.sizes[64, 64]
        assert list(engine.cost_model.sizes) == [(64, 64)]
        large, small = (
            engine.cost_model.for_size((1024, 1024)),
            engine.cost_model.for_size((32, 32)),
        )
        assert (
            large.decode_seconds == 256 * known.decode_seconds
            and small.decode_seconds == known.decode_seconds / 4
        )
        assert large.max_rows <= known.max_rows and small.max_rows == known.max_rows
        assert large.full_rows <= known.full_rows and small.full_rows == known.full_rows
        for side in range(16, 8192, 16):
            engine.cost_model.for_size((side, 64))
        assert len(engine.cost_model.estimated) <= 64


@pytest.mark.parametrize(
    "options",
    [
        {"deadline": 0.0},
        {"deadline": float("nan")},
        {"deadline": 1e9},
        {"priority": 1000},
        {"scheduler": "nonesuch"},
        {"options": {"nonesuch": 1}},
        {"options": {"num_inference_steps": 0}},
        {"options": {"size": "8x8"}},
        {"options": {"size": "136x64"}},
        {"options": {"size": "64x72"}},
        {"options": {"seed": -1}},
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_accepted(pipe, options):
    with started(pipe) as engine:
        arguments = {"options": {}, **options}
        with pytest.raises(UsageError):
            engine.submit(PROMPT, arguments.pop("options"), **arguments)
        assert engine.unfinished() == []


def test_two_sizes_are_made_side_by_side(tiny_bundle):
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe, started(pipe) as engine:
        handles = [
            engine.submit("a", {"num_inference_steps": 10, "size": size, "seed": i})[0]
            for i in range(4)
            for size in ("32x32", "48x32")
        ]
        output = [result(handle).image for handle in handles]
        assert {image.size for image in output} == {(32, 32), (48, 32)}
        alone = pipe("a", num_inference_steps=10, size="48x32", seed=1).images[0]
        assert (pixels(output[3]) == pixels(alone)).all()


def test_images_that_are_done_are_let_go_whatever_was_given_of_them(pipe):
    """Prompts of one to four chunks, each of which is fed in a shape of its own."""

    def runs():
        gc.collect()
        return sum(type(item) is DenoisingState for item in gc.get_objects())

    before = runs()
    with started(pipe) as engine:
        for chunks in range(1, 5):
            prompt = " BREAK ".join([PROMPT] * chunks)
            result(engine.submit(prompt, {"num_inference_steps": 1})[0])
        assert runs() <= before + 1  # the last call's


def test_deterministic_calls_are_all_of_one_shape(shapes):
    with sdrt.load(shapes, backend="torch") as loaded:
        unet = Watched(loaded.engines["unet"])
        pipe = replace(loaded, engines={**loaded.engines, "unet": unet})
        with started(pipe, rows=8, deterministic=True) as engine:
            unet.calls.clear()
            options = {"num_inference_steps": 4, "seed": 1}
            alone = result(engine.submit(PROMPT, options)[0])
            long = held(engine, unet, num_inference_steps=6)
            (shared,) = engine.submit(PROMPT, options)
            wait_for(lambda: shared.state == "running")
            unet.open.set()
            assert (pixels(result(shared).image) == pixels(alone.image)).all()
            result(long)
        assert {len(call) for call in unet.calls} == {8}


def test_measured_costs_are_kept_and_read_again(pipe, tmp_path, caplog):
    cached = tmp_path / "plans"
    first = cost_model.load_cost_model(pipe, 4, cached)
    (path,) = cached.iterdir()
    again = cost_model.load_cost_model(pipe, 4, cached)
    assert again.sizes == first.sizes and again.encode_seconds == first.encode_seconds
    path.write_text("{")
    assert cost_model.load_cost_model(pipe, 4, cached).sizes.keys() == first.sizes.keys()
    assert "measuring again" in caplog.text


class Timed:
    """An engine whose call takes a second for itself and half a second a row, by `clock`."""

    def __init__(self, engine, clock):
        self.engine, self.inputs, self.outputs, self.clock = engine, engine.inputs, [], clock

    def __call__(self, feeds):
        self.clock.now += 1.0 + 0.5 * len(next(iter(feeds.values())))
        return self.engine(feeds)


def test_costs_are_of_the_real_calls(pipe, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(cost_model, "time", clock)
    engines = {name: Timed(engine, clock) for name, engine in pipe.engines.items()}
    costs = cost_model.measure_costs(replace(pipe, engines=engines), 8)
    size = costs.sizes[64, 64]
    assert {rows: size.seconds(rows) for rows in (1, 2, 4, 8)} == {1: 1.5, 2: 2.0, 4: 3.0, 8: 5.0}
    assert size.seconds(64) == pytest.approx(8 * size.seconds(8))
    assert size.decode_seconds == 1.5 and costs.encode_seconds == 1.5
    for _ in range(100):
        size.observe(2, 6.0)
    assert size.seconds(2) == pytest.approx(6.0, rel=0.01)


class Slowed(Timed):
    """An engine that is slow or fails as `seconds` of rows and the time says. Notes its rows."""

    def __init__(self, engine, clock, seconds):
        super().__init__(engine, clock)
        self.seconds, self.rows = seconds, []

    def __call__(self, feeds):
        self.rows.append(len(next(iter(feeds.values()))))
        self.clock.now += self.seconds(self.rows[-1], self.clock.now)
        return {}


def measured(pipe, monkeypatch, **seconds):
    """The costs of engines that take `seconds`, and the rows of the model's calls."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(cost_model, "time", clock)
    slowed = {name: Slowed(pipe.engines[name], clock, of) for name, of in seconds.items()}
    costs = cost_model.measure_costs(replace(pipe, engines={**pipe.engines, **slowed}), 32)
    return costs.sizes[64, 64], slowed["unet"].rows


def measured_rows(pipe, monkeypatch, seconds):
    size, _ = measured(pipe, monkeypatch, unet=seconds)
    return size.max_rows, size.full_rows


def test_a_large_model_is_measured_by_few_calls(pipe, monkeypatch):
    """SDXL takes half a minute a call on two cores, and the server is not ready before."""

    def decode(_, now):
        return 9.0 if now < 24.5 else 90.0

    size, rows = measured(pipe, monkeypatch, unet=lambda rows, _: 6.0 * rows, vae_decoder=decode)
    assert rows == [1, 1, 2] and size.call_seconds == {1: 6.0, 2: 12.0}
    assert (size.max_rows, size.full_rows, size.decode_seconds) == (2, 2, 9.0)
    assert size.seconds(4) == 24.0

    size, rows = measured(pipe, monkeypatch, unet=lambda rows, _: 2.0 * rows)
    assert rows == [1, 1, 2, 2, 4, 4] and size.max_rows == 2


def test_a_slow_first_call_does_not_make_the_others_long(pipe, monkeypatch):
    size, rows = measured(pipe, monkeypatch, unet=lambda rows, now: 0.5 if now else 30.0)
    assert size.call_seconds[1] == 0.5 and max(rows) == 32


def test_calls_grow_while_throughput_does_whatever_else_the_machine_does(pipe, monkeypatch):
    def seconds(rows, now):
        return (0.01 + 0.01 * rows) * (3.0 if busy[0] < now < busy[1] else 1.0)

    busy = 0.0, 0.0
    assert measured_rows(pipe, monkeypatch, seconds) == (16, 32)
    for tenths in range(30):
        busy = tenths / 10, tenths / 10 + 0.2
        assert measured_rows(pipe, monkeypatch, seconds)[1] >= 16


def test_rows_that_do_not_fit_are_not_used(pipe, monkeypatch):
    def seconds(rows, now):
        if rows > limit:
            raise BackendError("out of memory")
        return 0.01

    limit = 8
    assert measured_rows(pipe, monkeypatch, seconds) == (8, 8)
    limit = 1
    with pytest.raises(BackendError):
        measured_rows(pipe, monkeypatch, seconds)


def test_a_cheap_image_waits_for_costlier_ones_of_its_call(pipe):
    prompts = ["a red circle AND a blue square", "a red circle"]
    with InflightBatcher(pipe, rows=4) as engine:
        handles = engine.submit(prompts, {"num_inference_steps": 2, "seed": 5})
        images = [handle.future.result(60).image.tobytes() for handle in handles]
    alone = pipe(prompts, num_inference_steps=2, seed=5).images
    assert images == [image.tobytes() for image in alone]
