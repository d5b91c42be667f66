"""One pipeline in many threads: everyone gets the bytes that they get alone."""

import asyncio
import itertools
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sdrt
from sdrt.engine import ExclusiveSlot, LazyEngine
from sdrt.errors import BackendError, UsageError
from sdrt.runtime.arguments import parse_options
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.images import image_to_array

pytestmark = pytest.mark.integration

BACKENDS = ("onnxruntime", "openvino", "torch")
THREADS, SECONDS = 8, 60
SAMPLERS = ("Euler", "DPM++ 2M Karras", "UniPC")
PROMPT = "a red circle"


def kinds():
    """Calls that differ in all that a call may differ in: the sampler, and the options."""
    sizes, scales = ("32x32", "64x32"), (7.5, 1.0)
    for i, (sampler, size, scale) in enumerate(itertools.product(SAMPLERS, sizes, scales)):
        options = {
            "size": size,
            "guidance_scale": scale,
            "seed": i,
            "num_inference_steps": 1 + i % 3,
        }
        prompts = [f"a circle {i}", "a white cross"] if i % 5 == 0 else f"a circle {i % 7}"
        yield sampler, prompts, {**options, "negative_prompt": ("", "red")[i % 2]}


def created(pipe, kind):
    """The images of a call, and the text that goes into their files, which names the LoRA."""
    sampler, prompt, options = kind
    output = pipe.with_scheduler(sampler)(prompt, **options)
    return [image.tobytes() for image in output.images], output.parameters


@pytest.fixture(scope="module")
def lora(tiny, tmp_path_factory):
    """A file that changes the text encoder and the UNet."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("lora") / "both.safetensors"
    places = {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (16, 16),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (8, 16),
        "lora_unet_mid_block_resnets_0_conv1": (16, 16, 3, 3),
    }
    factors = {}
    for name, (rows, columns, *kernel) in places.items():
        down = rng.normal(size=(2, columns, *kernel)).astype(np.float32)
        up = rng.normal(size=(rows, 2, *[1] * len(kernel))).astype(np.float32)
        factors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file(factors, path)
    return path


@pytest.fixture(scope="module", params=BACKENDS)
def one(request, tiny_bundle):
    with sdrt.load(tiny_bundle, backend=request.param) as loaded:
        yield loaded


def in_threads(count, work):
    """What `work(i)` gives in so many threads that begin together; raises what one raises."""
    begin = threading.Barrier(count)

    def begun(i):
        begin.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begun, range(count)))


def alone_of(pipe, lora):
    """Every kind of call made alone, without and with the LoRA."""
    alone = []
    for chosen in ({}, {lora: 0.8}):
        pipe.set_lora(chosen)
        alone.append([created(pipe, kind) for kind in kinds()])
    pipe.set_lora({})
    assert all(a[0] != b[0] for a, b in zip(*alone, strict=True))  # the file does something
    return alone


def check_mixed(pipe, lora, calls):
    """Threads that make calls of every kind while the LoRA is put on and taken off."""
    alone, every = alone_of(pipe, lora), list(kinds())
    done, wrong = threading.Event(), queue.Queue()

    def switch():
        for chosen in itertools.cycle(({lora: 0.8}, {})):
            if done.is_set():
                return
            pipe.set_lora(chosen)
            time.sleep(0.1)

    def call(i):
        for k in range(calls):
            kind = (i * 7 + k) % len(every)
            if created(pipe, every[kind]) not in [item[kind] for item in alone]:
                wrong.put((i, k))

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        in_threads(THREADS, call)
    finally:
        done.set()
        switching.join(SECONDS)
        pipe.set_lora({})
    assert wrong.empty() and not switching.is_alive()


def test_everyone_gets_the_bytes_that_they_get_alone(one, lora):
    check_mixed(one, lora, 3)


@pytest.mark.slow
def test_everyone_gets_the_bytes_that_they_get_alone_for_long(one, lora):
    check_mixed(one, lora, 200)


def test_the_same_through_asyncio(one):
    every = list(kinds())[:8]
    alone = [created(one, kind) for kind in every]

    async def gathered():
        calls = [asyncio.to_thread(created, one, kind) for kind in every * 2]
        return await asyncio.wait_for(asyncio.gather(*calls), SECONDS)

    assert asyncio.run(gathered()) == alone * 2


def test_an_answer_is_the_callers_own(one):
    """Whatever is called later: an engine's arrays stay as they were given."""
    unet = one.engines["unet"]
    rng = np.random.default_rng(0)

    def feeds():
        return {
            "sample": rng.normal(size=(2, 4, 4, 4)).astype(np.float32),
            "timestep": np.full(2, 500, np.float32),
            "context": rng.normal(size=(2, 32, 16)).astype(np.float32),
        }

    first = unet(feeds())
    before = {name: value.copy() for name, value in first.items()}
    for _ in range(3):
        unet(feeds())
    assert all(np.array_equal(first[name], before[name]) for name in before)


