"""The CUDA side without TensorRT: an engine that launches a kernel of its own stands in for a plan,
so that the driver, the kernels, single-launch runs, the arena, streams, lack of memory and faults
are tried on any GPU that CUDA serves, with cuda-bindings, NVRTC and numpy.

    pytest -m gpu tests/test_gpu_loop.py       # on a GPU
    pytest -m rig tests/test_gpu_loop.py       # on a stand-in of the driver, which is no GPU

Not yet run on a GPU.
"""

import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
import kernel_plan
from kernel_plan import LAYERS, SIDES, TOKENS, WIDTH, load_engines
from sampling_states import create_states, evaluate

from sdrt.engine.cuda.driver import get_device
from sdrt.engine.gpu import detect_gpus
from sdrt.engine.sampling import TextInput
from sdrt.engine.tensorrt import variants
from sdrt.errors import BackendError
from sdrt.runtime.denoising import denoise
from sdrt.runtime.sampling_program import build_sampling_program, run_sampling_program

pytestmark = pytest.mark.gpu
EXTRA = 1  # channels besides the latents'
TOLERANCE = {"float32": 1e-5, "float16": 2e-2}
FAULT = 'extern "C" __global__ void bad() { *(int*)8 = 1; }'


@pytest.fixture(scope="module")
def gpu():
    if reason := detect_gpus().unavailable_reason:
        pytest.skip(reason)
    return detect_gpus().gpus[0]


@pytest.fixture
def create(gpu, tmp_path, monkeypatch):
    """A function that loads engines of a dtype; they are closed afterwards."""
    module = kernel_plan.create_module(gpu.sm, EXTRA)
    monkeypatch.setitem(sys.modules, variants.MODULES[variants.RTX], module)
    created = []

    def load(dtype, **options):
        engines = load_engines(tmp_path, get_device(0), gpu.sm, dtype, EXTRA, **options)
        created.extend(engines.values())
        return engines

    yield load
    for engine in created:
        engine.close()
    device = get_device(0)
    with device.use():
        device.free_arena()


@pytest.fixture(params=["float32", "float16"])
def dtype(request):
    return request.param


def states(scheduler="DDIMScheduler", scales=(7.5,) * 5, num_images=2):
    sizes = {"shape": (4, *SIDES), "context": (TOKENS, WIDTH)}
    return create_states(scheduler, list(scales), num_images, EXTRA, **sizes)


def run(engines, *arguments):
    return run_sampling_program(engines, states(*arguments), decode=False).latents


def expect(*arguments):
    *_, last = denoise({"unet": evaluate}, states(*arguments))
    return last.latents


def error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    "arguments",
    [
        ("DDIMScheduler", (7.5,) * 5, 1),
        ("PNDMScheduler", (7.5,) * 6, 3),
        ("UniPCMultistepScheduler", (1.0,) * 6, 2),
        ("EulerAncestralDiscreteScheduler", (1.0, 7.5, 7.5, 1.0, 1.0, 3.0), 2),
        ("HeunDiscreteScheduler", (4.0,) * 4, 4),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_run_in_one_launch_equals_the_loop_on_the_host(create, dtype, arguments):
    engines, expected = create(dtype), expect(*arguments)
    for _ in range(3):  # captured, then replayed
        assert error(run(engines, *arguments), expected) < TOLERANCE[dtype]


def test_single_calls_equal_the_model_at_every_number_of_rows(create, dtype):
    engine, rng = create(dtype)["unet"], np.random.default_rng(0)
    for rows in (1, 2, 8, 2):
        for chunks in (1, 4):
            feeds = {
                "sample": rng.normal(size=(rows, 4 + EXTRA, *SIDES)).astype(np.float32),
                "timestep": np.linspace(1, 999, rows, dtype=np.float32),
                "context": rng.normal(size=(rows, chunks * TOKENS, WIDTH)).astype(np.float32),
            }
            half = {name: dtype for name in ("sample", "context")}
            cast = {
                n: v.astype(half.get(n, "float32")).astype(np.float32) for n, v in feeds.items()
            }
            assert error(engine(feeds)["output"], evaluate(cast)["output"]) < TOLERANCE[dtype]


def with_text(program, clip_skip):
    """The program reading two chunks of text, and the context that those must become."""
    rng, images = np.random.default_rng(3), len(program.history)
    ids = rng.integers(0, 50, (images, 2, 2, TOKENS)).astype(np.int32)
    weights = rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)
    encoded = kernel_plan.encode(ids.reshape(-1, TOKENS))[:, LAYERS - 1 - clip_skip]
    plain = encoded.reshape(*ids.shape, WIDTH)
    weighted = plain * weights[..., None]
    axes = (2, 3, 4)  # the mean over a row's tokens is preserved
    ratio = plain.sum(axes, keepdims=True) / weighted.sum(axes, keepdims=True)
    context = (weighted * ratio).reshape(images, 2, 2 * TOKENS, WIDTH)
    text = TextInput(ids, weights, clip_skip)
    return replace(program, text=text, conditioning={}), context


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_text_and_pixels_are_part_of_the_launch(create, dtype, clip_skip):
    engines, runs = create(dtype), states()
    program, context = with_text(build_sampling_program(runs), clip_skip)
    fed = replace(program, text=None, conditioning={"context": context.astype(np.float32)})
    expected = engines["unet"].run_program(fed, None, engines["vae_decoder"])
    actual = engines["unet"].run_program(program, engines["text_encoder"], engines["vae_decoder"])
    assert error(actual.latents, expected.latents) < TOLERANCE[dtype]
    for result, latents in zip(actual.pixels, actual.latents, strict=True):
        image = kernel_plan.decode(latents[None])[0].transpose(1, 2, 0)
        pixels = np.rint(np.clip(image * 0.5 + 0.5, 0, 1) * 255)
        assert np.abs(result.astype(int) - pixels).max() <= 1
    assert list(actual.finite) == [True, True]


