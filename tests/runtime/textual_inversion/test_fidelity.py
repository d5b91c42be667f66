"""Images and prompts with words of textual inversion, against diffusers and transformers."""

import shutil

import numpy as np
import pytest
import torch
from exports import exported_once
from safetensors.torch import save_file
from tiny_checkpoints import write_text_encoder

import sdrt
from sdrt.bundle.bundle import embeddings_component
from sdrt.bundle.manifest import EMBEDDINGS_GRAPH, Component
from sdrt.bundle.token_embeddings import read_table, write_embeddings_graph
from sdrt.engine.onnxruntime.cpu import OrtEngine
from sdrt.export.modules import PairedTextEncoder
from sdrt.runtime import Tokenizer
from sdrt.runtime.text.tokenizer import FIRST_WORD_ID
from sdrt.runtime.textual_inversion.engine import WORD_EMBEDDINGS, WordEngine
from sdrt.runtime.textual_inversion.words import Embedding, EmbeddingSet

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PROMPT = "a <zorb> circle on (a <blim>) background"
NEGATIVE = "a green <blim>, <zorb>"
STEPS = 4
WIDTHS = {"text_encoder": 16, "text_encoder_2": 24}
CLIP = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


def vectors(word, encoder, count):
    """Some vectors of the size of those that a random model has."""
    rng = np.random.default_rng([*word.encode(), len(encoder)])
    return torch.from_numpy(rng.normal(0, 0.02, (count, WIDTHS[encoder])).astype(np.float32))


WORDS = {"<zorb>": 3, "<blim>": 1}


def reference(checkpoint, kind, paired=False):
    """diffusers' pipeline of a checkpoint with both words."""
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval(),
        "vae": diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae").eval(),
        "scheduler": diffusers.EulerDiscreteScheduler.from_pretrained(checkpoint / "scheduler"),
    }
    options = {"add_watermarker": False} if paired else {}
    if not paired:
        options = {"safety_checker": None, "feature_extractor": None}
        options["requires_safety_checker"] = False
    for name in CLIP if paired else ("text_encoder",):
        model = getattr(transformers, CLIP[name]).from_pretrained(checkpoint / name).eval()
        tokenizer = name.replace("text_encoder", "tokenizer")
        pad = "!" if name == "text_encoder_2" else "<|endoftext|>"
        parts[name] = model
        parts[tokenizer] = transformers.CLIPTokenizer.from_pretrained(
            str(checkpoint / tokenizer), pad_token=pad, model_max_length=32
        )
    pipe = getattr(diffusers, kind)(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    for word, count in WORDS.items():
        for name in CLIP if paired else ("text_encoder",):
            tokenizer = parts[name.replace("text_encoder", "tokenizer")]
            pipe.load_textual_inversion(
                {word: vectors(word, name, count)}, text_encoder=parts[name], tokenizer=tokenizer
            )
    return pipe


def save_embeddings(folder, paired=False):
    """The words' files: in the layout of diffusers, or in that of XL."""
    for word, count in WORDS.items():
        tensors = {word: vectors(word, "text_encoder", count)}
        if paired:
            layers = zip(("clip_l", "clip_g"), CLIP, strict=True)
            tensors = {key: vectors(word, name, count) for key, name in layers}
        save_file(tensors, folder / f"{word}.safetensors")
    return [folder / f"{word}.safetensors" for word in WORDS]


def decibels(own, expected, **options):
    """Of an image of ours against the reference's."""
    actual = own(PROMPT, **OPTIONS, seed=0, output_type="np", **options).images[0]
    error = np.mean((actual.astype(np.float64) - expected.images[0]) ** 2)
    return 10 * np.log10(1.0 / max(error, 1e-12))


OPTIONS = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "negative_prompt": NEGATIVE}


def generate(pipe):
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(PROMPT, **OPTIONS, generator=generator, output_type="np", height=32, width=32)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_images_of_sd_1_match_diffusers(tiny, tiny_bundle, tmp_path, backend):
    expected = generate(reference(tiny, "StableDiffusionPipeline"))
    with sdrt.load(tiny_bundle, backend=backend, precision="exact") as loaded:
        pipe = loaded.with_scheduler("Euler")
        pipe.load_textual_inversion(save_embeddings(tmp_path))
        assert decibels(pipe, expected, weighting=False) > 50
        pipe.unload_textual_inversion("<zorb>")
        assert decibels(pipe, expected, weighting=False) < 50


