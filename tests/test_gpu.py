"""What only a GPU can show: run by `make gpu-check`, on the embedded model. Each backend that works
here is tried; the others are skipped with their reason.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import sdrt
from sdrt.bundle import open_bundle
from sdrt.engine import list_backends, parity
from sdrt.engine.gpu import detect_gpus, free_memory
from sdrt.engine.onnxruntime.cpu import OrtEngine
from sdrt.engine.plans import plan_from_json
from sdrt.engine.tensorrt.plans import PlanOptions, get_plan
from sdrt.engine.tensorrt.variants import FULL, RTX
from sdrt.errors import BackendError
from sdrt.runtime import load_pipeline

pytestmark = pytest.mark.gpu
PROMPT = "a red circle on a blue background"
OPTIONS = {"num_inference_steps": 8, "seed": 0}
PLANNED = (FULL, RTX)
# A kernel that writes where it must not; a rig knows it by its text.
FAULT = 'extern "C" __global__ void bad() { *(int*)8 = 1; }'


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if reason := detect_gpus().unavailable_reason:
        pytest.skip(reason)
    return detect_gpus().gpus[0]


def candidate_of(backend):
    actual = next(c for c in list_backends() if c.backend == backend and c.device == "cuda")
    if actual.unavailable_reason:
        pytest.skip(actual.unavailable_reason)
    return actual


@pytest.fixture(params=[*PLANNED, "onnxruntime", "torch"])
def backend(request):
    candidate_of(request.param)
    return request.param


@pytest.fixture(params=PLANNED)
def planned(request):
    candidate_of(request.param)
    return request.param


@pytest.fixture(scope="module", params=["float32", "float16"])
def bundle(request, shapes, tmp_path_factory):
    """The embedded model in a folder of its own, so that its plans are built here."""
    from sdrt.export.build import BuildPlan, build_bundle

    folder = tmp_path_factory.mktemp(request.param) / "shapes"
    if request.param == "float32":
        return shutil.copytree(shapes, folder, ignore=shutil.ignore_patterns("plans"))
    return build_bundle(BuildPlan("shapes", folder, dtype="float16"))


def free_bytes(gpu):
    """As `nvidia-smi` counts; skips where the management library is silent."""
    free = free_memory(gpu)
    if free is None:
        pytest.skip("NVIDIA's management library does not say how much memory is free")
    return free


def loaded(bundle, backend):
    pipe = sdrt.load(bundle, backend=backend)
    if not pipe.backend.endswith("cuda"):
        pipe.close()
        pytest.fail(f"{backend} fell back to {pipe.backend}")
    return pipe


def sidecars_of(bundle, kind):
    """Of the UNet's plans of a kind."""
    every = bundle.glob("plans/*/unet-*.json")
    return [path for path in every if json.loads(path.read_text())["key"]["kind"] == kind]


def psnr(a, b):
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return 10 * np.log10(255.0**2 / max(float(np.mean(difference**2)), 1e-9))


def feeds_of(component, lengths):
    rng = np.random.default_rng(1)
    feeds = {}
    for spec in component.inputs:
        shape = tuple(lengths[a] if isinstance(a, str) else a for a in spec.shape)
        if spec.dtype.startswith("int"):
            feeds[spec.name] = rng.integers(0, 20, shape).astype(spec.dtype)
        elif len(shape) == 1:
            feeds[spec.name] = rng.uniform(1, 999, shape).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.normal(size=shape).astype(spec.dtype)
    return feeds


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_components_are_those_of_the_cpu_at_every_number_of_rows(bundle, backend, name):
    opened = open_bundle(bundle)
    component = opened.manifest.components[name]
    exact = OrtEngine(name, opened.graph(name), component)
    engine = candidate_of(backend).load(opened, name)
    sides = {"latent_height": 8, "latent_width": 8, "height": 64, "width": 64}
    for rows in (1,) if name.startswith("vae") else (1, 2, 8, 2):
        for tokens in (32, 64) if name == "unet" else (32,):
            feeds = feeds_of(component, {"rows": rows, "tokens": tokens, **sides})
            actual, expected = engine(feeds), exact(feeds)
            for spec in component.outputs:
                values = parity.measure(actual[spec.name], expected[spec.name], is_image=False)
                parity.check(f"{name} at {rows} rows", values, component.dtype)
    engine.close()
    exact.close()


