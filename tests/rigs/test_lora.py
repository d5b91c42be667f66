"""LoRA files on refitted plans, on the stand-ins of the driver and of TensorRT for RTX. What those
do not show is said in `driver_rig` and `runtime_rig`.
"""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from lora_files import lora_file
from safetensors.numpy import load_file, save_file

import sdrt
import sdrt.models.shapes
from sdrt.bundle import open_bundle
from sdrt.cli.main import main
from sdrt.errors import BackendError
from sdrt.export.checkpoint import find_checkpoint

pytestmark = pytest.mark.rig
RTX = "tensorrt-rtx"
PROMPT = "a red circle on a blue background"
OPTIONS = {"num_inference_steps": 2, "seed": 0}
CHECKPOINT = Path(sdrt.models.shapes.__path__[0])
CONV = "down_blocks.0.resnets.0.conv1.weight"


@pytest.fixture(scope="module")
def plain(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "shapes"
    return shutil.copytree(shapes, folder, ignore=shutil.ignore_patterns("plans"))


@pytest.fixture(scope="module")
def bundle(plain, tmp_path_factory):
    """With plans that LoRA files can be applied to, validated."""
    folder = shutil.copytree(plain, tmp_path_factory.mktemp("switchable") / "shapes")
    assert main(["build", "--bundle", str(folder), "--backend", RTX, "--switch-lora"]) == 0
    load(folder).close()
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return [
        lora_file(folder / f"{layout}.safetensors", CHECKPOINT, layout, seed=seed, strength=0.3)
        for seed, layout in enumerate(("kohya", "peft"))
    ]


@pytest.fixture(autouse=True)
def nothing_left(rig):
    yield
    assert (rig.used, rig.graphs, rig.modules) == (0, 0, 0)


def load(bundle):
    return sdrt.load(bundle, backend=RTX)


def generate(pipe, **options):
    return np.asarray(pipe(PROMPT, **{**OPTIONS, **options}).images[0])


def sent_weights(pipe, part):
    """What the stand-in's weights were refitted with, by name."""
    return pipe.engines[part].plan._engine.arithmetic._weights


def psnr(a, b):
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return 10 * np.log10(255.0**2 / max(float(np.mean(difference**2)), 1e-9))


def test_files_take_turns_and_leave_nothing(bundle, files, rig):
    first, second = ({str(path): 1.0} for path in files)
    with load(bundle) as pipe, sdrt.load(bundle, backend="onnxruntime", device="cpu") as cpu:
        own = generate(pipe)
        images = []
        for chosen in (first, second, first):
            pipe.set_lora(chosen)
            before = rig.launches
            images.append(generate(pipe))
            assert np.array_equal(images[-1], generate(pipe))
            assert rig.launches == before + 2  # captured again, and one launch each
        assert np.array_equal(images[0], images[2])
        assert not np.array_equal(images[0], images[1])
        assert psnr(images[0], own) < 30
        cpu.set_lora(first)
        assert psnr(images[0], generate(cpu)) > 45
        pipe.set_lora({})
        assert np.array_equal(generate(pipe), own)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_what_is_sent_are_the_weights_that_a_build_merges(bundle, files, part):
    merged = find_checkpoint("shapes").with_loras([f"{files[0]}:0.7"]).weights(part)
    stored = load_file(bundle / part / "model.safetensors")
    with load(bundle) as pipe:
        pipe.set_lora({str(files[0]): 0.7})
        sent = {name: array.copy() for name, array in sent_weights(pipe, part).items()}
        pipe.set_lora({})
        restored = sent_weights(pipe, part)
        assert set(restored) == set(sent)
        assert all(np.array_equal(restored[name], stored[name]) for name in sent)
    assert len(sent) > 10
    changed = 0
    for name, array in sent.items():
        module = name.removesuffix(".T")
        expected = merged[module if module in merged else module.removeprefix("model.")]
        expected = expected.float().numpy()
        expected = expected.T if name.endswith(".T") else expected
        assert np.abs(array - expected).max() <= 1e-6 * max(1, np.abs(expected).max())
        changed += not np.array_equal(array, stored[name])
    assert changed > 10


def test_step_by_step_calls_use_the_files_too(bundle, files):
    with load(bundle) as pipe:
        pipe.set_lora({str(files[0]): 1.0})
        assert psnr(generate(pipe), generate(pipe, on_step=lambda step: None)) > 50


def test_two_pipelines_have_a_set_each(bundle, files):
    one, two = load(bundle), load(bundle)
    own = generate(one)
    two.set_lora({str(files[0]): 1.0})
    assert np.array_equal(generate(one), own)
    assert not np.array_equal(generate(two), own)
    one.close()
    two.close()


def test_a_switch_waits_for_images_and_they_for_it(bundle, files):
    sets = [{}, {str(files[0]): 1.0}]
    with load(bundle) as pipe:
        expected = []
        for chosen in sets:
            pipe.set_lora(chosen)
            expected.append(generate(pipe).tobytes())
        actual = []

        def work():
            actual.extend(generate(pipe).tobytes() for _ in range(6))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for i in range(6):
            pipe.set_lora(sets[i % 2])
        for thread in threads:
            thread.join()
    assert len(actual) == 12 and set(actual) <= set(expected)


def test_tags_of_requests_in_flight_have_their_own_files(bundle, files, home):
    (home / "loras").mkdir(exist_ok=True)
    shutil.copy(files[0], home / "loras" / "first.safetensors")
    with load(bundle) as pipe:
        own = generate(pipe)
        pipe.set_lora({str(files[0]): 1.0})
        changed = generate(pipe)
        pipe.set_lora({})
        with sdrt.InflightBatcher(pipe) as batcher:
            handles = [
                batcher.submit(f"{PROMPT}{tag}", **OPTIONS)[0] for tag in ("", "<lora:first:1>", "")
            ]
            images = [np.asarray(handle.future.result().image) for handle in handles]
    assert [psnr(i, e) > 50 for i, e in zip(images, (own, changed, own), strict=True)] == [True] * 3


def test_without_such_plans_a_file_is_refused_with_the_command(plain, files, capsys, home):
    with load(plain) as pipe:
        own = generate(pipe)
        with pytest.raises(BackendError, match="was not built for other weights") as caught:
            pipe.set_lora({str(files[0]): 1.0})
        command = f"sdrt build --bundle {plain} --backend {RTX} --switch-lora"
        assert f"run `{command}`" in caught.value.hint
        assert np.array_equal(generate(pipe), own)
    out = str(home / "refused.png")
    arguments = ["run", PROMPT, "--bundle", str(plain), "--backend", RTX, "--steps", "1"]
    assert main([*arguments, "--output", out, "--lora", str(files[0])]) == 5
    assert "--switch-lora" in capsys.readouterr().err


def test_sdrt_run_applies_a_file(bundle, files, tmp_path):
    from PIL import Image

    arguments = ["run", PROMPT, "--bundle", str(bundle), "--backend", RTX, "--steps", "2"]
    arguments += ["--seed", "0", "--lora", str(files[0]), "--output", str(tmp_path / "a.png")]
    assert main(arguments) == 0
    with load(bundle) as pipe:
        pipe.set_lora({str(files[0]): 1.0})
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), generate(pipe))


