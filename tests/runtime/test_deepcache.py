"""Feature reuse: images equal to diffusers' UNet with the same feature put back by
hooks, which evaluations are full, and what is refused.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import sdrt
from sdrt.bundle import open_bundle
from sdrt.bundle.manifest import FEATURE, SHALLOW
from sdrt.cli.main import main
from sdrt.errors import BundleError, ParityError, UsageError
from sdrt.export.build import BuildPlan, build_bundle
from sdrt.export.unet import Unet
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.deepcache import with_feature_reuse
from sdrt.runtime.samplers.table import sampler_table

pytestmark = pytest.mark.integration

PROMPT = "a red circle on a blue background"
BACKENDS = ("onnxruntime", "openvino", "torch")
STEPS = 10
GRADIENT = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
MASK = Image.new("L", (64, 64), 0)
MASK.paste(255, (8, 8, 56, 40))


class Cache:
    """Ma et al. 2023 over the reference's UNet: the last residual block of the way up is fed what
    came from below when the model last ran in full, or, of order 1, what the last two extrapolate
    to. The rest is computed, and thrown away.
    """

    def __init__(self, unet, every, order):
        self.every, self.evaluation, self.order = every, -1, order
        self.deep = self.before = None
        self.last = self.distance = 0  # the last full evaluation, and from the one before it
        self.handles = [
            unet.register_forward_pre_hook(self.begun),
            unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(self.entered),
        ]
        self.skip = unet.config.block_out_channels[0]

    def begun(self, module, arguments):
        self.evaluation += 1

    def entered(self, module, arguments):
        import torch

        x, *others = arguments
        since = self.evaluation - self.last
        interval = (self.every + 1) // 2 if self.order and self.before is None else self.every
        if self.deep is None or since == interval:
            self.deep, self.before = x[:, : -self.skip], self.deep
            self.last, self.distance, since = self.evaluation, since, 0
        deep = self.deep
        if self.order and self.before is not None:
            deep = torch.lerp(self.before, deep, 1 + since / self.distance)
        return torch.cat([deep, x[:, -self.skip :]], dim=1), *others

    def close(self):
        for handle in self.handles:
            handle.remove()


@pytest.fixture(scope="module")
def reference(embedded):
    diffusers = pytest.importorskip("diffusers")
    import torch

    base = diffusers.StableDiffusionPipeline.from_pretrained(embedded).to(dtype=torch.float32)

    def run(kind, own, every, order, **options):
        pipe = getattr(diffusers, kind)(**base.components)
        pipe.set_progress_bar_config(disable=True)
        config = own.scheduler_config
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        cache = Cache(pipe.unet, every, order)
        seeded = torch.Generator("cpu").manual_seed(0)
        arguments = {"num_inference_steps": STEPS, "output_type": "np", **options}
        actual = pipe(PROMPT, generator=seeded, **arguments).images[0]
        cache.close()
        return actual

    return run


def decibels(own, expected, **options):
    *_, last = own.steps(PROMPT, num_inference_steps=STEPS, seed=0, **options)
    actual = np.clip(own.decode_to_array(last.latents)[0].transpose(1, 2, 0) * 0.5 + 0.5, 0, 1)
    return 10 * np.log10(1.0 / max(np.mean((actual.astype(np.float64) - expected) ** 2), 1e-12))


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("scheduler", "kind", "every", "options"),
    [
        ("DPMSolverMultistepScheduler", "StableDiffusionPipeline", 3, {}),
        ("DDIMScheduler", "StableDiffusionPipeline", 3, {"feature_reuse_order": 1}),
        ("HeunDiscreteScheduler", "StableDiffusionPipeline", 2, {"guidance_scale": 1.0}),
        ("EulerDiscreteScheduler", "StableDiffusionImg2ImgPipeline", 2, {"image": GRADIENT}),
        (
            "DDIMScheduler",
            "StableDiffusionInpaintPipeline",
            5,
            {"image": GRADIENT, "mask_image": MASK, "strength": 1.0},
        ),
    ],
)
def test_images_are_the_references_with_hooks(pipe, reference, scheduler, kind, every, options):
    own = pipe.with_scheduler(scheduler)
    if "image" in options:
        options = {"strength": 0.8, **options}
    order = options.get("feature_reuse_order", 0)
    passed = {name: value for name, value in options.items() if name != "feature_reuse_order"}
    expected = reference(kind, own, every, order, **passed)
    assert decibels(own, expected, feature_reuse=every, **options) >= 50
    assert decibels(own, expected, **options) < 45  # it does something


def test_a_reuse_of_one_is_the_ordinary_run(pipe):
    plain, same = (
        pipe(PROMPT, num_inference_steps=5, seed=1, **more).images[0].tobytes()
        for more in ({}, {"feature_reuse": 1})
    )
    assert plain == same


def test_the_first_evaluation_and_those_with_new_rows_are_full():
    table = sampler_table({"_class_name": "DDIMScheduler"}, 8)

    def said(every, rows):
        return "".join(
            "f" if full else "." for full in with_feature_reuse(table, every, rows).full_evaluations
        )

    assert said(3, [2] * 8) == "f..f..f."
    assert said(1, [2] * 8) == "ffffffff"
    assert said(100, [1] * 8) == "f......."
    assert said(4, [1, 1, 2, 2, 2, 2, 1, 1]) == "f.f...f."
    assert said(3, [2, 2, 1, 1, 1, 1, 1, 1]) == "f..f..f."


def test_features_are_extrapolated_from_the_last_two():
    table = sampler_table({"_class_name": "DDIMScheduler"}, 11)
    changes = [False] * 8 + [True] + [False] * 2
    reused = with_feature_reuse(table, 4, [2] * 11, changes, order=1)
    said = "".join("f" if full else "." for full in reused.full_evaluations)
    assert said == "f.f...f.f.f"  # another prompt begins again
    assert reused.feature_weights.tolist() == [
        *([0, 0], [1, 0], [0, 0], [1.5, -0.5], [2, -1], [2.5, -1.5], [0, 0], [1.25, -0.25]),
        *([0, 0], [1, 0], [0, 0]),
    ]
    every_second = with_feature_reuse(table, 2, [2] * 11, order=1).full_evaluations
    assert np.flatnonzero(every_second).tolist() == [0, 1, 3, 5, 7, 9]
    plain = with_feature_reuse(table, 3, [2] * 11).feature_weights
    assert {tuple(row) for row in plain.tolist()} == {(0, 0), (1, 0)}


def test_extrapolated_features_are_nearer_to_the_full_run(pipe):
    own = pipe.with_scheduler("DPM++ 2M")
    arguments = {"num_inference_steps": 20, "seed": 3, "output_type": "np"}
    full, plain, extrapolated = (
        own(PROMPT, **arguments, **more).images[0]
        for more in ({}, {"feature_reuse": 2}, {"feature_reuse": 2, "feature_reuse_order": 1})
    )
    assert np.square(extrapolated - full).mean() < 0.5 * np.square(plain - full).mean()


class Counted:
    """An engine that notes the rows of each call in a list that several share."""

    def __init__(self, engine, name, calls):
        self.engine, self.name, self.calls = engine, name, calls
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def __call__(self, feeds):
        self.calls.append((self.name, len(feeds["sample"])))
        return self.engine(feeds)


def counted(pipe):
    calls = []
    both = {name: Counted(pipe.engines[name], name, calls) for name in ("unet", SHALLOW)}
    return replace(pipe, engines={**pipe.engines, **both}), calls


def test_only_full_evaluations_run_the_full_model(pipe):
    own, calls = counted(pipe.with_scheduler("DDIM"))
    own([PROMPT, "a square"], num_inference_steps=7, seed=0, feature_reuse=3)
    assert calls == [("unet" if k % 3 == 0 else SHALLOW, 4) for k in range(7)]
    calls.clear()
    options = {"feature_reuse": 3, "guidance_interval": (0.2, 0.6)}
    own(PROMPT, num_inference_steps=10, seed=0, **options)
    names = "".join("f" if name == "unet" else "." for name, _ in calls)
    assert names == "f.f..f..f."
    assert [rows for _, rows in calls] == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reuses_its_own_feature(shapes, backend):
    """With the feature of the same evaluation, the shallow part gives the whole model's output."""
    rng = np.random.default_rng(0)
    with sdrt.load(shapes, backend=backend, precision="exact") as pipe:
        feeds = {
            "sample": rng.normal(size=(2, 4, 8, 8)).astype(np.float32),
            "timestep": np.array([700.0, 40.0], np.float32),
            "context": rng.normal(size=(2, 32, 128)).astype(np.float32),
        }
        actual = {name: array.copy() for name, array in pipe.engines["unet"](feeds).items()}
        shallow = pipe.engines[SHALLOW]({**feeds, FEATURE: actual[FEATURE]})["output"]
        assert np.abs(shallow - actual["output"]).max() < 1e-5
        other = pipe.engines[SHALLOW]({**feeds, FEATURE: actual[FEATURE][::-1]})["output"]
        assert np.abs(other - actual["output"]).max() > 0.1


