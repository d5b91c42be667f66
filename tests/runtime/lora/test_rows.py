"""LoRA files as factors of rows: images with different files share calls of the model, and each has
the bytes that it has alone.
"""

import logging
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from lora_files import ATTENTION, lora_file
from lora_graphs import with_lora_graphs
from safetensors.torch import load_file, save_file

import sdrt
from sdrt.bundle.manifest import LORA_FACTORS, LORA_PARTS
from sdrt.errors import UsageError
from sdrt.runtime import LoraWeight
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.lora.rows import RowMisfit
from sdrt.runtime.lora.sets import merge_loras
from sdrt.runtime.lora.tags import parse_weight

pytestmark = pytest.mark.integration
PROMPT = "a red circle on a blue background"
OPTIONS = {"num_inference_steps": 4, "seed": 0, "guidance_scale": 2.0}
SECONDS, RANK = 60, 8
UNET = LORA_PARTS["unet"]


@pytest.fixture(scope="module")
def folder(home, embedded):
    folder = home / "loras"
    folder.mkdir(exist_ok=True)
    for seed, (name, layout) in enumerate({"a": "kohya", "b": "peft", "c": "kohya"}.items()):
        path = folder / f"{name}.safetensors"
        lora_file(path, embedded, layout, seed=seed, strength=0.3, only=ATTENTION)
    text = {"strength": 4.0, "only": r"^text_encoder.*layers"}
    lora_file(folder / "text.safetensors", embedded, "kohya", seed=4, **text)
    lora_file(folder / "wide.safetensors", embedded, "kohya", rank=RANK + 1, only=ATTENTION)
    lora_file(folder / "locon.safetensors", embedded, "kohya", strength=0.2)
    tensors = load_file(folder / "b.safetensors")
    name = min(tensors).removesuffix(".lora_A.weight")
    scale = torch.ones(len(tensors[f"{name}.lora_B.weight"]))
    save_file({**tensors, f"{name}.lora_magnitude_vector": scale}, folder / "dora.safetensors")
    misfit = {"lora_unet_nowhere_to_q.lora_down.weight": torch.zeros(2, 8)}
    misfit |= {"lora_unet_nowhere_to_q.lora_up.weight": torch.zeros(8, 2)}
    save_file(misfit, folder / "misfit.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def loaded(shapes, folder, tmp_path_factory):
    bundle = with_lora_graphs(shapes, tmp_path_factory.mktemp("rows") / "rows", RANK)
    with sdrt.load(bundle.folder, backend="onnxruntime") as pipe:
        yield pipe


@pytest.fixture
def pipe(loaded):
    loaded.set_lora({})
    return loaded


def merged(pipe, loras, prompt=PROMPT, **options):
    """The image of a pipeline whose weights carry these files."""
    before = dict(pipe.adapters.chosen)
    pipe.set_lora(loras)
    (image,) = pipe(prompt, **{**OPTIONS, **options}).images
    pipe.set_lora(before)
    return np.asarray(image)


def submit(engine, loras=None, prompt=PROMPT, **options):
    (handle,) = engine.submit(prompt, {**OPTIONS, **options}, loras=loras)
    return handle


def result(handle):
    return np.asarray(handle.future.result(SECONDS).image)


def psnr(actual, expected):
    error = np.square(actual.astype(np.float64) - expected).mean()
    return np.inf if error == 0 else 10 * np.log10(255.0**2 / error)


def pack(pipe, **loras):
    files = merge_loras(
        (sdrt.runtime.lora.names.find_lora_by_name(name), parse_weight(weight))
        for name, weight in loras.items()
    )
    return pipe.lora_rows.pack(files)


class Recorder:
    """An engine whose calls are recorded, and which can be held up."""

    def __init__(self, engine, calls):
        self.engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs
        self.calls, self.name = calls, ""
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, feeds):
        self.entered.set()
        assert self.open.wait(SECONDS)
        factors = feeds.get(LORA_FACTORS)
        sets = 0 if factors is None else len(np.unique(factors, axis=0))
        self.calls.append((self.name, len(feeds["sample"]), sets))
        return self.engine(feeds)

    def close(self):
        pass


@pytest.fixture
def recorded(pipe):
    """A pipeline whose UNets record their calls, and its plain UNet."""
    calls = []
    engines = {name: Recorder(pipe.engines[name], calls) for name in ("unet", UNET)}
    for name, engine in engines.items():
        engine.name = name
    return replace(pipe, engines={**pipe.engines, **engines}), engines["unet"], calls


