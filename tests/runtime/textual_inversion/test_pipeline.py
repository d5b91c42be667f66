"""Words in calls: the embedded model's own vectors under other names give the same images."""

import shutil
import threading

import numpy as np
import pytest
from lora_files import lora_file
from safetensors.numpy import load_file, save_file

import sdrt
from sdrt.bundle.token_embeddings import read_table
from sdrt.errors import CheckpointError, UsageError
from sdrt.runtime.batching.engine import InflightBatcher
from sdrt.runtime.textual_inversion.files import embeddings_folder
from sdrt.runtime.textual_inversion.store import EmbeddingStore

pytestmark = pytest.mark.integration
OPTIONS = {"num_inference_steps": 3, "seed": 0}


@pytest.fixture(scope="module")
def bundle(shapes, tmp_path_factory):
    """A copy, in which nothing was derived before."""
    return shutil.copytree(shapes, tmp_path_factory.mktemp("copied") / "shapes")


@pytest.fixture(scope="module")
def loaded(bundle):
    with sdrt.load(bundle, backend="onnxruntime") as pipe:
        yield pipe


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.unload_textual_inversion()
    loaded.set_lora({})


@pytest.fixture(scope="module")
def vectors_of(loaded, bundle):
    """The vectors of some words of the vocabulary."""
    _, table = read_table(bundle / "text_encoder")
    return lambda text: np.array(table[loaded.tokenizer.ids(text)])


def generate(pipe, prompt, **options):
    return pipe(prompt, **{**OPTIONS, **options}).images[0].tobytes()


def test_words_stand_for_their_vectors_wherever_a_prompt_has_them(pipe, vectors_of):
    pipe.load_textual_inversion(
        [{"a": vectors_of("red circle")}, {"b": vectors_of("blue")}], token=["<rc>", "azur"]
    )
    for own, plain in (
        ("a <rc> on a azur background", "a red circle on a blue background"),
        ("a (<rc>:1.3) on a [azur] background", "a (red circle:1.3) on a [blue] background"),
        ("red " * 40 + "<rc>", "red " * 40 + "red circle"),
    ):
        assert generate(pipe, own) == generate(pipe, plain)
    negative = generate(pipe, "a cross", negative_prompt="<rc>", clip_skip=1)
    assert negative == generate(pipe, "a cross", negative_prompt="red circle", clip_skip=1)


def test_a_prompt_without_words_has_the_same_bytes_and_no_second_engine(bundle, vectors_of):
    prompt = "a red circle on a blue background"
    with sdrt.load(bundle, backend="onnxruntime") as pipe:
        expected = generate(pipe, prompt)
        pipe.load_textual_inversion({"<rc>": vectors_of("green cross")})
        pipe.chunk_cache.clear()
        assert generate(pipe, prompt) == expected
        assert pipe.engines["text_encoder_words"]._engine is None


def test_another_embedding_of_the_same_word_is_another_image(pipe, vectors_of):
    images = []
    for text in ("red", "green", "red"):
        pipe.load_textual_inversion({"<w>": vectors_of(text)})
        images.append(generate(pipe, "a <w> circle"))
        pipe.unload_textual_inversion("<w>")
    assert images[0] == images[2] != images[1]


def test_a_call_keeps_the_words_it_began_with(pipe, vectors_of):
    pipe.load_textual_inversion({"<w>": vectors_of("red")})
    expected = generate(pipe, "a <w> circle")
    job = pipe.create_job("a <w> circle", sdrt.GenerationOptions(**OPTIONS))
    pipe.unload_textual_inversion("<w>")
    pipe.load_textual_inversion({"<w>": vectors_of("green")})
    ((_, image),) = pipe.stream_job(job)
    assert image.tobytes() == expected


