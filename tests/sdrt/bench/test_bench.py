"""`sdrt bench`: what it counts, what it compares, and a whole run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdrt.bench import compare, plot
from sdrt.bench.flops import flops
from sdrt.bundle import open_bundle
from sdrt.cli.main import main
from sdrt.process_stats import Others, memory, peak_bytes

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def report(shapes, tmp_path_factory):
    """Two engines, two rounds, with a plot next to it."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "report.json"
    command = [sys.executable, "-m", "sdrt", "bench", "--bundle", str(shapes), "--rounds", "2"]
    command += ["--steps", "1,3", "--engines", "onnxruntime,reference fp32", "--json"]
    done = subprocess.run(
        [*command, "--plot", str(folder / "plot.png")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path.write_text(done.stdout)
    return path


@pytest.mark.reference
def test_a_run_has_every_part_of_every_engine(report):
    actual = json.loads(report.read_text())
    assert [item["name"] for item in actual["engines"]] == ["reference fp32", "onnxruntime on cpu"]
    assert "openvino on cpu" not in actual["left_out"]  # here, but not asked for
    for engine in actual["engines"]:
        parts = engine["parts"]
        assert set(parts) == {"text", "unet", "decode", "picture, 1 steps", "picture, 3 steps"}
        assert 0 < parts["unet"]["p50"] <= parts["unet"]["p99"]
        assert parts["unet"]["of_limit"] > 0
        assert engine["cold_start_seconds"] > engine["load_seconds"] > 0
        cached = engine["memory"]
        assert 10_000_000 < cached["anonymous"] < cached["resident"] <= cached["peak"]
        fractions = parts["picture, 3 steps"]["parts"]
        assert set(fractions) == {"text", "unet", "decode", "PNG", "own"}
        assert fractions["unet"] > parts["picture, 1 steps"]["parts"]["unet"]
    assert actual["engines"][0]["parts"]["unet"]["times_faster"] == 1.0
    slow, fast = (engine["parts"]["picture, 3 steps"] for engine in actual["engines"])
    assert 0.2 < fast["times_faster"] * fast["p50"] / slow["p50"] < 5.0  # a median of pairs


def test_the_plot_has_a_bar_for_each_and_the_limit(report):
    assert Image.open(report.with_name("plot.png")).width == plot.WIDTH
    engine = {"name": "a", "dtype": "float32"}
    parts = {part: {"flops_per_second": rate} for part, rate in (("unet", 50e9), ("decode", 25e9))}
    limits = {"float32": {"flops_per_second": 100e9}}
    said = {"bundle": "b", "size": "64x64", "machine": "m", "date": "d", "limits": limits}
    pixels = np.asarray(plot.draw_plot({**said, "engines": [{**engine, "parts": parts}]}))
    blue = (pixels == (0x44, 0x77, 0xAA)).all(-1)
    full = plot.WIDTH - plot.NAMES - 4 * plot.MARGIN
    lengths = {int(row[: plot.NAMES + full - 4].sum()) for row in blue[3 * plot.MARGIN :]}
    assert lengths == {0, full // 2 + 1, full // 4 + 1}
    assert blue[:, plot.NAMES + full].sum() > 2 * plot.BAR


@pytest.mark.reference
def test_a_run_compared_with_itself_has_no_regressions(report, tmp_path):
    actual = json.loads(report.read_text())
    assert compare.regressions(actual, actual) == []
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**actual, "size": "32x32"}))
    with pytest.raises(compare.UsageError, match="of shapes at 32x32"):
        compare.read_report(other, "shapes", compare.BenchSettings("64x64", (1,), 2))
    with pytest.raises(compare.UsageError, match="2 rounds against the 2 of"):
        compare.read_report(report, "shapes", compare.BenchSettings("64x64", (1,), 2))
    for engine in actual["engines"]:
        engine["parts"] = {"picture, 1 steps": engine["parts"]["picture, 1 steps"]}
    other.write_text(json.dumps(actual))  # as with --parts image
    assert compare.read_report(other, "shapes", compare.BenchSettings("64x64", (1,), 20)) == actual


