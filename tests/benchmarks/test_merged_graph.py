"""The UNet's graph with token merging, against diffusers' network whose self-attention at the
highest resolution attends over tokens that are merged one by one.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from sdrt.bundle import Bundle, open_bundle
from sdrt.bundle.embedded import MODELS
from sdrt.bundle.integrity import describe_files
from sdrt.engine import select_backend
from sdrt.engine.axes import axis_lengths, spec_shape

FOLDER = Path(__file__).parents[2] / "benchmarks"
HEIGHT, WIDTH = 4, 6  # of latents


@pytest.fixture
def write_merged_graph(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from merged_graph import write_merged_graph

    return write_merged_graph


def merge(x, normed, attend, ratio):
    """Self-attention of an image's tokens, x and normed [N, C], as the paper's section 4 has it."""
    count = HEIGHT * WIDTH
    destinations = [i * WIDTH + j for i in range(0, HEIGHT, 2) for j in range(0, WIDTH, 2)]
    unit = x / x.norm(dim=-1, keepdim=True)
    nearest = {}
    for source in sorted(set(range(count)) - set(destinations)):
        cosines = unit[destinations] @ unit[source]
        nearest[source] = float(cosines.max()), destinations[int(cosines.argmax())]
    chosen = sorted(nearest, key=lambda source: -nearest[source][0])[: int(count * ratio)]
    target = {source: nearest[source][1] for source in chosen}
    groups: dict[int, list[int]] = {}
    for token in range(count):
        groups.setdefault(target.get(token, token), []).append(token)
    output = attend(torch.stack([normed[members].mean(dim=0) for members in groups.values()]))
    result = torch.empty_like(x)
    for members, of in zip(groups.values(), output, strict=True):
        result[members] = of
    return result


def diffusers_output(feeds, ratio):
    """Of `shapes`, whose highest resolution is the first block down and the last one up."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        MODELS / "shapes", subfolder="unet"
    ).float()
    for attention in (*unet.down_blocks[0].attentions, *unet.up_blocks[-1].attentions):
        (block,) = attention.transformer_blocks
        plain, seen = block.attn1.forward, []
        block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))

        def merged(normed, *_, plain=plain, seen=seen, **__):
            def attend(tokens):
                return plain(tokens[None])[0]

            x = seen.pop()
            return torch.stack([merge(*row, attend, ratio) for row in zip(x, normed, strict=True)])

        block.attn1.forward = merged
    t = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with torch.no_grad():
        return unet(t["sample"], t["timestep"], t["context"]).sample.numpy()


@pytest.mark.reference
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_output_is_that_of_diffusers_whose_tokens_are_merged(
    write_merged_graph, shapes, tmp_path, ratio, backend
):
    shutil.copytree(shapes / "unet", tmp_path / "unet")
    manifest = open_bundle(shapes).manifest
    component = write_merged_graph(tmp_path / "unet", "merged.onnx", ratio, "float32")
    files = describe_files(tmp_path)
    manifest = replace(manifest, components={"unet": component}, files=files, admitted={})
    rng, lengths = np.random.default_rng(0), axis_lengths(manifest, (8 * WIDTH, 8 * HEIGHT), 2)
    feeds = {
        spec.name: rng.normal(size=spec_shape(spec, lengths)).astype(np.float32)
        for spec in component.inputs
    }
    feeds["timestep"] = np.array([999.0, 1.0], np.float32)
    expected = diffusers_output(feeds, ratio)
    plain = diffusers_output(feeds, 0.0)
    actual = select_backend(backend).load(Bundle(tmp_path, manifest, "merged.onnx"), "unet")(feeds)
    assert np.abs(actual["output"] - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(plain - expected).max() > 1e-3 * np.abs(expected).max()
