"""Plans as files: what a key holds, when a plan may be used, and what becomes of damaged ones."""

import json
import multiprocessing
import os
import time
from dataclasses import replace

import pytest
from plan_examples import BOTH, H100, KEY, L4, build

from sdrt.bundle import Bundle
from sdrt.bundle.manifest import FLOAT32_GRAPH, Component, FileRecord, Manifest, TensorSpec
from sdrt.engine.gpu import NO_DEVICE, GpuInventory, explain_no_gpu
from sdrt.engine.plan_signing import is_signature_valid, read_signed, sign, write_signed
from sdrt.engine.plans import (
    BuildSettings,
    create_profiles,
    find_plan,
    get_or_build_plan,
    key_differences,
    plan_key,
)
from sdrt.engine.tensorrt.plans import select_targets
from sdrt.engine.tensorrt.variants import PORTABLE, RTX, explain_unavailable
from sdrt.errors import BackendError, BundleError, UsageError


def refuse(out):
    raise AssertionError("it is there already")


def test_a_plan_is_built_once_and_found_again(tmp_path):
    created = get_or_build_plan(tmp_path, KEY, build)
    assert created.path.read_bytes() == b"a plan"
    again = get_or_build_plan(tmp_path, KEY, refuse)
    assert again == created and again.key == KEY and again.peak_bytes == 1000
    with again.verified() as content:
        assert content[:] == b"a plan"


def test_a_plan_serves_what_it_was_built_for_and_more(tmp_path):
    get_or_build_plan(tmp_path, KEY, build)
    assert find_plan(tmp_path, replace(KEY, targets=("sm_89",)))[0]
    assert find_plan(tmp_path, replace(KEY, stripped=True))[0]
    assert find_plan(tmp_path, replace(KEY, level=5), ignored=("level",))[0]


def test_the_plan_for_the_fewest_other_gpus_is_taken(tmp_path):
    get_or_build_plan(tmp_path, KEY, build)
    only = replace(KEY, targets=("sm_89",))
    find = tmp_path / only.path.parent
    find.mkdir()
    elsewhere = get_or_build_plan(tmp_path / "other", only, build)
    for path in elsewhere.path.parent.iterdir():
        path.rename(find / path.name)
    assert find_plan(tmp_path, only)[0].key.targets == ("sm_89",)
    assert find_plan(tmp_path, replace(KEY, targets=("sm_86",)))[0].key.targets == KEY.targets


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "1.8.0"}, "version 1.7.1 built it, here is 1.8.0"),
        ({"targets": ("sm_120",)}, "it is for sm_86, sm_89, not sm_120"),
        ({"gpu": "NVIDIA L4"}, "here is NVIDIA L4"),
        ({"kind": "tensorrt"}, "it is for tensorrt-rtx, not tensorrt"),
        ({"system": "linux-aarch64"}, "this is linux-aarch64"),
        ({"profiles": ({"sample": ((1,), (1,), (1,))},)}, "sizes, batch or prompt length"),
        ({"level": 5}, "its optimisation level is 3, not 5"),
        ({"workspace": 1}, "workspace"),
        ({"graph": "c" * 64}, "the graph has changed"),
        ({"weights": "c" * 64}, "the weights have changed"),
    ],
)
def test_a_plan_for_something_else_is_not_used_and_the_reason_is_said(tmp_path, change, said):
    get_or_build_plan(tmp_path, KEY, build)
    expected = replace(KEY, **change)
    assert expected.digest != KEY.digest
    plan, reason = find_plan(tmp_path, expected)
    assert plan is None and said in reason
    assert key_differences(expected, expected) == []


def test_the_nearest_plan_is_the_one_compared(tmp_path):
    get_or_build_plan(tmp_path, replace(KEY, version="1.0", level=5, workspace=7), build)
    get_or_build_plan(tmp_path, replace(KEY, version="1.6"), build)
    assert "version 1.6 built it" in find_plan(tmp_path, KEY)[1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(b"a plab"), "sha256"),
        (lambda path: path.write_bytes(b"a p"), "3 bytes, 6 were written"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_damaged_plan_is_never_handed_out(tmp_path, damage, said, caplog):
    created = get_or_build_plan(tmp_path, KEY, build)
    damage(created.path)
    with pytest.raises(BackendError, match=said), created.verified():
        raise AssertionError("it was handed out")
    with caplog.at_level("INFO", logger="sdrt"):
        again = get_or_build_plan(tmp_path, KEY, build)
    assert said in caplog.text
    with again.verified() as content:
        assert content[:] == b"a plan"


@pytest.mark.parametrize("text", ["{", "[]", '{"key": {}}', '{"key": {"component": "x"}, "a": 1}'])
def test_a_damaged_sidecar_is_no_plan(tmp_path, text):
    created = get_or_build_plan(tmp_path, KEY, build)
    created.path.with_suffix(".json").write_text(text)
    assert find_plan(tmp_path, KEY)[0] is None
    assert get_or_build_plan(tmp_path, KEY, build) == created


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def fail(out):
        out.write_bytes(b"half")
        raise BackendError("no")

    with pytest.raises(BackendError):
        get_or_build_plan(tmp_path, KEY, fail)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "plans").write_text("not a folder")
    with pytest.raises(BundleError, match="cannot write"):
        get_or_build_plan(tmp_path / "plans", KEY, build)