def test_components_that_take_turns(tiny_bundle, one):
    every = list(kinds())[:6]
    alone = [created(one, kind) for kind in every]
    backend = one.backend.split()[0]
    with sdrt.load(tiny_bundle, backend=backend, low_memory=True) as pipe:
        assert in_threads(6, lambda i: created(pipe, every[i])) == alone
        loaded = [engine for engine in pipe.engines.values() if engine._engine is not None]
        assert len(loaded) == 1


class Counted:
    """An engine that counts what is loaded and called at one time."""

    inputs = outputs = ()
    loaded, max_loaded, loads = 0, 0, 0

    def __init__(self):
        Counted.loaded += 1
        Counted.loads += 1
        Counted.max_loaded = max(Counted.max_loaded, Counted.loaded)
        time.sleep(0.01)
        self.open = True

    def __call__(self, feeds):
        time.sleep(0.002)
        assert self.open, "closed while it was in use"
        return feeds

    def refit(self, weights):
        pass

    def close(self):
        self.open = False
        Counted.loaded -= 1


def test_an_engine_in_use_stays_loaded_and_is_loaded_once(monkeypatch):
    for name in ("loaded", "max_loaded", "loads"):
        monkeypatch.setattr(Counted, name, 0)
    alone = LazyEngine(Counted, None)
    in_threads(THREADS, lambda i: alone({}))
    assert Counted.loads == 1
    alone.close()
    turn = ExclusiveSlot()
    engines = [LazyEngine(Counted, None, turn) for _ in range(3)]
    monkeypatch.setattr(Counted, "max_loaded", 0)
    in_threads(THREADS, lambda i: [engines[(i + k // 4) % 3]({}) for k in range(12)])
    assert Counted.max_loaded == 1


def test_whoever_waits_for_another_component_comes_in_turn(monkeypatch):
    monkeypatch.setattr("sdrt.engine.lazy.MAX_WAIT", 0.05)
    turn, done = ExclusiveSlot(), threading.Event()
    busy, other = LazyEngine(Counted, None, turn), LazyEngine(Counted, None, turn)

    def work(i):
        if i == 0:
            time.sleep(0.02)
            other({})
            done.set()
        while not done.is_set():
            busy({})

    in_threads(4, work)  # or this takes for ever


@pytest.mark.parametrize("method", ["set_lora", "close"])
def test_a_change_waits_for_calls_and_calls_for_it(tiny_bundle, lora, method):
    """Seen through one call that stops in its callback, a change, and a call that comes after."""
    pipe = sdrt.load(tiny_bundle, backend="onnxruntime")
    other = pipe.with_scheduler("Euler")
    alone = created(pipe, next(kinds()))
    reached, go_on, changed = threading.Event(), threading.Event(), threading.Event()

    def stop(*_):
        reached.set()
        assert go_on.wait(SECONDS)

    def change():
        getattr(other, method)(*([{lora: 0.8}] if method == "set_lora" else []))
        changed.set()

    with ThreadPoolExecutor(3) as pool:
        sampler, prompt, options = next(kinds())
        begun = pool.submit(pipe.with_scheduler(sampler), prompt, on_step=stop, **options)
        assert reached.wait(SECONDS)
        changing = pool.submit(change)
        while not pipe.leases._changing:
            time.sleep(0.001)
        late = pool.submit(created, pipe, next(kinds()))
        time.sleep(0.05)
        assert not changed.is_set() and not late.done()
        go_on.set()
        assert [image.tobytes() for image in begun.result(SECONDS).images] == alone[0]
        changing.result(SECONDS)
        if method == "close":
            with pytest.raises(BackendError, match="is closed"):
                late.result(SECONDS)
        else:
            assert "<lora:both:0.8>" in late.result(SECONDS)[1][0]
            assert late.result()[0] != alone[0]
    pipe.close()
    pipe.close()


def test_after_close_everything_raises_in_words(tiny_bundle):
    pipe = sdrt.load(tiny_bundle, backend="onnxruntime")
    pipe.close()
    options = parse_options({})
    for use in (
        lambda: pipe(PROMPT),
        lambda: pipe.with_scheduler("Euler")(PROMPT),
        lambda: list(pipe.steps(PROMPT)),
        lambda: list(pipe.stream(PROMPT, options)),
        lambda: pipe.decode(np.zeros((1, 4, 4, 4), np.float32)),
        lambda: pipe.set_lora({}),
    ):
        with pytest.raises(BackendError, match="is closed"):
            use()


@pytest.mark.parametrize("method", ["set_lora", "close"])
def test_a_change_inside_a_call_is_refused(one, method):
    """In a callback, in `on_step`, and in a loop that is not finished."""
    arguments = [{}] if method == "set_lora" else []
    short = {"num_inference_steps": 2, "seed": 0}

    def change(*_):
        getattr(one.with_scheduler("Euler"), method)(*arguments)

    def in_callback(*arguments):
        change()
        return arguments[-1]

    for watched in ({"on_step": change}, {"callback_on_step_end": in_callback}):
        with pytest.raises(UsageError, match="finish"):
            one(PROMPT, **short, **watched)
    for _ in one.steps(PROMPT, **short):
        with pytest.raises(UsageError, match="finish"):
            change()
    one.set_lora({})  # all of them are over


def test_loops_that_are_left_hold_nothing_up(tiny_bundle):
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        pipe.steps(PROMPT)  # never begun
        for _ in pipe.steps(PROMPT):
            break
        pipe.set_lora({})
        cached = pipe.steps(PROMPT)
        next(cached)
        cached.close()
        pipe.set_lora({})
        thread = threading.Thread(target=lambda: next(unreferenced))
        unreferenced = pipe.steps(PROMPT)
        thread.start()
        thread.join()
        pipe.set_lora({})  # its thread has ended
        with pytest.raises(UsageError, match="start the loop again"):
            next(unreferenced)
        in_use = pipe.steps(PROMPT)
        next(in_use)
    with pytest.raises(BackendError, match="closed"):
        next(in_use)


def test_a_loop_may_go_from_thread_to_thread(one):
    """As web frameworks go through iterators, each step in whichever thread is free."""
    expected = [step.latents.tobytes() for step in one.steps(PROMPT, num_inference_steps=3, seed=0)]
    loop = one.steps(PROMPT, num_inference_steps=3, seed=0)

    async def gone_through():
        return [(await asyncio.to_thread(next, loop)).latents.tobytes() for _ in expected]

    assert asyncio.run(gone_through()) == expected


def test_a_call_in_a_callback_does_not_wait_for_a_change(one):
    """Which waits for the outer call."""
    inner, alone = [], created(one, next(kinds()))

    def nested(*_):
        while not one.leases._changing:
            time.sleep(0.001)
        inner.append(created(one, next(kinds())))

    with ThreadPoolExecutor(2) as pool:
        outer = pool.submit(one, PROMPT, num_inference_steps=1, seed=0, on_step=nested)
        changing = pool.submit(one.set_lora, {})
        outer.result(SECONDS)
        changing.result(SECONDS)
    assert inner == [alone]


def test_images_in_flight_and_changes_do_not_mix(tiny_bundle, lora):
    """Every image of a call in flight is of one set of weights, also those prepared after it."""
    options = {"num_inference_steps": 3, "seed": 5, "num_images_per_prompt": 4}
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        alone = []
        for chosen in ({lora: 0.8}, {}):
            pipe.set_lora(chosen)
            output = pipe(PROMPT, **options)
            texts = [text.split("\n")[0] for text in output.parameters]
            alone.append([(i.tobytes(), t) for i, t in zip(output.images, texts, strict=True)])
        with InflightBatcher(pipe, slots=2, rows=2) as engine:
            for _ in range(2):
                handles = engine.submit(PROMPT, options)
                pipe.set_lora({lora: 0.8})
                handles += engine.submit(PROMPT, options)
                pipe.set_lora({})
                for i, handle in enumerate(handles):
                    actual = handle.future.result(SECONDS)
                    text = actual.parameters.split("\n")[0]
                    assert (actual.image.tobytes(), text) in [item[i % 4] for item in alone]


def test_an_engine_in_flight_can_be_closed_while_a_change_waits(tiny_bundle):
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        engine = InflightBatcher(pipe, slots=1, rows=2)
        engine.start()
        reached = threading.Event()
        handles = engine.submit(
            [PROMPT] * 4,
            {"num_inference_steps": 500, "seed": 0},
            on_step=lambda *_: reached.set(),
        )
        assert reached.wait(SECONDS)
        with ThreadPoolExecutor(2) as pool:
            changing = pool.submit(pipe.set_lora, {})
            pool.submit(engine.close).result(SECONDS)
            changing.result(SECONDS)
        assert all(handle.future.done() for handle in handles)


def test_encoded_prompts_are_cached_for_all_threads(one, monkeypatch):
    """More prompts than are kept, so that threads add and drop at the same time."""
    monkeypatch.setattr("sdrt.runtime.text.conditioning.MAX_CACHED_CHUNKS", 3)
    own = replace(one, chunk_cache={})
    alone = [own(f"word {i}", num_inference_steps=1, seed=0).images[0].tobytes() for i in range(6)]
    got = in_threads(
        THREADS,
        lambda i: [
            own(f"word {(i + k) % 6}", num_inference_steps=1, seed=0).images[0].tobytes()
            for k in range(6)
        ],
    )
    assert all(got[i][k] == alone[(i + k) % 6] for i in range(THREADS) for k in range(6))
    assert len(own.chunk_cache) <= 3


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_threads_may_share_an_opened_image(kind, tmp_path):
    """Which Pillow decodes when it is first used."""
    path = tmp_path / f"given.{kind}"
    numbers = np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
    Image.fromarray(numbers).save(path)
    expected = image_to_array(Image.open(path), (64, 64))
    for _ in range(5):
        shared = Image.open(path)
        created = in_threads(THREADS, lambda _, shared=shared: image_to_array(shared, (64, 64)))
        assert all(np.array_equal(item, expected) for item in created)