def test_images_equal_those_of_the_cpu(bundle, backend):
    with loaded(bundle, backend) as own:
        actual = own(PROMPT, num_images_per_prompt=3, **OPTIONS).images
    cpu = next(c for c in list_backends() if c.title == "onnxruntime on cpu")
    with load_pipeline(open_bundle(bundle), cpu) as pipe:
        expected = pipe(PROMPT, num_images_per_prompt=3, **OPTIONS).images
    for a, b in zip(actual, expected, strict=True):
        assert psnr(a, b) >= 35


@pytest.mark.parametrize("scheduler", ["DDIM", "Euler a", "UniPC", "DPM++ 2M Karras", "Heun"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.6)])
def test_the_loop_in_one_launch_equals_the_loop_step_by_step(bundle, planned, scheduler, interval):
    with loaded(bundle, planned) as pipe:
        own = pipe.with_scheduler(scheduler)
        options = {**OPTIONS, "guidance_interval": interval, "num_images_per_prompt": 2}
        for _ in range(2):  # captured, then replayed
            complete = own(PROMPT, **options).images
        steps = own(PROMPT, on_step=lambda step: None, **options).images
        for a, b in zip(complete, steps, strict=True):
            assert psnr(a, b) >= 40


CALLS = {
    "an attention's weights": {"prompt": "a (red:1.4) circle on a [blue] background"},
    "two chunks": {"prompt": "a red circle BREAK on a blue background", "negative_prompt": "x"},
    "sixteen chunks": {"prompt": "a BREAK " * 15 + "b"},
    "unguided": {"guidance_scale": 1.0},
    "embeddings": {"prompt": None},
    "clip skip": {"clip_skip": 1},
    "rescaled, so step by step": {"guidance_rescale": 0.7},
}


@pytest.mark.parametrize("call", CALLS)
def test_an_image_in_one_launch_equals_its_steps(bundle, planned, call):
    """Text encoder, loop and decoder in one graph, against each called for itself."""
    options = {"prompt": PROMPT, "num_images_per_prompt": 2, **OPTIONS, **CALLS[call]}
    with loaded(bundle, planned) as pipe:
        if call == "embeddings":
            width = {s.name: s.shape for s in pipe.engines["unet"].inputs}["context"][2]
            options["prompt_embeds"] = np.random.default_rng(0).normal(size=(1, 32, width))
        for _ in range(2):  # captured, then replayed
            complete = pipe(**options).images
        steps = pipe(on_step=lambda step: None, **options).images
        for a, b in zip(complete, steps, strict=True):
            assert psnr(a, b) >= 40


def test_texts_take_turns_in_one_graph(bundle, planned):
    with loaded(bundle, planned) as pipe:
        first = [np.asarray(pipe(text, **OPTIONS).images[0]) for text in ("a red circle", PROMPT)]
        again = [np.asarray(pipe(text, **OPTIONS).images[0]) for text in ("a red circle", PROMPT)]
        assert all((a == b).all() for a, b in zip(first, again, strict=True))
        assert (first[0] != first[1]).any()


