"""Small files from elsewhere: tokenizers, LoRA files, images, configurations that do not hold."""

import json
import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from untrusted_input import list_files, state_of, write_bundle

from sdrt.bundle import open_bundle
from sdrt.engine import Candidate
from sdrt.errors import BundleError, CheckpointError, SdrtError, UsageError
from sdrt.json_validation import read_config
from sdrt.runtime.images import depth_to_array, image_from_bytes, image_to_array, open_image
from sdrt.runtime.loading import load_pipeline
from sdrt.runtime.lora.adapters import compute_deltas, read_lora
from sdrt.runtime.text.tokenizer import END, START, Tokenizer

VOCAB = {"a": 0, "b": 1, "ab": 2, START: 3, END: 4}
TOKENIZERS = {
    "an id twice": ({**VOCAB, "b": 0}, "a b", "two tokens have one id"),
    "a hole in the ids": ({**VOCAB, "b": 7}, "a b", "expected the ids 0 to 4"),
    "an id without end": ({**VOCAB, "b": 10**9}, "a b", "have one id"),
    "a negative id": ({**VOCAB, "b": -1}, "a b", "an id is not an integer"),
    "an id of text": ({**VOCAB, "b": "1"}, "a b", "an id is not an integer"),
    "a list": ([], "a b", "holds list"),
    "no end": ({"a": 0, "b": 1, "ab": 2, START: 3}, "a b", "lacks"),
    "a merge of three": (VOCAB, "a b c", "'a b c' is not in"),
    "a merge to no token": (VOCAB, "b a", "'b a' is not in"),
    "more than the encoder knows": ({**VOCAB, "c": 5}, "a b", "has 6 tokens, the text encoder 5"),
}