def test_an_image_that_is_not_finite_is_reported(create, dtype):
    engines, program = create(dtype), build_sampling_program(states())
    program.history[1, 0, 0, 0, 0] = np.nan
    result = engines["unet"].run_program(program, None, engines["vae_decoder"])
    assert list(result.finite) == [True, False]


def test_more_layouts_than_are_cached_take_turns(create):
    engines = create("float32")
    calls = [
        ("DDIMScheduler", (scale,) * steps, images)
        for steps in (2, 3)
        for images in (1, 2, 4)
        for scale in (1.0, 7.5)
    ]
    for _ in range(2):
        for call in calls:
            assert error(run(engines, *call), expect(*call)) < TOLERANCE["float32"]


def test_an_arena_that_moved_is_followed(create):
    engines, expected, device = create("float32"), expect(), get_device(0)
    for size in (0, 8 << 20, 64 << 20):
        with device.use():
            device.grow_arena(size)
        assert error(run(engines), expected) < TOLERANCE["float32"]


def test_a_run_works_in_the_callers_stream(create):
    from cuda.bindings import driver

    device = get_device(0)
    with device.use():
        stream = device.check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
    engines = create("float32", stream=int(stream))
    for _ in range(2):
        assert error(run(engines), expect()) < TOLERANCE["float32"]
    for engine in engines.values():
        engine.close()
    with device.use():
        device.check(driver.cuStreamDestroy(stream))


def test_threads_take_turns(create):
    engines, wrong = create("float32"), []
    calls = [("DDIMScheduler", (scale,) * 3, images) for scale in (1.0, 5.0) for images in (1, 3)]
    expected = [expect(*call) for call in calls]

    def work(index):
        for _ in range(5):
            if error(run(engines, *calls[index]), expected[index]) > TOLERANCE["float32"]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_cannot_be_captured_runs_kernel_by_kernel(create, monkeypatch):
    from runtime_rig import Context

    monkeypatch.setattr(Context, "is_stream_capturable", lambda self, stream: False)
    assert error(run(create("float32")), expect()) < TOLERANCE["float32"]


def test_without_memory_it_says_so_and_stays_usable(create):
    engines, device, blocks, size = create("float32"), get_device(0), [], 1 << 34
    with device.use():
        while size >= 1 << 20:
            try:
                blocks.append(device.allocate(size))
            except BackendError:
                size //= 2
        with pytest.raises(BackendError, match="out of memory"):
            device.grow_arena(1 << 30)
    try:
        with pytest.raises(BackendError):
            run(engines)
    finally:
        with device.use():
            for address in blocks:
                device.free(address)
    assert error(run(engines), expect()) < TOLERANCE["float32"]


def test_memory_comes_back(create):
    device = get_device(0)

    def use_and_close():
        engines = create("float32")
        run(engines)
        for engine in engines.values():
            engine.close()
        with device.use():
            device.free_arena()
            return device.memory()[0]

    before = use_and_close()  # the driver keeps some of its own from here on
    for _ in range(3):
        assert use_and_close() >= before - (4 << 20)


def test_a_fault_for_good_asks_for_a_new_process(gpu):
    """In a process of its own, whose context is lost."""
    code = f"""
from cuda.bindings import driver
from sdrt.engine.cuda.compiler import compile_cuda
from sdrt.engine.cuda.driver import get_device
from sdrt.errors import DeviceLostError
device = get_device(0)
for _ in range(2):
    try:
        with device.use():
            module = device.check(driver.cuModuleLoadData(compile_cuda({FAULT!r}, {gpu.sm!r})))
            function = device.check(driver.cuModuleGetFunction(module, b"bad"))
            device.check(driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, device.stream, 0, 0))
            device.synchronize()
    except DeviceLostError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("restart the process") == 2, done.stdout + done.stderr