def test_the_shallow_graph_has_no_weights_of_its_own(shapes):
    opened = open_bundle(shapes)
    names = opened.manifest.components[SHALLOW].weights
    assert opened.graph(SHALLOW).parent == opened.graph("unet").parent
    assert opened.graph(SHALLOW).stat().st_size < 100_000
    assert any(name.startswith("up_blocks.1.resnets.1.") for name in names)
    deep = ("mid_block", "down_blocks.1", "up_blocks.0", "up_blocks.1.resnets.0")
    assert not [name for name in names if name.startswith(deep) and "norm" not in name]


def test_a_bundle_that_does_not_list_it_is_refused(shapes, tmp_path):
    copy = shutil.copytree(shapes, tmp_path / "copy")
    raw = json.loads((copy / "sdrt.json").read_text())
    assert raw["files"].pop("unet/shallow.onnx")
    (copy / "sdrt.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"lists no unet/shallow\.onnx"):
        open_bundle(copy)


@pytest.mark.parametrize("deterministic", [False, True])
def test_in_flight_with_and_without_it_keep_their_bytes(pipe, deterministic):
    jobs = [{"feature_reuse": every, "num_inference_steps": 6 + every} for every in (1, 2, 3, 2)]
    jobs[3] |= {"guidance_interval": (0.0, 0.5)}
    jobs[2] |= {"feature_reuse_order": 1}
    with InflightBatcher(pipe, rows=16, deterministic=deterministic) as engine:
        handles = [engine.submit(PROMPT, {**job, "seed": i})[0] for i, job in enumerate(jobs)]
        output = [handle.future.result(60) for handle in handles]
        size = next(iter(engine.cost_model.sizes))
        assert (
            engine.estimates.shallow_ratio((size,)) < 1.0
        )  # forecasts have learned what they cost
        assert handles[2].scheduled.full_fraction == 0.4  # 0, 2, 5 and 8 of 10 evaluations
    for i, (job, item) in enumerate(zip(jobs, output, strict=True)):
        alone = pipe(PROMPT, **job, seed=i)
        assert item.image.tobytes() == alone.images[0].tobytes(), job
        assert item.parameters == alone.parameters[0]
    assert "Feature reuse: 3, Feature reuse order: 1" in output[2].parameters


def test_it_is_refused_where_it_cannot_be(pipe, tiny_bundle, shapes, capsys):
    for wrong in (0, -1, 1.5, True, 101):
        with pytest.raises(UsageError, match="feature_reuse"):
            pipe(PROMPT, feature_reuse=wrong)
    without = {name: engine for name, engine in pipe.engines.items() if name != SHALLOW}
    with pytest.raises(UsageError, match="unsupported by"):
        replace(pipe, engines=without)(PROMPT, feature_reuse=2)
    arguments = ["run", PROMPT, "--steps", "1", "--reuse", "3", "--output", "never.png"]
    assert main([*arguments, "--bundle", str(tiny_bundle)]) == 2
    assert "--feature-reuse --force" in capsys.readouterr().err
    for branch in ("2", "-1"):
        assert main(["build", "--model", "shapes", "--feature-reuse", branch, "--force"]) == 2
        assert "branches 0 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shallow_graph_that_is_not_torchs_is_not_published(tiny, tmp_path, monkeypatch):
    complete = Unet.shallow
    monkeypatch.setattr(Unet, "shallow", lambda self, **feeds: 1.01 * complete(self, **feeds))
    with pytest.raises(ParityError, match="unet_shallow differs from torch"):
        build_bundle(BuildPlan(str(tiny), tmp_path / "bundle", feature_reuse=0))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_xl_in_half_precision_from_a_higher_branch(tiny_xl, tmp_path_factory, backend):
    """Its first stage attends to nothing: the shallow part does not read the prompt."""
    folder = tmp_path_factory.getbasetemp() / "xl-reuse"
    if not folder.exists():
        build_bundle(BuildPlan(str(tiny_xl), folder, dtype="float16", feature_reuse=1))
    with sdrt.load(folder, backend=backend) as pipe:
        assert pipe.manifest.components[SHALLOW].dtype == "float16"
        own, calls = counted(pipe.with_scheduler("DDIM"))  # one evaluation a step
        image = own(PROMPT, num_inference_steps=4, seed=0, feature_reuse=2).images[0]
        assert calls == [("unet", 2), (SHALLOW, 2)] * 2 and np.asarray(image).std() > 0