def test_a_stream_of_the_callers_is_worked_in(bundle, planned):
    from cuda.bindings import driver

    from sdrt.engine.cuda.driver import get_device

    device = get_device(0)
    with device.use():
        stream = device.check(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
    with loaded(bundle, planned) as pipe:
        expected = np.asarray(pipe(PROMPT, **OPTIONS).images[0])
    with sdrt.load(bundle, backend=planned, stream=int(stream)) as pipe:
        assert pipe.engines["unet"].stream == int(stream)
        for on_step in (None, lambda step: None):
            actual = pipe(PROMPT, on_step=on_step, **OPTIONS).images[0]
            assert psnr(actual, expected) >= 40
    with device.use():
        device.check(driver.cuStreamDestroy(stream))


def test_in_turn_less_memory_is_taken_and_weights_stream(bundle, planned, gpu):
    options = {"num_images_per_prompt": 2, **OPTIONS}
    with loaded(bundle, planned) as pipe:
        expected = pipe(PROMPT, on_step=lambda step: None, **options).images
        usual = free_bytes(gpu)
    with sdrt.load(bundle, backend=planned, low_memory=True) as pipe:
        actual = pipe(PROMPT, **options).images
        assert free_bytes(gpu) > usual
    for a, b in zip(actual, expected, strict=True):
        assert psnr(a, b) >= 40
    assert any(
        json.loads(path.read_text())["key"]["streamed"] for path in sidecars_of(bundle, planned)
    )


def test_the_budget_is_what_is_taken(bundle, planned, gpu):
    from sdrt.engine.memory_budget import compute_budget

    manifest = open_bundle(bundle).manifest
    before = free_bytes(gpu)
    with loaded(bundle, planned) as pipe:
        pipe(PROMPT, **OPTIONS)
        taken = before - free_bytes(gpu)
    assert taken < 2 * compute_budget(manifest, (64, 64), 2).total + (
        600 << 20
    )  # the context's own


def test_the_largest_batch_is_found_by_one_probe(bundle, backend):
    from sdrt.export.activation_memory import max_batch_images

    assert max_batch_images(open_bundle(bundle), candidate_of(backend)) == 16


def test_attention_is_fused_as_the_inspector_tells(bundle, planned, capsys):
    from sdrt.engine.tensorrt.inspector import ATTENTION, group_nodes, layers_by_node

    opened = open_bundle(bundle)
    nodes = group_nodes(planned, opened.graph("unet"))
    if not nodes[ATTENTION]:
        pytest.skip("no fused kernel serves single precision")
    engine = candidate_of(planned).load(opened, "unet")
    layers = engine.plan.layers()
    engine.close()
    actual = layers_by_node(nodes[ATTENTION], layers)
    assert actual and all(len(into) == 1 for into in actual.values()), (actual, layers[:5])


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_fused_operators_compute_what_the_plain_graph_does(bundle, name, monkeypatch, caplog):
    candidate, opened = candidate_of("onnxruntime"), open_bundle(bundle)
    component = opened.manifest.components[name]
    feeds = feeds_of(component, {"rows": 1, "tokens": 32, "latent_height": 8, "latent_width": 8})
    engine = candidate.load(opened, name)
    assert "without fused operators" not in caplog.text and engine._derived
    fused = {key: value.copy() for key, value in engine(feeds).items()}
    engine.close()
    monkeypatch.setenv("SDRT_ORT_CUDA", "fused=0")
    plain = candidate.load(opened, name)
    for key, value in plain(feeds).items():
        parity.check(name, parity.measure(fused[key], value, is_image=False), component.dtype)
    plain.close()


def test_layouts_take_turns_without_mixing_their_graphs(bundle, planned):
    with loaded(bundle, planned) as pipe:
        calls = [
            {"num_inference_steps": n, "num_images_per_prompt": b} for n in (3, 5) for b in (1, 3)
        ]
        first = [pipe(PROMPT, seed=1, **call).images for call in calls]
        again = [pipe(PROMPT, seed=1, **call).images for call in calls]
        for a, b in zip(first, again, strict=True):
            assert [np.asarray(x).tobytes() for x in a] == [np.asarray(x).tobytes() for x in b]


def test_two_pipelines_share_plans_and_arena(bundle, planned):
    one, two = loaded(bundle, planned), loaded(bundle, planned)
    assert one.engines["unet"].plan is two.engines["unet"].plan
    assert one.engines["unet"].plan.device is one.engines["vae_decoder"].plan.device
    expected = np.asarray(one(PROMPT, **OPTIONS).images[0])
    one.close()
    assert (np.asarray(two(PROMPT, **OPTIONS).images[0]) == expected).all()
    with pytest.raises(BackendError, match="closed"):
        one(PROMPT, **OPTIONS)
    two.close()


def test_memory_comes_back_when_a_pipeline_is_closed(bundle, planned, gpu):
    for _ in range(2):
        loaded(bundle, planned).close()
    before = free_bytes(gpu)
    for _ in range(3):
        with loaded(bundle, planned) as pipe:
            pipe(PROMPT, **OPTIONS)
    assert free_bytes(gpu) >= before - (64 << 20)


def test_a_stripped_plan_filled_in_computes_what_a_full_one_does(bundle, planned, tmp_path, gpu):
    from functools import partial

    from sdrt.engine.cuda.driver import get_device
    from sdrt.engine.plans import get_or_build_plan, plans_folder
    from sdrt.engine.tensorrt.builder import build_plan
    from sdrt.engine.tensorrt.engine import TrtEngine
    from sdrt.engine.tensorrt.loaded_plan import LoadedPlan

    opened = open_bundle(bundle)
    component, graph = opened.manifest.components["unet"], opened.graph("unet")
    stripped = get_plan(opened, "unet", planned, gpu, PlanOptions())
    assert stripped.key.stripped and plans_folder(opened) in stripped.path.parents
    key = replace(stripped.key, stripped=False)
    full = get_or_build_plan(tmp_path, key, partial(build_plan, key, graph))
    assert stripped.size < full.size
    feeds = feeds_of(component, {"rows": 2, "tokens": 32, "latent_height": 8, "latent_width": 8})
    actual = []
    for plan in (stripped, full):
        engine = TrtEngine("unet", component, LoadedPlan(plan, component, graph, get_device(0)))
        actual.append(engine(feeds)["output"].copy())
        engine.close()
    parity.check("stripped", parity.measure(*actual, is_image=False), component.dtype)


def test_a_tampered_plan_is_built_again(bundle, planned, caplog):
    loaded(bundle, planned).close()
    every = [plan_from_json(path) for path in sidecars_of(bundle, planned)]
    plan = next(plan.path for plan in every if not plan.key.streamed)
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    with caplog.at_level("INFO", logger="sdrt"):
        loaded(bundle, planned).close()
    assert "sha256" in caplog.text


def test_a_plan_that_computes_something_else_is_left_for_the_next_backend(bundle, planned, caplog):
    loaded(bundle, planned).close()
    for sidecar in sidecars_of(bundle, planned):
        plan_from_json(sidecar).with_parity({"cosine": 0.5, "error": 1.0})
    with pytest.raises(BackendError, match="differs"):
        sdrt.load(bundle, backend=planned)
    with sdrt.load(bundle) as pipe:
        assert not pipe.backend.startswith(f"{planned} ")
    assert any(r.levelname == "WARNING" and "differs" in r.message for r in caplog.records)
    shutil.rmtree(bundle / "plans")


def take_all_memory(device):
    """Addresses of blocks after which no megabyte is free."""
    blocks, size = [], 1 << 30
    while size >= 1 << 20:
        try:
            blocks.append(device.allocate(size))
        except BackendError as error:
            assert "out of memory" in str(error)
            size //= 2
    return blocks


def test_without_memory_it_says_so_and_stays_usable(bundle, planned):
    from sdrt.engine.cuda.driver import get_device

    device = get_device(0)
    with device.use():
        blocks = take_all_memory(device)
    try:
        with pytest.raises(BackendError):
            sdrt.load(bundle, backend=planned)(PROMPT, num_images_per_prompt=4, **OPTIONS)
    finally:
        with device.use():
            for address in blocks:
                device.free(address)
    with loaded(bundle, planned) as pipe:
        assert pipe(PROMPT, **OPTIONS).images


def test_after_a_fault_for_good_only_a_new_process_is_offered(bundle, planned, gpu):
    """In a process of its own: the GPU's context is lost."""
    code = f"""
import sdrt
from cuda.bindings import driver
from sdrt.engine.cuda.compiler import compile_cuda
from sdrt.engine.cuda.driver import get_device
pipe = sdrt.load({str(bundle)!r}, backend={planned!r})
device = get_device(0)
source = {FAULT!r}
try:
    with device.use():
        module = device.check(driver.cuModuleLoadData(compile_cuda(source, {gpu.sm!r})))
        function = device.check(driver.cuModuleGetFunction(module, b"bad"))
        device.check(driver.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, device.stream, 0, 0))
        device.synchronize()
except sdrt.DeviceLostError as error:
    print("FAULT", error)
try:
    pipe({PROMPT!r}, num_inference_steps=1)
except sdrt.DeviceLostError as error:
    print("LOST", error)
pipe.close()
try:
    sdrt.load({str(bundle)!r})  # on no other backend either
except sdrt.DeviceLostError as error:
    print("AGAIN", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("FAULT", "LOST", "AGAIN"):
        assert word in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("restart the process") == 3


def test_hidden_gpus_and_missing_devices_are_said(bundle):
    command = [sys.executable, "-m", "sdrt", "run", PROMPT, "--bundle", str(bundle)]
    hidden = subprocess.run(
        [*command, "--backend", "tensorrt-rtx"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert hidden.returncode == 5 and "CUDA_VISIBLE_DEVICES" in hidden.stderr
    missing = subprocess.run([*command, "--device", "99"], capture_output=True, text=True)
    assert missing.returncode == 2 and "device 99" in missing.stderr


def test_no_torch_in_the_process(bundle, planned, tmp_path):
    code = f"""
import sys, sdrt
with sdrt.load({str(bundle)!r}, backend={planned!r}) as pipe:
    pipe({PROMPT!r}, num_inference_steps=2)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
