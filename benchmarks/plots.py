"""Plots of results, as the text of an SVG each: the same figures give the same bytes.

Knows the figures of each result's file; run by `benchmarks/results.py`.
"""

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "sdrt"
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

Result = dict[str, Any]
WAYS = {"short_p95": "up to 8 steps", "p95": "all"}
LORA_WAYS = {
    "rows": "factors of rows",
    "groups": "grouped by file",
    "diffusers": "diffusers, one by one",
}


def svg_of(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return buffer.getvalue()


def serve_load(result: Result) -> str:
    """p95 of short and of all requests over the load."""
    rows = {name: row for name, row in result["figures"].items() if name.endswith("%")}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    ways = [way for way in next(iter(rows.values())) if way != "simulated"]
    for axis, (key, title) in zip(axes, WAYS.items(), strict=True):
        for way in ways:
            values = [row[way][key] for row in rows.values()]
            axis.plot([float(load[:-1]) for load in rows], values, marker="o", label=way)
        axis.set(title=title, xlabel="load, % of capacity", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("95 % are done within, seconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return svg_of(figure)


def serve_sim(result: Result) -> str:
    """p95 of fleets over the load of each replica, a panel for each kind of replica."""
    kinds = {name: row for name, row in result["figures"].items() if isinstance(row, dict)}
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(9, 3.4), squeeze=False, layout="constrained"
    )
    for axis, (name, row) in zip(axes[0], kinds.items(), strict=True):
        for replicas, by_load in row["latency"].items():
            values = [latency["p95"] for latency in by_load.values()]
            label = f"{replicas} replica" + "s" * (replicas != "1")
            axis.plot([float(load[:-1]) for load in by_load], values, marker="o", label=label)
        axis.axhline(row["within"], color="grey", ls="--")
        axis.set(title=name, xlabel="load, % of capacity", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("95 % are done within, seconds")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return svg_of(figure)


def latency(result: Result) -> str | None:
    """What every engine reaches in the UNet and the decoder, and the limit of its dtype; None for
    figures of before the limit was measured.
    """
    report = result["figures"]
    if "limits" not in report:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.0), sharey=True, layout="constrained")
    colours = {dtype: f"C{i}" for i, dtype in enumerate(report["limits"])}
    # Of some only complete images can be timed.
    engines = [engine for engine in report["engines"] if "unet" in engine["parts"]]
    # sdrt bench calls diffusers the reference.
    names = [engine["name"].replace("reference", "diffusers") for engine in engines]
    for axis, part in zip(axes, ("unet", "decode"), strict=True):
        rates = [e["parts"][part]["flops_per_second"] / 1e9 for e in engines]
        bars = axis.barh(names, rates, color=[colours[e["dtype"]] for e in engines])
        axis.bar_label(bars, fmt="%.0f", padding=2)
        for dtype, limit in report["limits"].items():
            axis.axvline(
                limit["flops_per_second"] / 1e9, color=colours[dtype], ls="--", label=dtype
            )
        axis.set(title=part, xlabel="GFLOP/s; dashed: a large matrix product")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return svg_of(figure)


def scaling(result: Result) -> str:
    """Seconds over what grows, a line for every sweep."""
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for name, sweep in result["figures"].items():
        least = min(float(at) for at in sweep["seconds"])
        grown = [float(at) / least for at in sweep["seconds"]]
        label = f"{name}: {sweep['exponent']:.2f}"
        axis.plot(grown, list(sweep["seconds"].values()), marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel="times the least", ylabel="seconds")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    return svg_of(figure)


MARKERS = {"preset": "*", "output": "D", "steps": "s"}  # by what a way's name has


def fewer(result: Result) -> str:
    """Time of an image over its distance from the full run's, a point for each way."""
    ways = {name: way for name, way in result["figures"]["ways"].items() if name != "full"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (key, title) in zip(axes, {"psnr": "PSNR, dB", "ssim": "SSIM"}.items(), strict=True):
        for name, way in ways.items():
            marker = next((m for part, m in MARKERS.items() if part in name), "o")
            axis.plot([way[key]], [1 / way["times_faster"]], ls="", marker=marker, label=name)
        axis.set(xlabel=f"{title} to the full run, median")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("time, of the full run's")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small"
    )
    return svg_of(figure)


def lora_rows(result: Result) -> str:
    """Processor time of an image over the number of LoRA files, a bar for each way."""
    counts = result["figures"]["throughput"]
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for i, (way, label) in enumerate(LORA_WAYS.items()):
        costs = [row[way]["processor_seconds_per_image"] for row in counts.values()]
        bars = axis.bar([x + 0.27 * (i - 1) for x in range(len(counts))], costs, 0.27, label=label)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
    axis.margins(y=0.1)
    axis.set(xticks=range(len(counts)), xticklabels=counts, xlabel="files")
    axis.set(ylabel="processor seconds of an image")
    figure.legend(loc="outside right center", fontsize="small")
    return svg_of(figure)


PLOTS: dict[str, Callable[[Result], str | None]] = {
    "serve_load": serve_load,
    "serve_load_mix": serve_load,
    "serve_sim": serve_sim,
    "latency_256x256": latency,
    "latency_512x512": latency,
    "scaling": scaling,
    "fewer_shapes": fewer,
    "lora_rows_shapes": lora_rows,
}
