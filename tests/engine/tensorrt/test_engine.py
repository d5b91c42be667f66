"""What of running plans needs no GPU: which profile serves, what is fed, what is said."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from sdrt.bundle.manifest import Component, TensorSpec
from sdrt.engine import SamplingProgram
from sdrt.engine.cuda.driver import get_device
from sdrt.engine.gpu import detect_gpus
from sdrt.engine.parity import sample_input
from sdrt.engine.tensorrt.engine import TrtEngine
from sdrt.engine.tensorrt.loaded_plan import find_profile
from sdrt.engine.tensorrt.sampling_graph import unet_feeds
from sdrt.errors import BackendError

SMALL = {"sample": ((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8)), "timestep": ((1,), (2,), (8,))}
WIDE = {"sample": ((1, 4, 8, 12), (2, 4, 8, 12), (8, 4, 8, 12)), "timestep": ((1,), (2,), (8,))}


def shapes(rows, width):
    return {"sample": (rows, 4, 8, width), "timestep": (rows,)}


def test_a_profile_is_found_by_its_size():
    assert find_profile("unet", (SMALL, WIDE), shapes(1, 8)) == 0
    assert find_profile("unet", (SMALL, WIDE), shapes(8, 12)) == 1
    for wrong in (shapes(9, 8), shapes(2, 16), shapes(0, 8)):
        with pytest.raises(BackendError, match="--batch or --size"):
            find_profile("unet", (SMALL, WIDE), wrong)


def test_a_plan_is_compared_on_what_a_model_is_really_fed():
    assert sample_input("int32", (2, 32)).max() < 16
    assert sample_input("float32", (3,)).tolist() == [999, 500, 1]
    noise = sample_input("float16", (2, 4, 64, 64))
    assert noise.dtype == np.float16 and 0.9 < noise.std() < 1.1


def test_rows_are_ordered_by_image():
    program = SamplingProgram(
        history=np.zeros((2, 5, 4, 3, 3), np.float32),
        coefficients=np.zeros((2, 2, 5), np.float32),
        timesteps=np.zeros((1, 2), np.float32),
        rows_per_image=(2,),
        columns_per_output=2,
        output_columns=(1,),
        state_columns=(4, 4),
        conditioning={"context": np.arange(4).reshape(2, 2, 1, 1)},
        extra_channels=np.stack([np.full((1, 3, 3), 7.0), np.full((1, 3, 3), 8.0)]),
    )
    both, prompted = unet_feeds(program, 2), unet_feeds(program, 1)
    assert both["context"].ravel().tolist() == [0, 1, 2, 3]
    assert prompted["context"].ravel().tolist() == [1, 3]
    assert both["sample"].shape == (4, 5, 3, 3) and prompted["timestep"].shape == (2,)
    assert both["sample"][:, 4].mean((1, 2)).tolist() == [7, 7, 8, 8]
    assert not both["sample"][:, :4].any()


def test_without_a_gpu_there_is_no_device():
    if detect_gpus().gpus:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match="NVIDIA"):
        get_device(0)


class Mirror:
    """An array that the host and the GPU share, as it is where there is no GPU."""

    def __init__(self, shape):
        self.array = np.zeros(shape, np.float32)

    def upload(self):
        time.sleep(0.0005)

    download = upload


class Plan:
    """A loaded plan that doubles its input, with one set of arrays for everybody."""

    def __init__(self):
        lock = threading.RLock()

        @contextlib.contextmanager
        def use(stream=0):
            with lock:
                yield

        self.device = SimpleNamespace(use=use, synchronize=lambda: None)
        tensors = {"sample": Mirror((2, 3)), "output": Mirror((2, 3))}
        self._bound = SimpleNamespace(tensors=tensors)

    def bind(self, shapes):
        return self._bound

    def run(self, binding):
        time.sleep(0.0005)
        binding.tensors["output"].array[...] = 2 * binding.tensors["sample"].array


def test_pipelines_that_share_a_plan_get_their_own_answers():
    inputs = (TensorSpec("sample", "float32", ("rows", 3)),)
    outputs = (TensorSpec("output", "float32", ("rows", 3)),)
    component = Component(inputs, outputs, "float32", {})
    plan = Plan()
    engines = [TrtEngine("unet", component, plan) for _ in range(2)]

    def call(i):
        fed = [np.full((2, 3), 100 * i + k, np.float32) for k in range(20)]
        return [(item, engines[i % 2]({"sample": item})["output"]) for item in fed]

    with ThreadPoolExecutor(4) as pool:
        created = [pair for pairs in pool.map(call, range(4)) for pair in pairs]
    assert all(np.array_equal(answer, 2 * fed) for fed, answer in created)
