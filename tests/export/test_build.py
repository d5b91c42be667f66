"""Building: what appears, what is refused, and what is left behind when it goes wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exports import exported_once
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.safetensors import Tensors
from sdrt.engine import compile_cache, parity, select_backend
from sdrt.engine.cpu import has_bf16
from sdrt.errors import BundleError, CheckpointError, ParityError, SdrtError
from sdrt.export import build, validation
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.graph import export_graph
from sdrt.export.unet import Unet

pytestmark = pytest.mark.integration


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def test_the_weights_are_stored_once_and_aligned(tiny_bundle):
    for graph in tiny_bundle.glob("*/model.onnx"):
        assert graph.stat().st_size < 500_000
        model = onnx.load(graph, load_external_data=False)
        with safe_open(graph.with_name("model.safetensors"), framework="np") as file:
            names = set(file.keys())
        outside = [t for t in model.graph.initializer if t.external_data]
        assert {t.name for t in outside} == {n for n in names if not n.startswith("__pad.")}
        for tensor in outside:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert int(place["offset"]) % 256 == 0
            assert place["location"] == "model.safetensors"
        onnx.checker.check_model(str(graph))


def test_every_size_of_a_bundle_makes_images(tiny_bundle):
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        for size in ((32, 32), (48, 32)):
            out = pipe(["a", "b", "c"], num_inference_steps=2, seed=1, size="{}x{}".format(*size))
            assert [image.size for image in out.images] == [size] * 3
            assert out.seeds == [1, 2, 3]
        with pytest.raises(sdrt.UsageError, match=r"32x32, 48x32\nhint: .*multiples of 16"):
            pipe("a", size="40x32")


def test_sides_that_the_model_cannot_halve_are_refused(tiny, tmp_path):
    with pytest.raises(sdrt.UsageError, match=r"40x32: .* multiples of 16"):
        build_bundle(BuildPlan(str(tiny), tmp_path / "b", sizes=((40, 32),)))
    assert nothing_in(tmp_path)


def test_torch_backend_draws_the_same(tiny_bundle):
    images = {}
    for backend in ("torch", "onnxruntime"):
        with sdrt.load(tiny_bundle, backend=backend) as pipe:
            assert pipe.backend == f"{backend} on cpu"
            images[backend] = np.asarray(
                pipe("a red circle", num_inference_steps=3, seed=0).images[0], np.int16
            )
    assert np.abs(images["torch"] - images["onnxruntime"]).max() <= 1


def test_openvino_draws_the_same_exactly_and_nearly_in_bf16(shapes, tmp_path):
    pytest.importorskip("openvino")
    copied = shutil.copytree(shapes, tmp_path / "b")
    manifest = json.loads((copied / "sdrt.json").read_text())
    options = {"prompt": "a red circle on a blue background", "num_inference_steps": 6}
    seeds = range(11)  # with some of them few steps magnify what bf16 rounds

    def generated(backend, bf16, precision="auto"):
        (copied / "sdrt.json").write_text(json.dumps({**manifest, "admitted": bf16}))
        with sdrt.load(copied, backend=backend, precision=precision) as pipe:
            return np.array([pipe(**options, seed=seed).images[0] for seed in seeds], np.float64)

    expected = generated("onnxruntime", {})
    assert np.abs(generated("openvino", {}) - expected).max() <= 1
    assert np.abs(generated("openvino", {"openvino-bf16": 36.0}, "exact") - expected).max() <= 1
    lower = generated("openvino", {"openvino-bf16": 36.0})
    errors = np.mean((lower - expected) ** 2, axis=(1, 2, 3))
    assert np.median(10 * np.log10(255.0**2 / np.maximum(errors, 1e-9))) >= 30
    if has_bf16():
        assert np.abs(lower - expected).max() > 1


@pytest.mark.build
def test_a_part_may_come_from_elsewhere(tiny, tmp_path, build_once):
    from sdrt.export.tiny_vae import AutoencoderTiny, TinyVaeConfig

    config = {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [8] * 4,
        "decoder_block_out_channels": [8] * 4,
    }
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    weights = AutoencoderTiny(TinyVaeConfig.from_json(config)).state_dict()
    save_file(
        {name: tensor.numpy() for name, tensor in weights.items()},
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors",
    )
    bundle = build_once(str(tiny), tmp_path / "b", vae=str(tmp_path))
    assert f"vae {tmp_path}" in open_bundle(bundle).manifest.source
    with sdrt.load(bundle, backend="onnxruntime") as pipe:
        first = pipe("a square", num_inference_steps=2, seed=0).images[0]
        again = pipe("a square", image=first, num_inference_steps=2, seed=0).images[0]
    assert first.size == again.size == (32, 32)
    for wrong, message in ((str(tmp_path / "none"), "no vae at"), ("x.ckpt", "pickle")):
        with pytest.raises(CheckpointError, match=message):
            build_bundle(BuildPlan(str(tiny), tmp_path / "c", vae=wrong))


@pytest.mark.build
def test_what_overflows_in_half_is_kept_in_single(tiny, tmp_path, build_once):
    """A decoder whose middle reaches 1e6 and comes back: black images in fp16."""
    model = shutil.copytree(tiny, tmp_path / "model")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in ("weight", "bias"):
        weights[f"decoder.conv_in.{name}"] = weights[f"decoder.conv_in.{name}"] * np.float32(1e6)
    save_file(weights, path)
    bundle = build_once(str(model), tmp_path / "b", dtype="float16")
    components = open_bundle(bundle).manifest.components
    assert components["vae_decoder"].dtype == "float32"
    assert components["unet"].dtype == components["text_encoder"].dtype == "float16"
    graph = onnx.load(bundle / "vae_decoder" / "model.onnx").graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    assert onnx.TensorProto.FLOAT in kinds and onnx.TensorProto.FLOAT16 not in kinds
    with sdrt.load(bundle, backend="onnxruntime") as pipe:
        assert np.asarray(pipe("a square", num_inference_steps=2, seed=0).images[0]).std() > 0


@pytest.mark.slow
def test_a_component_below_the_floor_in_half_is_kept_in_single(tiny, tmp_path, monkeypatch):
    floor = parity.Floor(cosine=1.0, error=0.0, psnr=300.0)
    monkeypatch.setitem(parity.PARITY_THRESHOLDS, "float16", floor)
    with pytest.raises(ParityError, match="full pipeline"):
        build_bundle(BuildPlan(str(tiny), tmp_path / "b", dtype="float16"))
    assert nothing_in(tmp_path)


def test_a_closed_openvino_engine_says_so(shapes):
    pytest.importorskip("openvino")
    pipe = sdrt.load(shapes, backend="openvino")
    pipe.close()
    with pytest.raises(sdrt.BackendError, match="closed"):
        pipe("a square", num_inference_steps=1)


def test_a_small_model_starts_sooner_on_onnxruntime():
    pytest.importorskip("openvino")
    assert select_backend("auto", size=10_000_000).title == "onnxruntime on cpu"
    assert select_backend("auto", size=2_000_000_000).title == "openvino on cpu"


def test_the_manifest_records_the_validation(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    assert manifest.parity["psnr"] > 60
    for component in manifest.components.values():
        assert component.parity["cosine"] > 0.999999


def bytes_of(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.build
def test_builds_are_reproducible(tiny, tiny_bundle, tmp_path, monkeypatch):
    """All is exported again but the UNet, whose export takes as long as all else."""
    monkeypatch.setattr(validation, "export_graph", unet_once)
    again = build_bundle(
        BuildPlan(str(tiny), tmp_path / "tiny", sizes=((32, 32), (48, 32)), batch=(1, 1, 2))
    )
    assert bytes_of(again) == bytes_of(tiny_bundle)


def unet_once(module, *inputs):
    return (exported_once if isinstance(module, Unet) else export_graph)(module, *inputs)


@pytest.mark.slow
def test_builds_of_other_processes_places_and_times_are_the_same(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "tiny")
    result = []
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "SDRT_HOME": str(tmp_path / f"home{seed}")}
        target = tmp_path / f"elsewhere{seed}" / "b"
        command = [sys.executable, "-m", "sdrt", "build", "--model", "tiny", "--output", target]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, check=True)
        result.append(bytes_of(target))
        for name, content in result[-1].items():
            for place in (tmp_path, Path.home(), Path(sys.prefix), Path(torch.__file__).parent):
                assert str(place).encode() not in content, (name, place)
    assert result[0] == result[1]


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory, build_once):
    return build_once(str(tiny), tmp_path_factory.mktemp("half") / "b", dtype="float16")


def test_fp16_is_stored_in_half(half, tiny_bundle):
    files = [
        open_bundle(b).manifest.files["unet/model.safetensors"].size for b in (half, tiny_bundle)
    ]
    assert files[0] < 0.7 * files[1]
    with sdrt.load(half, backend="onnxruntime") as pipe:
        assert pipe("a", num_inference_steps=2, seed=0).images[0].size == (32, 32)


def test_openvino_computes_half_in_single_if_asked(half, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setenv("SDRT_HOME", str(tmp_path))
    draw = {"prompt": "a", "num_inference_steps": 4, "seed": 0}
    results = []
    for worth in (compile_cache.MIN_WEIGHT_BYTES, 0):
        monkeypatch.setattr(compile_cache, "MIN_WEIGHT_BYTES", worth)
        with sdrt.load(half, backend="openvino", precision="exact") as pipe:
            results.append(np.asarray(pipe(**draw).images[0], np.int16))
    assert np.ptp(results[0]) > 50 and np.abs(results[0] - results[1]).max() <= 2
    stored = Tensors(half / "unet" / "model.safetensors")
    different = {stored[name].tobytes() for name in stored if not name.startswith("__pad.")}
    (weights,) = (tmp_path / "plans").rglob("unet-*/model.bin")
    stored_bytes = sum(map(len, different))
    assert stored_bytes <= weights.stat().st_size < 1.5 * stored_bytes  # not in float32


@pytest.mark.skipif(not has_bf16(), reason="the processor has no bf16")
def test_openvino_computes_half_in_bf16(half):
    pytest.importorskip("openvino")
    assert open_bundle(half).manifest.admitted["openvino-bf16"] >= 35.0
    draw = {"prompt": "a", "num_inference_steps": 4, "seed": 0}
    images = []
    for precision in ("auto", "exact"):
        with sdrt.load(half, backend="openvino", precision=precision) as pipe:
            images.append(np.asarray(pipe(**draw).images[0], np.float64))
    assert 0 < np.mean((images[0] - images[1]) ** 2) < 255.0**2 / 1e3


def test_a_bundle_is_replaced_only_by_force(tiny, tiny_bundle):
    with pytest.raises(BundleError, match="--force"):
        build_bundle(BuildPlan(str(tiny), tiny_bundle))


def test_a_folder_that_is_no_bundle_is_left_alone(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(BundleError, match=r"no sdrt\.json"):
        build_bundle(BuildPlan(str(tiny), tmp_path, force=True))
    assert (tmp_path / "mine.txt").read_text() == "keep"


def nothing_in(folder):
    return list(folder.iterdir()) == []


def change_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def poison(weights):
    next(iter(weights.values())).reshape(-1)[0] = np.nan


def test_below_the_floor_nothing_is_published(tiny, tmp_path, monkeypatch, build_once):
    honest = parity.measure
    monkeypatch.setattr(
        parity,
        "measure",
        lambda actual, expected, is_image: honest(actual * 1.01, expected, is_image=is_image),
    )
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ParityError, match="text_encoder differs from torch: error"):
        build_once(str(tiny), out / "b")
    assert nothing_in(out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "vae/config.json is missing"),
        (lambda f: (f / "tokenizer" / "merges.txt").unlink(), "merges.txt is missing"),
        (
            lambda f: truncate(f / "unet" / "diffusion_pytorch_model.safetensors"),
            "complete safetensors",
        ),
        (
            lambda f: overlap(f / "unet" / "diffusion_pytorch_model.safetensors"),
            "complete safetensors",
        ),
        (
            lambda f: change_weights(f / "text_encoder" / "model.safetensors", poison),
            "NaN",
        ),
        (lambda f: rename_to_pickle(f / "unet"), "pickle"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), "JSON"),
        (
            lambda f: change_weights(
                f / "unet" / "diffusion_pytorch_model.safetensors",
                lambda w: w.pop("conv_in.weight"),
            ),
            "lacks weight conv_in.weight",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(copy, tmp_path, damage, message):
    damage(copy)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=message):
        build_bundle(BuildPlan(str(copy), out / "b"))
    assert nothing_in(out)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def overlap(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rename_to_pickle(folder):
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("shape", "did you mean shapes"),
        ("stable-diffusion-1.5", "did you mean stable-diffusion-v1-"),
        ("nobody/nothing", "HF_HUB_OFFLINE"),
        ("stable-diffusion-v1-5", "sdrt build --model FOLDER"),
        ("model.ckpt", "pickle"),
        ("no-such.safetensors", "no file"),
    ],
)
def test_an_unknown_model_says_what_to_type(model, message):
    with pytest.raises(CheckpointError, match=message):
        build_bundle(BuildPlan(model))


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sdrt.export.graph.write_safetensors", full)
    with pytest.raises(SdrtError, match="no space left"):
        build_bundle(BuildPlan(str(tiny), tmp_path / "b"))
    assert nothing_in(tmp_path)


def test_too_small_a_disk_is_said_before_work_begins(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SdrtError, match="are free"):
        build_bundle(BuildPlan(str(tiny), tmp_path / "b"))


@pytest.mark.build
@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_killed_build_is_in_nobodys_way(tiny, tmp_path, how):
    target = tmp_path / "b"
    command = [sys.executable, "-m", "sdrt", "build", "--model", str(tiny), "--output", str(target)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    partial = tmp_path / ".b.partial"
    deadline = time.monotonic() + 120
    while not (partial / "text_encoder").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -9), said.decode()
    assert not target.exists()
    if how == signal.SIGINT:
        assert not partial.exists() and b"Interrupted" in said
    else:
        build_bundle(BuildPlan(str(tiny), target))
        assert not partial.exists() and open_bundle(target)


def test_nothing_is_like_nothing_and_unlike_something():
    nothing, something = np.zeros((1, 3)), np.ones((1, 3))
    assert parity.measure(nothing, nothing, is_image=False)["cosine"] == 1.0
    assert parity.measure(nothing, something, is_image=False)["cosine"] == 0.0
    assert parity.measure(something, nothing, is_image=False)["cosine"] == 0.0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_nan_never_passes_the_gate(dtype):
    expected = np.ones((1, 3, 8, 8), np.float32)
    actual = expected.copy()
    actual[0, 0, 0, 0] = np.nan
    values = parity.measure(actual, expected, is_image=True)
    with pytest.raises(ParityError):
        parity.check("vae_decoder", values, dtype)