def test_threads_use_their_own_words(pipe, vectors_of):
    expected, actual = {}, {}
    for text in ("red", "green", "blue"):
        expected[text] = generate(pipe, f"a {text} circle")
    jobs = {}
    for text in expected:
        pipe.load_textual_inversion({"<w>": vectors_of(text)})
        jobs[text] = pipe.create_job("a <w> circle", sdrt.GenerationOptions(**OPTIONS))
        pipe.unload_textual_inversion()

    def run(text):
        ((_, image),) = pipe.stream_job(jobs[text])
        actual[text] = image.tobytes()

    threads = [threading.Thread(target=run, args=(text,)) for text in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert actual == expected


def test_rows_in_flight_differ_in_their_words(pipe, vectors_of):
    prompts = ["a <w> circle", "a green cross", "a circle on a <w> background"]
    with InflightBatcher(pipe) as batcher:
        handles = []
        for text in ("red", "blue"):
            pipe.load_textual_inversion({"<w>": vectors_of(text)})
            handles += batcher.submit(prompts, OPTIONS)
            pipe.unload_textual_inversion()
        images = [handle.future.result(60) for handle in handles]
    assert "<w>: " in images[0].parameters
    assert "TI hashes" not in images[1].parameters
    for text, batch in (("red", images[:3]), ("blue", images[3:])):
        for i, (prompt, image) in enumerate(zip(prompts, batch, strict=True)):
            plain = generate(pipe, prompt.replace("<w>", text), seed=i)
            assert image.image.tobytes() == plain


def test_the_words_of_a_lora_file_come_and_go_with_it(pipe, vectors_of, embedded, tmp_path):
    plain = lora_file(tmp_path / "plain.safetensors", embedded, "kohya")
    words = {"bundle_emb.<w>.string_to_param.*": vectors_of("red circle")}
    save_file(load_file(plain) | words, tmp_path / "both.safetensors")
    pipe.set_lora({plain: 1.0})
    expected = generate(pipe, "a red circle on a blue background")
    pipe.set_lora({tmp_path / "both.safetensors": 1.0})
    assert generate(pipe, "a <w> on a blue background") == expected
    pipe.set_lora({})
    assert pipe.embeddings.current.embeddings == ()
    wide = {"bundle_emb.<w>.emb_params": np.ones((1, 7), np.float32)}
    save_file(load_file(plain) | wide, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"wide: embedding '<w>'.*7 wide"):
        pipe.set_lora({tmp_path / "wide.safetensors": 1.0})
    assert pipe.adapters.chosen == ()


def test_the_folder_is_read_when_a_bundle_is_loaded(bundle, vectors_of, tmp_path, caplog):
    folder = embeddings_folder()
    folder.mkdir()
    try:
        save_file({"emb_params": vectors_of("red circle")}, folder / "easyneg.safetensors")
        save_file({"emb_params": np.ones((1, 7), np.float32)}, folder / "wide.safetensors")
        save_file({"emb_params": vectors_of("red")}, folder / "circle.safetensors")
        save_file({"x": vectors_of("blue")}, tmp_path / "b.safetensors")
        caplog.set_level("DEBUG")
        named = [f"{tmp_path / 'b.safetensors'}:<b>"]
        with sdrt.load(bundle, backend="onnxruntime", embeddings=named) as pipe:
            image = generate(pipe, "a EasyNeg on a <b> background")
            assert image == generate(pipe, "a red circle on a blue background")
            assert {file.name for file in pipe.embeddings.skipped} == {"wide", "circle"}
        assert "wide is skipped" in caplog.text
    finally:
        shutil.rmtree(folder)


def test_nothing_is_loaded_if_one_embedding_does_not_fit(pipe, vectors_of):
    good = {"<w>": vectors_of("red")}
    for bad in ({"<v>": np.ones((1, 3), np.float32)}, {"<W>": vectors_of("blue")}, {"circle": 1}):
        with pytest.raises((CheckpointError, UsageError)):
            pipe.load_textual_inversion([good, bad])
        assert pipe.embeddings.current.loaded == ()
    with pytest.raises(UsageError, match="2 words for 3"):
        pipe.load_textual_inversion([good] * 3, token=["<a>", "<b>"])
    with pytest.raises(UsageError, match="not loaded"):
        pipe.unload_textual_inversion("<none>")


def test_a_model_without_prompts_takes_no_embeddings():
    with pytest.raises(UsageError, match="no prompt"):
        EmbeddingStore({}, {}).load({"<w>": np.ones((1, 4), np.float32)})


def test_words_come_and_go_during_a_run_and_are_counted(pipe, vectors_of):
    pipe.load_textual_inversion({"<rc>": vectors_of("red circle")})
    own, plain = ("a [{}:cross:0.5] AND a {}:0.5".replace("{}", w) for w in ("<rc>", "red circle"))
    assert generate(pipe, own) == generate(pipe, plain)
    assert pipe.count_tokens("a <rc>") == pipe.count_tokens("a red circle")