def test_plans_of_weights_that_are_gone_go_too(tmp_path):
    old = get_or_build_plan(tmp_path, replace(KEY, weights="c" * 64), build)
    elsewhere = get_or_build_plan(tmp_path, replace(KEY, weights="c" * 64, version="2"), build)
    neighbour = get_or_build_plan(tmp_path, replace(KEY, graph="d" * 64), build)
    get_or_build_plan(tmp_path, KEY, build)
    assert not old.path.exists() and elsewhere.path.exists() and neighbour.path.exists()


def test_a_components_second_graph_has_a_plan_of_its_own(tmp_path):
    names = ("model.onnx", FLOAT32_GRAPH, "model.safetensors")
    files = {f"vae_decoder/{name}": FileRecord(1, name) for name in names}
    bundle = Bundle(tmp_path, replace(manifest(), files=files))
    settings = BuildSettings(RTX, "1", ("sm_89",))
    usual = plan_key(bundle, "vae_decoder", settings)
    exact = plan_key(bundle.in_float32("vae_decoder"), "vae_decoder", settings)
    assert usual.graph != exact.graph and usual.path != exact.path
    assert usual.weights == exact.weights


def slow_build(out):
    time.sleep(0.5)
    out.write_bytes(str(os.getpid()).encode())
    return 0.5, 0


def wait_for_plan(folder, results):
    results.put(get_or_build_plan(folder, KEY, slow_build).path.read_bytes())


def test_two_processes_build_one_plan_once(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=wait_for_plan, args=(tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    created = {results.get(timeout=30) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(created) == 1


def test_the_validation_is_stored_with_the_plan(tmp_path):
    get_or_build_plan(tmp_path, KEY, build).with_parity({"cosine": 1.0})
    assert get_or_build_plan(tmp_path, KEY, refuse).parity == {"cosine": 1.0}


def manifest(**values):
    specs = (
        TensorSpec("sample", "float16", ("rows", 4, "latent_height", "latent_width")),
        TensorSpec("context", "float16", ("rows", "tokens", 768)),
    )
    latents = (TensorSpec("latents", "float16", ("rows", 4, "latent_height", "latent_width")),)
    parts = {"unet": specs, "vae_decoder": latents}
    names = {"name": "x", "source": "x", "opset": 23, "parity": {}, "preview": (), "files": {}}
    return Manifest(
        sizes=((512, 512), (768, 512)),
        batch=(1, 2, 4),
        latent_channels=4,
        downscale=8,
        max_tokens=77,
        components={name: Component(s, (), "float16", {}) for name, s in parts.items()},
        **names,
        **values,
    )


def test_there_is_one_profile_per_size_with_two_rows_per_image():
    m = manifest()
    first, second = create_profiles(m, "unet", m.components["unet"].inputs)
    assert first["sample"] == ((1, 4, 64, 64), (4, 4, 64, 64), (8, 4, 64, 64))
    assert second["sample"][1] == (4, 4, 64, 96)
    assert second["context"] == ((1, 77, 768), (4, 77, 768), (8, 1232, 768))
    decoder = create_profiles(m, "vae_decoder", m.components["vae_decoder"].inputs)
    assert decoder[1]["latents"] == ((1, 4, 64, 96),) * 3
    with pytest.raises(BackendError, match="'frames'"):
        create_profiles(m, "unet", (TensorSpec("sample", "float16", ("frames",)),))


def test_targets_are_those_that_can_be_built():
    assert select_targets(RTX, None, ()) == PORTABLE
    assert select_targets(RTX, L4, ()) == ("sm_89",)
    assert select_targets(RTX, None, ("sm_120", "sm_89", "sm_89")) == ("sm_89", "sm_120")
    assert select_targets("tensorrt", H100, ()) == ("sm_90",)
    with pytest.raises(UsageError, match="--target sm_75"):
        select_targets(RTX, None, ("sm_90",))
    with pytest.raises(UsageError, match="builds here for sm_90"):
        select_targets("tensorrt", H100, ("sm_89",))
    with pytest.raises(BackendError, match="--backend tensorrt-rtx"):
        select_targets("tensorrt", None, ())


def test_what_keeps_tensorrt_from_running_is_said():
    pytest.importorskip("tensorrt_rtx")
    assert explain_unavailable(RTX, BOTH) is None
    assert "NVIDIA H100 is sm_90" in explain_unavailable(RTX, BOTH, index=1)
    assert "update the NVIDIA driver" in explain_unavailable(
        RTX, replace(BOTH, cuda_version=(12, 4))
    )
    assert "CUDA_VISIBLE_DEVICES" in explain_unavailable(
        RTX, GpuInventory(unavailable_reason=explain_no_gpu(NO_DEVICE, ""))
    )
    assert "pip install" in explain_unavailable("tensorrt", BOTH)


def test_why_there_is_no_gpu_is_said():
    assert "CUDA_VISIBLE_DEVICES is '-1'" in explain_no_gpu(0, "-1")
    assert "nvidia-smi" in explain_no_gpu(NO_DEVICE, None)
    assert "CUDA error 804" in explain_no_gpu(804, "0")


def test_sidecars_are_plain_json(tmp_path):
    created = get_or_build_plan(tmp_path, KEY, build)
    raw = json.loads(created.path.with_suffix(".json").read_text())
    assert raw["key"]["targets"] == ["sm_86", "sm_89"] and raw["parity"] is None


def elsewhere(folder, monkeypatch, tmp_path):
    """What another user built, in another home."""
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "other"))
    created = get_or_build_plan(folder, KEY, build)
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "mine"))
    return created