@pytest.mark.parametrize(("vocab", "merges", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_malformed_tokenizers_are_refused(tmp_path, vocab, merges, message):
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "vocab.json").write_text(json.dumps(VOCAB))
    assert Tokenizer.from_folder(tmp_path, 8, 5).ids("ab")
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    before = state_of(tmp_path)
    with pytest.raises(BundleError, match=message):
        Tokenizer.from_folder(tmp_path, 8, 5)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("pad", ['{"pad_token": {}}', '{"pad_token": "nowhere"}', "[", "7"])
def test_an_unknown_padding_token_is_refused(tmp_path, pad):
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text(json.dumps(VOCAB))
    (tmp_path / "tokenizer_config.json").write_text(pad)
    with pytest.raises(BundleError):
        Tokenizer.from_folder(tmp_path, 8)


DOWN, UP = "lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"
GOOD = {DOWN: np.ones((2, 4), np.float32), UP: np.ones((8, 2), np.float32)}
PEFT = "lora_adapter_metadata"
LORAS = {
    "ranks that differ": ({UP: np.ones((8, 3), np.float32)}, {}, "not of one rank"),
    "a factor of one axis": ({DOWN: np.ones(4, np.float32)}, {}, "which is no down"),
    "rank 0": ({DOWN: np.ones((0, 4), "f"), UP: np.ones((8, 0), "f")}, {}, "which is no"),
    "a product larger than the weight": (
        {DOWN: np.ones((2, 4, 50, 50), np.float32)},
        {},
        "another architecture",
    ),
    "a Kronecker product larger than the weight": (
        {"lora_unet_b.lokr_w1": np.ones((8, 4), "f"), "lora_unet_b.lokr_w2": np.ones((9, 9), "f")},
        {},
        "another architecture",
    ),
    "one of 4 TB": (
        {
            "lora_unet_b.lokr_w1": np.ones((1, 1), "f"),
            "lora_unet_b.lokr_w2_a": np.ones((10**6, 1), "f"),
            "lora_unet_b.lokr_w2_b": np.ones((1, 10**6), "f"),
        },
        {},
        "another architecture",
    ),
    "factors of two algorithms": (
        {"lora_unet_a.lokr_w1": np.ones((8, 4), "f")},
        {},
        "lokr_w1 of another algorithm",
    ),
    "a magnitude of another length": (
        {"lora_unet_a.dora_scale": np.ones((7, 1), "f")},
        {},
        "another architecture",
    ),
    "a sum that is not finite": ({DOWN: np.full((2, 4), 3e38, "f")}, {}, "adds NaN or infinity"),
    "a number beyond float32": ({DOWN: np.full((2, 4), 1e300)}, {}, "NaN or infinity"),
    "a pattern of more than is understood": (
        {},
        {PEFT: '{"unet.alpha_pattern": {"(?=a)": 1}}'},
        "lora_adapter_metadata.*pattern",
    ),
    "weights that PEFT changes": ({}, {PEFT: '{"unet.init_lora_weights": "pissa"}'}, "pissa"),
    "a setting that is not supported": (
        {},
        {PEFT: '{"unet.layer_replication": [[0, 4]]}'},
        "layer_replication is not supported",
    ),
    "NaN": ({DOWN: np.full((2, 4), np.nan, np.float32)}, {}, "NaN or infinity"),
    "an infinite alpha": ({"lora_unet_a.alpha": np.array(np.inf)}, {}, "NaN or infinity"),
    "an alpha without end": ({"lora_unet_a.alpha": np.array(1e30)}, {}, "alpha that is no number"),
    "an alpha of two numbers": ({"lora_unet_a.alpha": np.ones(2)}, {}, "which is no alpha"),
    "one factor twice": ({"lora_unet_a.lora_A.weight": GOOD[DOWN]}, {}, "says again"),
    "settings that are none": ({}, {PEFT: "["}, "lora_adapter_metadata"),
    "settings in a list": ({}, {PEFT: "[]"}, "lora_adapter_metadata"),
    "settings without end": ({}, {PEFT: "[" * 100_000}, "lora_adapter_metadata"),
    "an alpha of text": ({}, {PEFT: '{"unet.lora_alpha": "x"}'}, "lora_adapter_metadata"),
    "patterns that are none": ({}, {PEFT: '{"unet.alpha_pattern": [1]}'}, "lora_adapter_metadata"),
}


@pytest.mark.parametrize(("change", "metadata", "message"), LORAS.values(), ids=LORAS)
def test_malformed_lora_files_are_refused(tmp_path, change, metadata, message):
    path = tmp_path / "l.safetensors"
    shapes = {"a.weight": (8, 4), "b.weight": (8, 4)}
    base = np.ones((8, 4), np.float32)
    save_file(GOOD, path)
    assert next(compute_deltas("unet", shapes, [read_lora(path, 1.0)]))[1].shape == (8, 4)
    save_file(GOOD | change, path, metadata or None)
    before = state_of(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        [*compute_deltas("unet", shapes, [read_lora(path, 1.0)], lambda _: base)]
    assert state_of(tmp_path) == before


def chunk(kind, body):
    crc = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + crc


def png(*chunks, side=64):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(side * (side + 1))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + rows + chunk(b"IEND", b"")


def saved(kind):
    buffer = BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, kind)
    return buffer.getvalue()


BOMB = zlib.compress(b"x" * 100_000_000)
BAD_IMAGES = {
    "a text that unfolds to 100 MB": png(chunk(b"zTXt", b"a\0\0" + BOMB)),
    "the same in another chunk": png(chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "sides that are enormous": png(side=64)[:16] + struct.pack(">II", 2**30, 2**30) + png()[24:],
    "cut": png()[:-30],
    "an image in another format": saved("GIF"),
    "one in a format with a program in it": saved("EPS"),
    "a document": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "a vector image": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "text": b"no picture",
    "nothing": b"",
}


@pytest.mark.parametrize("data", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_malformed_images_are_refused(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    before = state_of(tmp_path)
    with pytest.raises(UsageError):
        image_to_array(open_image(tmp_path / "a.png"), (64, 64))
    with pytest.raises(UsageError):
        depth_to_array(open_image(tmp_path / "a.png"), (8, 8))
    with pytest.raises(UsageError):
        image_from_bytes(data, 2**24)
    assert state_of(tmp_path) == before
    assert image_to_array(image_from_bytes(png(), 2**24), (64, 64)).shape == (1, 3, 64, 64)


def test_more_pixels_than_asked_for_are_not_decoded():
    buffer = BytesIO()
    Image.new("1", (4000, 4000)).save(buffer, "PNG")
    with pytest.raises(UsageError, match="at most 15999999 pixels"):
        image_from_bytes(buffer.getvalue(), 4000 * 4000 - 1)


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UsageError, match="not a readable"):
        open_image(tmp_path / "a.png")


CONFIGS = {
    "a billion steps": ({"num_train_timesteps": 10**9}, "up to 1,000,000"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "up to 256"),
    "a thousand layers in a list": ({"transformer_layers_per_block": [1, 1000]}, "up to 256"),
    "a list without end": ({"trained_betas": [0.1] * 10_001}, "10,001 long"),
    "text without end": ({"_class_name": "x" * 10_001}, "10,001 long"),
    "nesting": ({"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}, "nested too deeply"),
}


@pytest.mark.parametrize(("raw", "message"), CONFIGS.values(), ids=CONFIGS)
def test_malformed_configurations_are_refused(tmp_path, raw, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    for kind in (BundleError, CheckpointError):
        with pytest.raises(kind, match=message):
            read_config(path, kind)


def test_a_sampler_without_end_is_refused_at_the_load(tmp_path):
    folder = write_bundle(tmp_path / "b")
    (folder / "scheduler").mkdir()
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text('{"num_train_timesteps": 1000000000}')
    with pytest.raises(SdrtError, match="up to 1,000,000"):
        load_pipeline(open_bundle(list_files(folder)), Candidate("x", "cpu", None, lambda *_: None))