def submit_together(engine, unet, requests):
    """Handles of requests whose first evaluations share a call: the last has no files, and waits
    in its first evaluation until all others are ready.
    """
    unet.entered.clear()
    unet.open.clear()
    last = submit(engine, seed=9)
    assert unet.entered.wait(SECONDS)
    handles = [submit(engine, *request) for request in requests]
    while any(handle.state != "running" for handle in handles):
        assert not any(handle.future.done() for handle in handles)
        threading.Event().wait(0.001)
    unet.open.set()
    return handles, last


SETS = [{"a": 0.8}, {"b": 1.0}, {"a": LoraWeight(0.5, -0.4), "c": 0.6}, None]


def test_rows_of_three_sets_and_none_share_calls(recorded):
    pipe, unet, calls = recorded
    with InflightBatcher(pipe, rows=16) as engine:
        expected = [result(submit(engine, loras)) for loras in SETS]
        calls.clear()
        changes = pipe.leases.changes
        handles, last = submit_together(engine, unet, [(loras,) for loras in SETS])
        for handle, image in zip(handles, expected, strict=True):
            assert np.array_equal(result(handle), image)
        result(last)
        assert pipe.leases.changes == changes
    assert calls[0] == ("unet", 2, 0)  # before the others came
    assert calls[1:-1] == [(UNET, 10, 4)] * 4  # of three sets and zeros
    assert calls[-1] == (UNET, 8, 4)
    assert len({image.tobytes() for image in expected}) == len(SETS)


def test_images_are_those_of_merged_weights(pipe):
    plain = merged(pipe, {})
    with InflightBatcher(pipe, rows=16) as engine:
        for loras in [*SETS[:3], {"text": 1.0}]:
            actual, expected = result(submit(engine, loras)), merged(pipe, loras)
            assert psnr(actual, expected) > 50 > psnr(plain, expected)


def test_what_needs_no_files_has_the_bytes_of_a_bundle_without_the_graphs(pipe, shapes):
    with sdrt.load(shapes, backend="onnxruntime") as other:
        expected = np.asarray(other(PROMPT, **OPTIONS).images[0])
    with InflightBatcher(pipe, rows=16) as engine:
        assert np.array_equal(result(submit(engine)), expected)


def test_prompts_are_encoded_with_the_files_of_their_own_request(pipe):
    """A set that changes the text encoder alone needs the plain UNet."""
    with InflightBatcher(pipe, rows=16) as engine:
        images = [result(submit(engine, loras)) for loras in ({"text": 1.0}, None, {"text": 0.5})]
        again = [result(submit(engine, loras)) for loras in ({"text": 1.0}, None, {"text": 0.5})]
        assert submit(engine, {"text": 1.0}).scheduled.graph == ""
    assert all(np.array_equal(*pair) for pair in zip(images, again, strict=True))
    assert np.array_equal(images[1], merged(pipe, {}))
    assert len({image.tobytes() for image in images}) == 3


def test_files_add_to_what_the_pipeline_carries(pipe):
    both = merged(pipe, {"a": 0.8, "b": 0.5})
    pipe.set_lora({"b": 0.5})
    with InflightBatcher(pipe, rows=16) as engine:
        handle = submit(engine, None, f"{PROMPT} <lora:a:0.8>")
        assert psnr(result(handle), both) > 50
        text = handle.future.result().parameters.splitlines()[0]
        assert text == f"{PROMPT} <lora:a:0.8> <lora:b:0.5>"
        assert pipe.adapters.chosen and pipe.leases.changes
        assert psnr(result(submit(engine)), merged(pipe, {"b": 0.5})) == np.inf


def test_a_second_pass_has_the_same_files(pipe):
    options = {"hires_scale": 1.5, "hires_upscaler": "Latent", "hires_strength": 0.6}
    expected = merged(pipe, {"a": 0.8}, **options)
    with InflightBatcher(pipe, rows=16) as engine:
        changes = pipe.leases.changes
        actual = result(submit(engine, {"a": 0.8}, **options))
        assert pipe.leases.changes == changes
    assert psnr(actual, expected) > 50


def test_a_file_that_is_written_again_is_read_again(pipe, folder, embedded):
    path = folder / "again.safetensors"
    output = []
    with InflightBatcher(pipe, rows=16) as engine:
        for seed in range(2):
            lora_file(path, embedded, "kohya", seed=seed, rank=4 + seed, only=ATTENTION)
            output.append(result(submit(engine, {path: 1.0})))
    assert not np.array_equal(*output)
    assert psnr(output[1], merged(pipe, {path: 1.0})) > 50