def test_images_of_sd_2_match_diffusers(tiny, build_once, tmp_path):
    """OpenCLIP's activation and a configuration whose end of text is 2, of no meaning."""
    checkpoint = shutil.copytree(tiny, tmp_path / "sd2")
    shutil.rmtree(checkpoint / "text_encoder")
    torch.manual_seed(1)
    write_text_encoder(
        checkpoint, "text_encoder", "CLIPTextModel", hidden_act="gelu", eos_token_id=2
    )
    bundle = build_once(str(checkpoint), tmp_path / "built", sizes=((32, 32),))
    expected = generate(reference(checkpoint, "StableDiffusionPipeline"))
    with sdrt.load(bundle, backend="onnxruntime") as loaded:
        pipe = loaded.with_scheduler("Euler")
        pipe.load_textual_inversion(save_embeddings(tmp_path))
        assert decibels(pipe, expected, weighting=False) > 50


def test_images_of_xl_match_diffusers(tiny_xl, tiny_xl_bundle, tmp_path):
    expected = generate(reference(tiny_xl, "StableDiffusionXLPipeline", paired=True))
    with sdrt.load(tiny_xl_bundle, backend="onnxruntime") as loaded:
        pipe = loaded.with_scheduler("Euler")
        pipe.load_textual_inversion(save_embeddings(tmp_path, paired=True), token=[*WORDS])
        assert decibels(pipe, expected, weighting=False) > 50


def test_an_encoder_that_pools_at_the_highest_id_pools_at_the_end(tiny_xl, tmp_path):
    """By its configuration texts end with 2, and transformers pools at the highest id, a word's. So
    the reference is one whose configuration has the end.
    """
    texts = ["a <zorb> circle", "<blim>, a red cross"]
    options = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}
    options |= {"num_hidden_layers": 2, "projection_dim": 20, "max_position_embeddings": 32}
    tokenizer = Tokenizer.from_folder(tiny_xl / "tokenizer", 32)
    size = len(tokenizer.vocab)
    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(**options, vocab_size=size, eos_token_id=2)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    ids = torch.tensor(tokenizer(texts))
    outputs, axes = ("contexts", "pooled"), {"input_ids": {0: "rows"}}
    module = PairedTextEncoder(model)
    inputs, results = exported_once(module, {"input_ids": ids.int()}, outputs, axes, tmp_path)
    component = embeddings_component(Component(inputs, results, "float32", {}))
    write_embeddings_graph(tmp_path, component.inputs[-1])
    inner = OrtEngine("text_encoder_2", tmp_path / EMBEDDINGS_GRAPH, component)
    engine = WordEngine(inner, *read_table(tmp_path), tokenizer.end)

    name = "text_encoder_2"
    embeddings = tuple(
        Embedding(word, {name: vectors(word, name, n).numpy()}, "") for word, n in WORDS.items()
    )
    words = EmbeddingSet({name: tokenizer}, embeddings).by_encoder[name]
    own = words.tokenizer(texts)
    actual = engine({"input_ids": own, WORD_EMBEDDINGS: words.vectors})

    model.resize_token_embeddings(size + len(words.vectors), mean_resizing=False)
    model.get_input_embeddings().weight.data[size:] = torch.from_numpy(words.vectors)
    ids = torch.tensor(np.where(own >= FIRST_WORD_ID, own - FIRST_WORD_ID + size, own)).long()
    with torch.no_grad():
        at_a_word = model(ids).text_embeds
        getattr(model, "text_model", model).eos_token_id = tokenizer.end
        expected = model(ids, output_hidden_states=True)
    assert np.allclose(actual["pooled"], expected.text_embeds, atol=1e-5)
    assert np.allclose(actual["contexts"][:, -1], expected.hidden_states[-2], atol=1e-5)
    assert not np.allclose(actual["pooled"], at_a_word, atol=1e-3)