def turns(seconds, limit=100e9):
    rng = np.random.default_rng(len(seconds))
    return [
        {"seconds": [s * f for f in rng.uniform(0.99, 1.01, 5)], "limit": limit} for s in seconds
    ]


def test_slower_is_reported_from_noise_and_from_a_slow_machine():
    old = turns([1.0, 1.02, 0.99, 1.01, 1.0, 1.03, 0.98])
    assert compare.times_slower(old, turns([1.2] * 8)) == pytest.approx(1.2, rel=0.03)
    assert compare.times_slower(old, turns([1.05, 0.97, 1.0, 1.1, 0.96, 1.0, 1.01])) is None
    assert compare.times_slower(old, turns([2.0] * 8, limit=50e9)) is None
    assert compare.times_slower(old, turns([0.8] * 8)) is None


def test_chance_is_the_rank_sums():
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(1)
    for shift in (0.0, 0.5, 1.0, 2.0):
        then, now = rng.normal(size=7), rng.normal(shift, size=9)
        expected = mannwhitneyu(now, then, alternative="greater", method="exact").pvalue
        assert compare.chance(then, now) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"bundle": "shapes", "size": "64x64"}'])
def test_what_is_no_report_is_refused(shapes, tmp_path, capsys, text):
    (tmp_path / "old.json").write_text(text)
    assert main(["bench", "--compare", str(tmp_path / "old.json")]) == 2
    assert "is not a report of sdrt bench --json" in capsys.readouterr().err


def test_operations_are_those_that_torch_counts(shapes, embedded):
    """Its counter, over the modules that the graphs were exported from, attention written out."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from sdrt.export.unet import Unet
    from sdrt.export.unet_config import UnetConfig
    from sdrt.export.vae import AutoencoderKL, VaeConfig

    def result(kind, config, part):
        return kind(config.from_json(json.loads((embedded / part / "config.json").read_text())))

    bundle = open_bundle(shapes)
    unet, vae = result(Unet, UnetConfig, "unet"), result(AutoencoderKL, VaeConfig, "vae")
    width = {spec.name: spec.shape for spec in bundle.manifest.components["unet"].inputs}["context"]
    context = torch.zeros(2, bundle.manifest.max_tokens, int(width[2]))
    latents = torch.zeros(2, bundle.manifest.latent_channels, 8, 16)
    axes = {"latent_height": 8, "latent_width": 16, "tokens": context.shape[1]}
    for name, rows, call in (
        ("unet", 2, lambda: unet(latents, torch.zeros(2), context)),
        ("vae_decoder", 1, lambda: vae.decode(latents[:1])),
    ):
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            call()
        counted = flops(bundle.graph(name), {**axes, "rows": rows})
        assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="counts from Linux's /proc")
def test_others_on_the_processor_are_seen():
    """Two processes at work, on any number of processors."""
    script = "import time; end = time.time() + 0.8\nwhile time.time() < end: pass"
    busy = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    time.sleep(0.1)
    others = Others()
    time.sleep(0.5)
    fraction = others.busy_fraction()
    for process in busy:
        process.wait()
    # On a machine that is full already, they get what is their due.
    assert fraction > 0.3 * min(2, os.cpu_count()) / os.cpu_count()
    alone = Others()
    end = time.perf_counter() + 0.4
    while time.perf_counter() < end:
        pass
    assert alone.busy_fraction() < fraction + 0.1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_reported_apart(tmp_path):
    """A process with 64 MB of its own and 32 MB mapped from a file."""
    (tmp_path / "file").write_bytes(bytes(32 << 20))
    script = f"""
import mmap, sys
own = bytearray(b"x" * (64 << 20))
file = open({str(tmp_path / "file")!r}, "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[::4096])
print("ready", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    actual = memory(process.pid)
    process.communicate()
    assert 64e6 < actual["anonymous"] < 160e6
    assert 32e6 < actual["mapped"] < 64e6
    assert actual["anonymous"] + actual["mapped"] <= actual["resident"] * 1.01
    assert actual["shared_out"] <= actual["resident"] <= actual["peak"]
    assert memory(process.pid) == {} and peak_bytes(process.pid) == 0  # it is gone