def test_a_plan_from_elsewhere_is_not_used(tmp_path, monkeypatch):
    created = elsewhere(tmp_path / "plans", monkeypatch, tmp_path)
    for _ in range(2):  # before this home has a key of its own, and after
        actual, reason = find_plan(tmp_path / "plans", KEY)
        assert actual is None and "not built here" in reason and created.sha256[:50] in reason
        sign(b"")
    again = get_or_build_plan(tmp_path / "plans", KEY, build)
    assert again.mark != created.mark and find_plan(tmp_path / "plans", KEY)[0] == again


def test_a_plan_that_the_operator_names_is_used(tmp_path, monkeypatch):
    created = elsewhere(tmp_path / "plans", monkeypatch, tmp_path)
    monkeypatch.setenv("SDRT_TRUST_PLANS", f"{'0' * 64}, {created.sha256.upper()}")
    assert find_plan(tmp_path / "plans", KEY)[0] == created
    monkeypatch.setenv("SDRT_TRUST_PLANS", "all")
    with pytest.raises(UsageError, match="SDRT_TRUST_PLANS holds 'all'"):
        find_plan(tmp_path / "plans", KEY)


@pytest.mark.parametrize(
    "change",
    [{"sha256": "0" * 64}, {"size": 3}, {"mark": "0" * 64}, {"mark": ""}, {"mark": 7}],
)
def test_a_sidecar_that_was_changed_is_untrusted(tmp_path, change):
    sidecar = get_or_build_plan(tmp_path, KEY, build).path.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    assert "not built here" in find_plan(tmp_path, KEY)[1]
    get_or_build_plan(tmp_path, KEY, build)
    raw = json.loads(sidecar.read_text())
    raw["key"]["component"] = "vae_decoder"
    sidecar.with_name("vae_decoder-0.json").write_text(json.dumps(raw))
    assert "not built here" in find_plan(tmp_path, replace(KEY, component="vae_decoder"))[1]


def test_a_key_that_others_may_read_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "home"))
    mark = sign(b"x")
    key = tmp_path / "home" / "plans.key"
    assert (
        key.stat().st_mode & 0o777 == 0o600
        and is_signature_valid(b"x", mark)
        and not is_signature_valid(b"y", mark)
    )
    assert [*key.parent.iterdir()] == [key]
    key.chmod(0o644)
    assert not is_signature_valid(b"x", mark)
    assert sign(b"x") != mark and key.stat().st_mode & 0o777 == 0o600
    key.write_bytes(b"")
    assert is_signature_valid(b"x", sign(b"x")) and len(key.read_bytes()) == 32


def test_kernels_from_elsewhere_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.kernels"
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "other"))
    write_signed(path, b"native code")
    assert read_signed(path) == b"native code"
    monkeypatch.setenv("SDRT_HOME", str(tmp_path / "mine"))
    for data in (path.read_bytes(), b"", b"native code"):
        path.write_bytes(data)
        with pytest.raises(OSError, match="not written by this user"):
            read_signed(path)


def test_a_sidecar_without_end_is_left_alone(tmp_path, caplog):
    sidecar = get_or_build_plan(tmp_path, KEY, build).path.with_suffix(".json")
    for text in ("[" * 100_000, " " * 2_000_000):
        sidecar.write_text(text)
        assert find_plan(tmp_path, KEY) == (None, "there is no plan yet")
        assert "is ignored" in caplog.text
