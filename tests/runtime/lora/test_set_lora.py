"""LoRA files put on and taken off between images, against diffusers' images and builds."""

import json
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from lora_files import lora_file
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

import sdrt
from sdrt.bundle.integrity import hash_file
from sdrt.bundle.store import home
from sdrt.engine.axes import axis_lengths, spec_shape
from sdrt.errors import BundleError, CheckpointError
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.checkpoint import find_checkpoint
from sdrt.runtime import LoraWeight
from sdrt.runtime.lora.adapters import read_lora

pytestmark = [
    pytest.mark.integration,
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PROMPT = "a red circle on a blue background"
BACKENDS = ("onnxruntime", "openvino", "torch")
SAMPLE = [pytest.param(b, marks=[pytest.mark.grid] * (b != "onnxruntime")) for b in BACKENDS]


@pytest.fixture(scope="module")
def files(tmp_path_factory, embedded):
    folder = tmp_path_factory.mktemp("loras")
    return {
        "kohya": lora_file(folder / "first.safetensors", embedded, "kohya"),
        "peft": lora_file(folder / "second.safetensors", embedded, "peft", seed=1, strength=0.2),
    }


@pytest.fixture(scope="module")
def reference(embedded):
    def result():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(embedded).to(dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return result


def their_image(pipe, steps=6, guidance_scale=7.5):
    actual = pipe(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).images[0]
    return actual.astype(np.float64)


def our_image(pipe, steps=6, **options):
    *_, last = pipe.steps(PROMPT, num_inference_steps=steps, seed=0, **options)
    return np.clip(pipe.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)


def psnr(a, b):
    return -10 * np.log10(max(np.mean((a.astype(np.float64) - b) ** 2), 1e-12))


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param({"kohya": 0.8}, marks=pytest.mark.grid),
        pytest.param({"peft": 1.0}, marks=pytest.mark.grid),
        {"kohya": 0.5, "peft": -0.6},
    ],
)
def test_images_match_diffusers(shapes, files, reference, chosen):
    theirs = reference()
    for name in chosen:
        theirs.load_lora_weights(str(files[name]), adapter_name=name)
    theirs.set_adapters(list(chosen), list(chosen.values()))
    expected = their_image(theirs)
    assert psnr(their_image(reference()), expected) < 25  # the files do something
    for backend in BACKENDS:
        with sdrt.load(shapes, backend=backend, precision="exact") as pipe:
            pipe.set_lora({files[name]: weight for name, weight in chosen.items()})
            assert psnr(our_image(pipe), expected) >= 50, backend


def test_a_weight_for_the_text_encoder_and_one_for_the_unet(shapes, files, reference):
    theirs = reference()
    theirs.load_lora_weights(str(files["kohya"]), adapter_name="kohya")
    theirs.set_adapters(["kohya"], [{"text_encoder": 1.0, "unet": 0.4}])
    with sdrt.load(shapes, backend="onnxruntime", precision="exact") as pipe:
        pipe.set_lora({files["kohya"]: LoraWeight(text_encoder=1.0, unet=0.4)})
        assert psnr(our_image(pipe), their_image(theirs)) >= 50
        (text,) = pipe(PROMPT, num_inference_steps=1, seed=0).parameters
        assert text.startswith(f"{PROMPT} <lora:first:1:0.4>\n")
        pipe.set_lora({files["kohya"]: 0.4})
        assert psnr(our_image(pipe), their_image(theirs)) < 40


@pytest.mark.parametrize("backend", SAMPLE)
def test_what_is_taken_off_leaves_nothing(shapes, files, backend):
    def png(*loras):
        pipe.set_lora({files[name]: 0.7 for name in loras})
        return pipe(PROMPT, num_inference_steps=3, seed=0).images[0].tobytes()

    with sdrt.load(shapes, backend=backend) as pipe:
        bare = pipe(PROMPT, num_inference_steps=3, seed=0).images[0].tobytes()
        first, second = png("kohya"), png("peft")
        assert len({bare, first, second}) == 3
        assert png("kohya") == first
        assert png() == bare


