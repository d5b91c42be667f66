"""Embedding files: every layout in safetensors, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdrt.errors import CheckpointError, SdrtError
from sdrt.runtime.textual_inversion.files import (
    embeddings_folder,
    find_embedding,
    list_folder,
    read_bundled,
    read_embedding,
)
from sdrt.runtime.textual_inversion.layouts import split_bundled

ONE, TWO = {"text_encoder": 16}, {"text_encoder": 16, "text_encoder_2": 24}


def numbers(*shape, dtype=torch.float32):
    return torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(dtype)


@pytest.fixture
def write(tmp_path):
    def write(tensors, name="my-word.safetensors"):
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"<zorb>": numbers(2, 16)}, "<zorb>"),
        ({"<zorb>": numbers(16)}, "<zorb>"),
        ({"emb_params": numbers(3, 16)}, "my-word"),
        ({"string_to_param.*": numbers(1, 16)}, "my-word"),
        ({"clip_l": numbers(2, 16, dtype=torch.bfloat16)}, "my-word"),
        ({"text_encoders_0": numbers(2, 16, dtype=torch.float16)}, "my-word"),
    ],
)
def test_layouts_for_one_text_encoder(write, tensors, word):
    (embedding,) = read_embedding(write(tensors), [None], ONE)
    assert embedding.word == word
    expected = np.atleast_2d(next(iter(tensors.values())).float().numpy())
    assert np.array_equal(embedding.by_encoder["text_encoder"], expected)
    (renamed,) = read_embedding(write(tensors), ["other"], ONE)
    assert renamed.word == "other"


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_layouts_for_two_text_encoders(write, names):
    path = write({names[0]: numbers(2, 16), names[1]: numbers(2, 24)})
    (embedding,) = read_embedding(path, [None], TWO)
    assert {name: a.shape for name, a in embedding.by_encoder.items()} == {
        "text_encoder": (2, 16),
        "text_encoder_2": (2, 24),
    }
    first, second = read_embedding(path, ["<s0>", "<s1>"], TWO)
    assert (first.word, second.word, second.num_vectors) == ("<s0>", "<s1>", 1)
    assert np.array_equal(second.by_encoder["text_encoder"][0], np.arange(17, 33))


def test_the_embeddings_of_a_lora_file():
    tensors = {
        "bundle_emb.<s0>.string_to_param.*": np.ones((2, 16), np.float16),
        "bundle_emb.plain.emb_params": np.ones((1, 16), np.float32),
    }
    first, second = read_bundled(split_bundled(tensors), ONE)
    assert (first.word, first.num_vectors, second.word) == ("<s0>", 2, "plain")
    pair = {"bundle_emb.w.clip_l": np.ones((1, 16)), "bundle_emb.w.clip_g": np.ones((1, 24))}
    assert read_bundled(split_bundled(pair), TWO)[0].by_encoder.keys() == TWO.keys()
    with pytest.raises(CheckpointError, match="embedding 'w'"):
        read_bundled(split_bundled(pair), ONE)


@pytest.mark.parametrize(
    ("tensors", "widths", "message"),
    [
        ({"<a>": numbers(2, 20)}, ONE, "20 wide, expected 16 wide"),
        ({"<a>": numbers(2, 16)}, TWO, "16 wide, expected 16 and 24 wide"),
        ({"clip_l": numbers(2, 16), "clip_g": numbers(2, 24)}, ONE, "16 and 24 wide, expected 16"),
        ({"clip_l": numbers(2, 16), "clip_g": numbers(3, 24)}, TWO, "clip_l 2 and clip_g 3"),
        ({"<a>": numbers(1, 16), "<b>": numbers(1, 16)}, ONE, "2 tensors"),
        ({"<a>": numbers(1, 1, 16)}, ONE, "[1, 1, 16]"),
        ({"<a>": numbers(0, 16)}, ONE, "[0, 16]"),
        ({"<a>": numbers(2, 16, dtype=torch.int64)}, ONE, "int64"),
        ({"<a>": torch.full((1, 16), torch.nan)}, ONE, "NaN"),
        ({"<a>": torch.full((1, 16), 1e300, dtype=torch.float64)}, ONE, "infinity"),
        ({"<lora:a:1>": numbers(1, 16)}, ONE, "tag"),
        ({"a\nb": numbers(1, 16)}, ONE, "printable"),
    ],
)
def test_what_does_not_fit_is_refused(write, tensors, widths, message):
    with pytest.raises(CheckpointError) as caught:
        read_embedding(write(tensors), [None], widths)
    assert message in caught.value.message
    assert "my-word" in caught.value.message


def test_another_number_of_words_than_vectors_is_refused(write):
    with pytest.raises(CheckpointError, match="3 vectors for 2 words"):
        read_embedding(write({"a": numbers(3, 16)}), ["<s0>", "<s1>"], ONE)


@pytest.mark.parametrize("name", ["style.pt", "style.bin"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError) as caught:
        find_embedding(tmp_path / name)
    assert "safetensors" in caught.value.hint


def test_damaged_and_missing_files_are_refused(tmp_path, write):
    path = write({"<a>": numbers(2, 16)})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SdrtError, match="my-word"):
        read_embedding(path, [None], ONE)
    with pytest.raises(CheckpointError, match="no embedding file"):
        find_embedding("sd-concepts-library/cat-toy")


def test_a_folder_that_diffusers_wrote_is_found(tmp_path, write):
    assert find_embedding(write({"<a>": numbers(16)}, "learned_embeds.safetensors").parent) == (
        tmp_path / "learned_embeds.safetensors"
    )


@pytest.fixture
def folder():
    import shutil

    folder = embeddings_folder()
    (folder / "sub").mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def test_the_folder_is_read_by_the_names_of_its_files(folder):
    save_file({"<other>": numbers(2, 16)}, folder / "easyneg.safetensors")
    save_file({"emb_params": numbers(1, 16)}, folder / "sub" / "deep.safetensors")
    save_file({"emb_params": numbers(1, 20)}, folder / "wide.safetensors")
    (folder / "old.pt").write_bytes(b"")
    (folder / "note.txt").write_text("text")
    embeddings, skipped = list_folder(ONE)
    assert sorted(embedding.word for embedding in embeddings) == ["deep", "easyneg"]
    reasons = {file.name: file.reason for file in skipped}
    assert "pickle" in reasons["old"]
    assert "20 wide" in reasons["wide"]
    assert find_embedding("easyneg") == folder / "easyneg.safetensors"


def test_a_link_out_of_the_folder_is_not_read(folder, tmp_path, write):
    (folder / "link.safetensors").symlink_to(write({"<a>": numbers(16)}))
    assert list_folder(ONE) == ([], [])
    assert Path(folder).is_dir()