MISFITS = {
    "wide": "rank 9 .* built for rank 8",
    "locon": "has no factors",
    "dora": "is no LoRA of a linear layer",
    "misfit": "has no factors",
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_factors_cannot_express_is_said(pipe, name):
    with pytest.raises(RowMisfit, match=MISFITS[name]):
        pack(pipe, **{name: 1.0})


def test_ranks_of_several_files_add_up(pipe):
    assert pack(pipe, a=1.0, b=1.0).unet is not None
    with pytest.raises(RowMisfit, match=r"rank 12 .* built for rank 8"):
        pack(pipe, a=1.0, b=1.0, c=1.0)


@pytest.mark.parametrize("name", ["wide", "locon", "dora"])
def test_other_files_change_the_weights(pipe, name, caplog):
    caplog.set_level(logging.DEBUG, "sdrt")
    with InflightBatcher(pipe, rows=16) as engine:
        changes = pipe.leases.changes
        actual = result(submit(engine, {name: 0.7}))
        assert pipe.leases.changes == changes + 1
        assert f"<lora:{name}:0.7>: in a batch of its own: " in caplog.text
        plain = result(submit(engine, {"a": 0.8}))
        assert pipe.leases.changes == changes + 2
    assert np.array_equal(actual, merged(pipe, {name: 0.7}))
    assert psnr(plain, merged(pipe, {"a": 0.8})) > 50


def test_a_file_of_another_architecture_fails_alone(pipe):
    with InflightBatcher(pipe, rows=16) as engine:
        handles = [submit(engine, {name: 1.0}) for name in ("misfit", "a")]
        with pytest.raises(UsageError, match="made for another architecture"):
            result(handles[0])
        result(handles[1])


def test_reused_features_need_merged_weights(pipe):
    options = {"feature_reuse": 2, "num_inference_steps": 6}
    with InflightBatcher(pipe, rows=16) as engine:
        changes = pipe.leases.changes
        actual = result(submit(engine, {"a": 0.8}, **options))
        assert pipe.leases.changes == changes + 1
    assert np.array_equal(actual, merged(pipe, {"a": 0.8}, **options))


def test_words_of_textual_inversion_need_merged_text_encoders(pipe):
    width = pipe.manifest.components["text_encoder"].outputs[0].shape[-1]
    vector = np.random.default_rng(0).normal(size=(1, int(width))).astype(np.float32)
    pipe.load_textual_inversion({"<thing>": vector})
    prompt = "a <thing> on a blue background"
    try:
        with InflightBatcher(pipe, rows=16) as engine:
            changes = pipe.leases.changes
            other = result(submit(engine, {"a": 0.8}))
            assert pipe.leases.changes == changes
            actual = result(submit(engine, {"a": 0.8}, prompt))
            assert pipe.leases.changes == changes + 1
        assert np.array_equal(actual, merged(pipe, {"a": 0.8}, prompt))
        assert psnr(other, merged(pipe, {"a": 0.8})) > 50
    finally:
        pipe.unload_textual_inversion()


def test_files_outside_the_folder_are_named_in_the_image(pipe, folder, tmp_path):
    path = shutil.copy(folder / "a.safetensors", tmp_path / "away.safetensors")
    with InflightBatcher(pipe, rows=16) as engine:
        text = (
            submit(engine, {tmp_path / "away.safetensors": 0.8}).future.result(SECONDS).parameters
        )
    assert "Lora files: away" in text and "<lora:away:0.8>" in text and path


def test_in_low_memory_files_change_the_weights(loaded):
    folder = loaded.lora_rows.bundle.folder
    with sdrt.load(folder, backend="onnxruntime", low_memory=True) as pipe:
        assert not pipe.lora_rows.is_available
        with InflightBatcher(pipe, rows=16) as engine:
            assert psnr(result(submit(engine, {"a": 0.8})), merged(pipe, {"a": 0.8})) == np.inf


@pytest.mark.slow
def test_two_text_encoders(tiny_xl, tiny_xl_bundle, tmp_path):
    bundle = with_lora_graphs(tiny_xl_bundle, tmp_path / "rows", 4)
    path = lora_file(tmp_path / "xl.safetensors", tiny_xl, "peft", strength=3.0, only=ATTENTION)
    with sdrt.load(bundle.folder, backend="onnxruntime") as pipe:
        expected, plain = merged(pipe, {path: 0.5}), merged(pipe, {})
        packed = pipe.lora_rows.pack(merge_loras([(path, parse_weight(0.5))]))
        assert set(packed.by_part) == set(LORA_PARTS)
        with InflightBatcher(pipe, rows=16) as engine:
            changes = pipe.leases.changes
            assert psnr(result(submit(engine, {path: 0.5})), expected) > 50 > psnr(plain, expected)
            assert np.array_equal(result(submit(engine)), plain)
            assert pipe.leases.changes == changes
