"""Pipelines on the stand-ins of the driver and of TensorRT for RTX: memory, faults at any call, and
threads. What the stand-ins do not show is said in `driver_rig` and `runtime_rig`.
"""

import os
import shutil
import sys
import threading
import traceback

import numpy as np
import pytest

import sdrt
from sdrt.errors import BackendError, DeviceLostError, SdrtError

pytestmark = pytest.mark.rig
RTX = "tensorrt-rtx"
PROMPT = "a red circle on a blue background"
OPTIONS = {"num_inference_steps": 2, "seed": 0}
REFUSED, LOST = 801, 700  # CUDA_ERROR_NOT_SUPPORTED, CUDA_ERROR_ILLEGAL_ADDRESS
STICKY = (201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999)


@pytest.fixture(scope="module")
def bundle(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rig") / "shapes"
    shutil.copytree(shapes, folder, ignore=shutil.ignore_patterns("plans"))
    load(folder).close()  # plans are built and validated
    return folder


@pytest.fixture
def expected(bundle):
    with load(bundle) as pipe:
        return generate(pipe)


@pytest.fixture(autouse=True)
def nothing_left(rig):
    """After every test nothing of the device is in use."""
    yield
    assert (rig.used, rig.graphs, rig.modules) == (0, 0, 0)


def load(bundle, **options):
    return sdrt.load(bundle, backend=RTX, **options)


def generate(pipe, **options):
    return np.asarray(pipe(PROMPT, **{**OPTIONS, **options}).images[0])


def in_child(function):
    """Run in a copy of the process, whose GPU may be lost; fails as the function does."""
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def count_calls(rig, function):
    before = rig.calls
    function()
    return rig.calls - before


def test_a_run_is_one_launch(bundle, rig):
    with load(bundle) as pipe:
        generate(pipe)
        before = rig.launches
        generate(pipe)
        assert rig.launches == before + 1


def test_memory_is_given_back_with_the_last_pipeline(bundle, rig):
    one, two = load(bundle), load(bundle)
    generate(one)
    one.close()
    assert rig.used > 0
    two.close()  # and `nothing_left` looks


def test_an_arena_at_the_same_address_is_another_arena(bundle, rig):
    """A graph that was captured in the larger one would write behind the smaller one's end."""
    from sdrt.engine.cuda.driver import get_device

    with load(bundle) as pipe:
        large = {"num_images_per_prompt": 4}
        generate(pipe)
        expected = generate(pipe, **large)
        device = get_device(0)
        with device.use():
            address = device.arena
            device.free_arena()
            device.grow_arena(1)
            assert device.arena == address
        assert np.array_equal(generate(pipe, **large), expected)


def test_a_failed_growth_leaves_a_device_that_works(bundle, rig, expected):
    from sdrt.engine.cuda.driver import get_device

    with load(bundle) as pipe:
        generate(pipe)
        device = get_device(0)
        with device.use(), pytest.raises(BackendError, match="out of memory"):
            device.grow_arena(1 << 40)
        assert np.array_equal(generate(pipe), expected)


def test_threads_that_share_plans_get_their_own_images(bundle, rig):
    prompts = ["a red circle", "a blue square", "a green circle", PROMPT]
    pipes = [load(bundle), load(bundle)]
    options = {"num_inference_steps": 2, "seed": 1}

    def generate_all(pipe, on_step=None):
        return [np.asarray(pipe(text, on_step=on_step, **options).images[0]) for text in prompts]

    expected, actual = generate_all(pipes[0]), {}

    def work(index):
        step_by_step = index % 2 == 1
        actual[index] = generate_all(pipes[index % 2], print_nothing if step_by_step else None)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(actual) == [0, 1, 2, 3]
    for images in actual.values():
        for a, b in zip(images, expected, strict=True):
            assert np.abs(a.astype(int) - b).max() <= 1
    for pipe in pipes:
        pipe.close()


def print_nothing(step):
    pass


def test_engines_that_share_a_plan_do_not_write_over_answers(bundle):
    one, two = load(bundle), load(bundle)
    inputs = [{"latents": np.full((1, 4, 8, 8), value, np.float32)} for value in (0.1, 0.9)]
    first = one.engines["vae_decoder"](inputs[0])["image"]
    before = first.copy()
    two.engines["vae_decoder"](inputs[1])
    assert np.array_equal(first, before)
    one.close()
    two.close()


def test_the_kernel_cache_is_stored_before_the_process_ends(bundle):
    for path in bundle.glob("plans/*/*.kernels"):
        path.unlink()
    with load(bundle) as pipe:
        generate(pipe)
        assert list(bundle.glob("plans/*/unet-*.kernels"))


@pytest.mark.parametrize("function", ["set_input_shape", "set_optimization_profile_async"])
def test_a_refusal_of_tensorrt_is_an_error(bundle, monkeypatch, function):
    from runtime_rig import Context

    with load(bundle) as pipe:
        monkeypatch.setattr(Context, function, lambda *_: False)
        with pytest.raises(BackendError, match=r"failed to (set|select)"):
            generate(pipe)
        monkeypatch.undo()
        generate(pipe)


def test_an_exception_of_the_bindings_is_an_error(bundle, monkeypatch):
    from runtime_rig import Context

    def fail(self):
        raise RuntimeError("a shape tensor has no address")

    with load(bundle) as pipe:
        monkeypatch.setattr(Context, "infer_shapes", fail)
        with pytest.raises(BackendError, match="failed to set the shapes"):
            generate(pipe)


def test_what_cannot_be_captured_runs_kernel_by_kernel(bundle, monkeypatch, rig, expected, caplog):
    from runtime_rig import Context

    monkeypatch.setattr(Context, "is_stream_capturable", lambda self, stream: False)
    with load(bundle) as pipe:
        before = rig.launches
        assert np.array_equal(generate(pipe), expected)
        assert rig.launches == before
    assert "cannot be captured" in caplog.text


def test_a_capture_that_fails_leaves_no_graph(bundle, monkeypatch, rig, expected, caplog):
    from runtime_rig import Context

    from sdrt.engine.cuda.driver import CudaGraph

    original = Context.execute_async_v3

    def refuse(self, stream):
        from cuda.bindings import driver

        capturing = int(driver.cuStreamIsCapturing(stream)[1])
        return not capturing and original(self, stream)

    assert CudaGraph is not None
    with load(bundle) as pipe:
        monkeypatch.setattr(Context, "execute_async_v3", refuse)
        assert np.array_equal(generate(pipe), expected)
        assert rig.graphs == 0
    assert "runs without a CUDA graph" in caplog.text


def test_without_nvml_the_driver_tells_what_is_free(bundle, monkeypatch, rig):
    from sdrt.engine import memory_budget
    from sdrt.engine.gpu import detect_gpus

    monkeypatch.setattr(memory_budget, "free_memory", lambda gpu: None)
    free = memory_budget.free_bytes(detect_gpus().gpus[0])
    assert free == (1 << 30) - rig.used


def test_a_missing_compiler_is_said_before_anything_is_loaded(monkeypatch):
    from sdrt.engine.cuda import compiler
    from sdrt.engine.gpu import detect_gpus
    from sdrt.engine.tensorrt.variants import explain_unavailable

    assert explain_unavailable(RTX, detect_gpus()) is None
    monkeypatch.setattr(compiler, "_version", lambda: None)
    assert "NVRTC" in explain_unavailable(RTX, detect_gpus())
    monkeypatch.setattr(compiler, "_version", lambda: (14, 1))
    assert "serves 13" in explain_unavailable(RTX, detect_gpus())
    assert "nvidia-cuda-nvrtc-cu12" in compiler.explain_unavailable((12, 8))


@pytest.mark.parametrize("code", STICKY)
def test_every_error_that_loses_the_context_is_final(bundle, rig, code):
    pipe = load(bundle)

    def run():
        generate(pipe)
        rig.fail_after(0, code)
        for _ in range(2):
            with pytest.raises(DeviceLostError, match="restart the process"):
                generate(pipe)
        with pytest.raises(DeviceLostError):
            sdrt.load(bundle)  # neither while its plans are loaded
        pipe.close()
        with pytest.raises(DeviceLostError):
            sdrt.load(bundle)
        assert rig.violation is None

    in_child(run)
    pipe.close()


def test_closing_after_a_fault_leaves_the_context_to_others(bundle, rig, tmp_path):
    """No reset: it would destroy what torch or ONNX Runtime have in the same context."""
    other = shutil.copytree(bundle, tmp_path / "other")
    one, two = load(bundle), load(other)

    def run():
        rig.fail_after(0, LOST)
        with pytest.raises(DeviceLostError):
            generate(one)
        for pipe in (one, two):
            pipe.close()
        assert rig.violation is None

    in_child(run)
    one.close()
    two.close()


def interrupt_everywhere(rig, count, step, inject, attempt):
    """Attempt something with a fault at every `step`-th of `count` points; gives the errors."""
    errors = []
    for point in range(0, count, step):
        inject(point)
        try:
            attempt()
        except SdrtError as error:
            errors.append(error)
        inject(-1)
        assert (rig.used, rig.graphs) == (0, 0), (point, rig.failed_in)
    return errors


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_call_that_fails_anywhere_fails_as_a_whole_and_the_next_works(
    bundle, rig, expected, step
):
    """Load, capture and replay, with an error that does not lose the context at every call."""

    def attempt():
        with load(bundle) as pipe:
            for _ in range(2):
                assert np.array_equal(generate(pipe), expected)
            rig.fail_after(-1, 0)  # giving memory back does not fail

    def inject(point):
        rig.fail_after(point, REFUSED)

    errors = interrupt_everywhere(rig, count_calls(rig, attempt), step, inject, attempt)
    assert len(errors) > 50 // step
    assert all(isinstance(error, BackendError) for error in errors)
    attempt()


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_no_memory_at_any_allocation_is_an_error_and_the_next_works(bundle, rig, expected, step):
    def attempt():
        with load(bundle) as pipe:
            assert np.array_equal(generate(pipe), expected)
            generate(pipe, num_images_per_prompt=2)

    errors = interrupt_everywhere(rig, 60, step, rig.fail_allocation, attempt)
    assert len(errors) > 20 // step
    assert all("out of memory" in str(error) for error in errors)
    attempt()


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_context_lost_at_any_call_is_said(bundle, rig, step):
    """In a copy of the process for every call; nothing crashes, and closing touches nothing."""

    def attempt():
        with load(bundle) as pipe:
            generate(pipe)
            generate(pipe)

    count = count_calls(rig, attempt)

    def run():
        with pytest.raises(DeviceLostError):
            attempt()
        assert rig.violation is None

    for point in range(0, count, step):
        rig.fail_after(point, LOST)
        in_child(run)
    rig.fail_after(-1, 0)