def every_kind(path, checkpoint):
    """A file that changes each weight of the UNet by one algorithm or another, and each bias."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape, std=1.0):
        return torch.randn(shape, generator=generator) * std

    saved, seen = {}, [0, 0, 0, 0]
    tensors = load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in tensors.items():
        module, _, kind = name.rpartition(".")
        stem, std = "lora_unet_" + module.replace(".", "_"), 0.3 * float(weight.std())
        if kind == "bias" or weight.ndim == 1:
            end = "diff_b" if kind == "bias" else "w_norm"
            saved[f"{stem}.{end}"] = noise(*weight.shape, std=0.05)
            continue
        out, inside = len(weight), weight[0].numel()
        turn = sum(seen) % 4
        seen[turn] += 1
        if turn == 0:
            saved |= {f"{stem}.lokr_w1": noise(2, 1), f"{stem}.lokr_w2": noise(out // 2, inside)}
            saved[f"{stem}.lokr_w2"] = (std * saved[f"{stem}.lokr_w2"]).reshape(
                out // 2, *weight.shape[1:]
            )
        elif turn == 1:
            for i in (1, 2):
                saved[f"{stem}.hada_w{i}_a"] = noise(out, 2, std=std**0.5)
                saved[f"{stem}.hada_w{i}_b"] = noise(2, inside, std=0.7)
        else:
            saved[f"{stem}.lora_down.weight"] = noise(2, *weight.shape[1:], std=std)
            saved[f"{stem}.lora_up.weight"] = noise(out, 2, *[1] * (weight.ndim - 2))
            axis, shape = (0, (out, 1)) if turn == 2 else (1, (1, weight.shape[1]))
            lengths = weight.transpose(0, axis).flatten(1).norm(dim=1) * (1.2 if turn == 2 else 0.9)
            saved[f"{stem}.dora_scale"] = lengths.reshape(*shape, *[1] * (weight.ndim - 2))
    assert min(seen) > 5
    save_file({name: tensor.contiguous() for name, tensor in saved.items()}, path)
    return path


def test_every_kind_makes_the_references_image_and_leaves_nothing(
    shapes, files, reference, embedded, tmp_path
):
    path = every_kind(tmp_path / "l.safetensors", embedded)
    theirs = reference()
    built = find_checkpoint("shapes").with_loras([f"{path}:0.8"]).weights("unet")
    assert not theirs.unet.load_state_dict(built).missing_keys
    expected = their_image(theirs, 3)
    assert psnr(their_image(reference(), 3), expected) < 30
    for backend in BACKENDS:
        with sdrt.load(shapes, backend=backend, precision="exact") as pipe:
            bare = our_image(pipe, 3)
            pipe.set_lora({path: 0.8})
            first = our_image(pipe, 3)
            assert psnr(first, expected) >= 50, backend
            pipe.set_lora({files["peft"]: 0.7, path: 1.0})
            pipe.set_lora({path: 0.8})
            assert np.array_equal(our_image(pipe, 3), first), backend
            pipe.set_lora({})
            assert np.array_equal(our_image(pipe, 3), bare), backend


@pytest.mark.parametrize("backend", SAMPLE)
def test_the_graphs_over_its_weights_carry_them_too(shapes, files, backend):
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.normal(size=(1, 4, 8, 8)).astype(np.float32),
        "timestep": np.array([500.0], np.float32),
        "context": rng.normal(size=(1, 32, 128)).astype(np.float32),
    }
    with sdrt.load(shapes, backend=backend, precision="exact") as pipe:
        unet, shallow, control = (
            pipe.engines[name] for name in ("unet", "unet_shallow", "unet_control")
        )
        lengths = axis_lengths(pipe.manifest, (64, 64))
        off = {
            spec.name: np.zeros(spec_shape(spec, lengths), np.float32)
            for spec in control.inputs
            if spec.name not in feeds
        }
        bare = unet(feeds)["output"].copy()
        pipe.set_lora({files["kohya"]: 0.8})
        actual = {name: array.copy() for name, array in unet(feeds).items()}
        again = shallow({**feeds, "feature": actual["feature"]})["output"]
        assert np.abs(again - actual["output"]).max() < 1e-5 < np.abs(bare - again).max()
        assert np.abs(control({**feeds, **off})["output"] - actual["output"]).max() < 1e-5
        pipe.set_lora({})
        feature = unet(feeds)["feature"].copy()
        assert np.abs(shallow({**feeds, "feature": feature})["output"] - bare).max() < 1e-5
        assert np.abs(control({**feeds, **off})["output"] - bare).max() < 1e-5


@pytest.mark.slow
def test_the_image_of_a_build_with_the_file(tiny, tiny_bundle, tmp_path):
    path = lora_file(tmp_path / "l.safetensors", tiny, "kohya")
    built = build_bundle(
        BuildPlan(str(tiny), tmp_path / "fused", sizes=((32, 32),), loras=(f"{path}:0.8",))
    )
    with sdrt.load(built, backend="onnxruntime") as pipe:
        expected = our_image(pipe)
    with sdrt.load(tiny_bundle, backend="onnxruntime") as pipe:
        assert psnr(our_image(pipe), expected) < 40
        pipe.set_lora({path: 0.8})
        assert psnr(our_image(pipe), expected) >= 50


def test_an_lcm_lora_makes_a_pipeline_of_few_steps(shapes, files, reference):
    theirs = reference()
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(str(files["kohya"]))
    theirs.fuse_lora()
    expected = their_image(theirs, steps=4, guidance_scale=1.0)
    with sdrt.load(shapes, backend="onnxruntime") as pipe:
        pipe.set_lora({files["kohya"]: 1.0})
        actual = our_image(pipe.with_scheduler("LCM"), steps=4, guidance_scale=1.0)
    assert psnr(actual, expected) >= 50


def test_alphas_that_peft_stores_next_to_the_tensors(embedded, reference, tmp_path):
    theirs = reference()
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_v"], alpha_pattern={"to_v": 2}
    )
    config.init_lora_weights = False
    theirs.unet.add_adapter(config)
    from peft import get_peft_model_state_dict

    kind = diffusers.StableDiffusionPipeline
    kind.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs.unet),
        unet_lora_adapter_metadata=config.to_dict() | {"target_modules": ["to_q", "to_v"]},
    )
    expected = reference()
    expected.load_lora_weights(tmp_path)
    expected.fuse_lora()
    changes = read_lora(tmp_path / "pytorch_lora_weights.safetensors", 1.0).changes
    state, base = expected.unet.state_dict(), reference().unet.state_dict()
    for (_, module), change in changes.items():
        name = next(n for n in base if n.replace(".", "_") == f"{module}_weight")
        fused = state[name.replace(".weight", ".base_layer.weight")].numpy()
        delta = change.delta(fused.shape, 1.0)
        assert np.abs(delta).max() > 1e-3
        np.testing.assert_allclose(base[name].numpy() + delta, fused, atol=1e-5)


def test_bfloat16_files_are_read(files, embedded, tmp_path):
    half = {n: t.bfloat16() for n, t in load_file(files["kohya"]).items()}
    save_file(half, tmp_path / "half.safetensors")
    actual = read_lora(tmp_path / "half.safetensors", 1.0).changes
    for place, change in read_lora(files["kohya"], 1.0).changes.items():
        for kind, factor in change.factors.items():
            expected = torch.from_numpy(np.array(factor)).bfloat16().float().numpy()
            assert np.array_equal(actual[place].factors[kind], expected)


def test_files_for_another_model_are_refused_and_change_nothing(pipe, tmp_path, files):
    bare = pipe(PROMPT, num_inference_steps=2, seed=0).images[0].tobytes()
    other = {f"lora_unet_nowhere_{i}_to_q.lora_down.weight": torch.zeros(2, 8) for i in range(7)}
    other["lora_unet_conv_in.lora_down.weight"] = torch.zeros(2, 4, 3, 3)
    cases = {
        "nowhere": other,
        "unknown": {f"what.{i}": torch.zeros(1) for i in range(6)},
        "part": {"lora_te2_text_model_x.lora_down.weight": torch.zeros(2, 2)},
        "nan": {"lora_unet_conv_in.lora_down.weight": torch.full((2, 4, 3, 3), torch.nan)},
    }
    messages = {
        "nowhere": r"no lora_unet_nowhere_0_to_q: 7 keys \(.*_4_to_q, \.\.\) of 8 do not fit",
        "unknown": r"6 keys \(what.0, what.1, what.2, what.3, what.4, \.\.\) of no known layout",
        "part": "no place for lora_te2_text_model_x",
        "nan": "NaN",
    }
    for name, tensors in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=messages[name]):
            pipe.set_lora({files["peft"]: 1.0, tmp_path / f"{name}.safetensors": 1.0})
    (tmp_path / "cut.safetensors").write_bytes(files["peft"].read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="its tensors end at"):
        pipe.set_lora({tmp_path / "cut.safetensors": 1.0})
    with pytest.raises(CheckpointError, match=r"no LoRA named .* in .*loras"):
        pipe.set_lora({"unheard-of": 1.0})
    assert pipe(PROMPT, num_inference_steps=2, seed=0).images[0].tobytes() == bare


def test_a_bundle_without_names_says_what_to_type(shapes, files, tmp_path):
    old = shutil.copytree(shapes, tmp_path / "old")
    for part in ("unet", "text_encoder"):
        path = old / part / "model.safetensors"
        marked = path.read_bytes().replace(b'"names":"checkpoint"', b'"named":"checkpoint"', 1)
        path.write_bytes(marked)
    manifest = json.loads((old / "sdrt.json").read_text())
    for part in ("unet", "text_encoder"):
        name = f"{part}/model.safetensors"
        manifest["files"][name]["sha256"] = hash_file(old / name)
    (old / "sdrt.json").write_text(json.dumps(manifest))
    with (
        sdrt.load(old, backend="onnxruntime") as pipe,
        pytest.raises(BundleError, match="sdrt build --model shapes --force"),
    ):
        pipe.set_lora({files["kohya"]: 1.0})


@pytest.mark.rest
def test_the_command_line_takes_files_and_names(shapes, files, tmp_path):
    (home() / "loras").mkdir(exist_ok=True)
    shutil.copyfile(files["peft"], home() / "loras" / "style.safetensors")
    command = [sys.executable, "-m", "sdrt", "run", PROMPT, "--steps", "2", "--seed", "0"]
    command += ["--bundle", str(shapes), "--backend", "onnxruntime", "--output"]

    def run(name, *more):
        path = tmp_path / name
        subprocess.run([*command, str(path), *more], check=True, capture_output=True)
        return Image.open(path)

    both = run("both.png", "--lora", "style:0.8", "--lora", f"{files['kohya']}:-0.3")
    again = run("again.png", "--lora", f"{files['peft']}:0.8", "--lora", f"{files['kohya']}:-0.3")
    assert both.tobytes() == again.tobytes() != run("bare.png").tobytes()
    first = both.info["parameters"].splitlines()[0]
    assert first == f"{PROMPT} <lora:style:0.8> <lora:first:-0.3>"