def test_norms_are_refused_by_name(bundle, tmp_path):
    path = tmp_path / "norm.safetensors"
    name = "down_blocks.0.attentions.0.norm"
    size = load_file(bundle / "unet" / "model.safetensors")[f"{name}.weight"].shape
    save_file({f"lora_unet_{name.replace('.', '_')}.w_norm": np.ones(size, np.float32)}, path)
    with load(bundle) as pipe:
        own = generate(pipe)
        with pytest.raises(BackendError, match=rf"not {name}\.weight"):
            pipe.set_lora({str(path): 1.0})
        assert np.array_equal(generate(pipe), own)


def test_all_graphs_of_a_bundle_follow_its_plans(bundle, files):
    """Plans that are built on first use can be switched where the others can."""
    keys = [json.loads(path.read_text())["key"] for path in bundle.glob("plans/*/*.json")]
    switchable = {key["component"] for key in keys if key["refittable"]}
    assert switchable == {"unet", "text_encoder"} and not any(
        key["stripped"] for key in keys if key["refittable"]
    )
    from sdrt.engine.gpu import detect_gpus
    from sdrt.engine.tensorrt.plans import PlanOptions, required_key

    opened, gpu = open_bundle(bundle), detect_gpus().gpus[0]
    control = required_key(opened, "unet_control", RTX, gpu, PlanOptions())
    unet = required_key(opened, "unet", RTX, gpu, PlanOptions())
    assert control.refittable == unet.refittable != ""
    assert required_key(opened, "unet", RTX, gpu, PlanOptions(streamed=True)).refittable == ""
    assert required_key(opened, "vae_decoder", RTX, gpu, PlanOptions()).refittable == ""
    with load(bundle) as pipe:
        pipe.set_lora({str(files[0]): 1.0})
        own = sent_weights(pipe, "unet")
        pipe.engines["unet_control"].loaded()
        control_weights = pipe.engines["unet_control"].loaded().plan._engine.arithmetic._weights
        assert np.array_equal(control_weights[CONV], own[CONV])


def test_low_memory_says_why_it_takes_no_files(bundle, files):
    with (
        sdrt.load(bundle, backend=RTX, low_memory=True) as pipe,
        pytest.raises(BackendError, match="streams its weights") as caught,
    ):
        pipe.set_lora({str(files[0]): 1.0})
        pipe.engines["unet"].loaded()
    assert "low_memory" in caught.value.hint


def test_a_plan_that_ignores_its_new_weights_is_not_used(plain, tmp_path, monkeypatch):
    from ort_arithmetic import OrtArithmetic

    folder = shutil.copytree(plain, tmp_path / "b", ignore=shutil.ignore_patterns("plans"))
    assert main(["build", "--bundle", str(folder), "--backend", RTX, "--switch-lora"]) == 0
    monkeypatch.setattr(OrtArithmetic, "refit", lambda self, weights: None)
    with pytest.raises(BackendError, match="text_encoder differs"):
        load(folder)


@pytest.mark.parametrize("function", ["set_named_weights", "refit_cuda_engine_async"])
def test_a_refusal_of_tensorrt_leaves_the_own_weights(bundle, files, monkeypatch, function):
    from runtime_rig import Refitter

    calls = []
    original = getattr(Refitter, function)

    def refuse_once(self, *arguments):
        calls.append(function)
        return original(self, *arguments) if len(calls) > 1 else False

    with load(bundle) as pipe:
        own = generate(pipe)
        monkeypatch.setattr(Refitter, function, refuse_once)
        with pytest.raises(BackendError, match="failed to replace the weights"):
            pipe.set_lora({str(files[0]): 1.0})
        assert np.array_equal(generate(pipe), own)


def test_weights_that_tensorrt_combined_are_sent_together(bundle, tmp_path):
    """A file for q alone: k and v of the same block have to come with it."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    width = load_file(bundle / "unet" / "model.safetensors")[f"{name}.to_q.weight.T"].shape
    path = tmp_path / "q.safetensors"
    key, rng = f"unet.{name}.to_q", np.random.default_rng(0)
    down = rng.normal(size=(2, width[0])).astype(np.float32)
    up = rng.normal(size=(width[1], 2)).astype(np.float32)
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
    stored = load_file(bundle / "unet" / "model.safetensors")
    with load(bundle) as pipe:
        pipe.set_lora({str(path): 1.0})
        sent = sent_weights(pipe, "unet")
        assert np.allclose(
            sent[f"{name}.to_q.weight.T"],
            stored[f"{name}.to_q.weight.T"] + (up @ down).T,
            atol=1e-5,
        )
        for other in ("to_k", "to_v"):
            assert np.array_equal(
                sent[f"{name}.{other}.weight.T"], stored[f"{name}.{other}.weight.T"]
            )


def test_the_stand_in_refuses_what_tensorrt_does_not_define(bundle, rig):
    import runtime_rig
    import tensorrt_rtx as trt

    with load(bundle) as pipe:
        generate(pipe)
        plan = pipe.engines["unet"].plan
        binding = next(iter(plan._bindings.values()))
        weights = load_file(bundle / "unet" / "model.safetensors")
        with plan.device.use():
            refitter = trt.Refitter(plan._engine, None)
            assert not refitter.set_named_weights("nonsense", trt.Weights(weights[CONV]))
            norm = "conv_norm_out.weight"
            assert not refitter.set_named_weights(norm, trt.Weights(weights[norm]))
            assert not refitter.set_named_weights(CONV, trt.Weights(weights["conv_in.weight"]))
            assert refitter.set_named_weights(CONV, trt.Weights(weights[CONV]))
            plan.enqueue(binding)
            assert not refitter.refit_cuda_engine_async(int(plan.device.stream))
            assert runtime_rig.problems == ["weights are refitted while work is pending"]
            runtime_rig.problems.clear()
            plan.device.synchronize()
            assert refitter.refit_cuda_engine_async(int(plan.device.stream))
            vae = pipe.engines["vae_decoder"].plan
            with pytest.raises(TypeError):
                trt.Refitter(type("E", (), {"plan": {**vae._engine.plan, "stripped": False}}), None)
            plan.weights_version += 1
            binding.close_graph()
        generate(pipe)
