"""The peers of `sdrt bench` whose pipelines are C++: what they read, draw and tell."""

import collections
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdrt.bench import peers as bench_peers
from sdrt.bench.peers import checkpoint_folder, list_peers, openvino_genai, sdcpp
from sdrt.bench.rounds import list_contestants
from sdrt.bench.timing import PROMPT
from sdrt.bundle import open_bundle
from sdrt.engine import list_backends
from sdrt.errors import BackendError


def test_what_stable_diffusion_cpp_reads_has_the_older_names(shapes, tmp_path):
    bundle = open_bundle(shapes)
    bench_peers.prepare("stable-diffusion.cpp", bundle, tmp_path)
    source = load_file(checkpoint_folder(bundle) / "text_encoder" / "model.safetensors")
    actual = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert "text_model.embeddings.token_embedding.weight" in actual
    assert actual.keys() == {f"text_model.{n.removeprefix('text_model.')}" for n in source}
    for name, tensor in source.items():
        np.testing.assert_array_equal(
            actual[f"text_model.{name.removeprefix('text_model.')}"], tensor
        )
    for part in ("unet", "vae"):
        assert load_file(tmp_path / part / "diffusion_pytorch_model.safetensors")


def test_a_model_that_stable_diffusion_cpp_cannot_hold_is_left_out(shapes):
    assert "published widths" in list_peers(open_bundle(shapes))["stable-diffusion.cpp"][2]


def test_exact_leaves_lower_precisions_out(shapes, monkeypatch):
    monkeypatch.setattr(bench_peers, "has_bf16", lambda: True)
    monkeypatch.setattr(bench_peers, "is_installed", lambda name: name != "optimum")
    bundle = open_bundle(shapes)
    admitted = {c.reduced_precision: 40.0 for c in list_backends() if c.reduced_precision}
    bundle = replace(bundle, manifest=replace(bundle.manifest, admitted=admitted))
    runnable, left_out = list_contestants(bundle, exact=True)
    names = {"reference bf16", "reference bf16 compiled", *admitted}
    assert {left_out[name] for name in names} == {"--exact leaves it out"}
    assert {item.dtype for item in runnable if item.name not in admitted} <= {"float32", None}
    assert not names & {item.name for item in runnable}
    assert list_peers(bundle, exact=True)["OpenVINO GenAI fp32"][1] == "exact"
    assert names - {item.name for item in list_contestants(bundle)[0]} == {
        "reference bf16 compiled"  # takes minutes, so it is asked for
    }


def test_the_log_of_stable_diffusion_cpp_is_parsed():
    lines = (
        b"stable-diffusion.cpp:3168 - get_learned_condition completed, taking 0.28s\n",
        b"stable-diffusion.cpp:3432 - sampling completed, taking 9.34s\n",
        b"stable-diffusion.cpp:3450 - generating 1 latent images completed, taking 9.34s\n",
        b"stable-diffusion.cpp:3212 - decode_first_stage completed, taking 10.21s\n",
        b"stable-diffusion.cpp:3591 - generate_image completed in 19.84s\n",
    )
    said = [match for line in lines if (match := sdcpp.LOG_LINE.search(line))]
    seconds = {sdcpp.PARTS[match[1]]: float(match[2]) for match in said}
    assert len(said) == 3
    assert seconds == {"text": 0.28, "unet": 9.34, "decode": 10.21}


@pytest.mark.reference
def test_openvino_genai_draws_the_prompt_and_tells_its_parts(shapes, tmp_path):
    genai = pytest.importorskip("openvino_genai")
    pytest.importorskip("openvino_tokenizers")
    bench_peers.prepare("openvino-genai", open_bundle(shapes), tmp_path)
    pipe = genai.Text2ImagePipeline(tmp_path, "CPU")
    inputs = {"width": 64, "height": 64, "guidance_scale": sdcpp.GUIDANCE, "rng_seed": 1}
    pixels = pipe.generate(PROMPT, num_inference_steps=20, **inputs).data[0].astype(int)
    middle, corner = pixels[24:40, 24:40].mean((0, 1)), pixels[:8, :8].mean((0, 1))
    assert middle[0] > middle[2] + 100  # red
    assert corner[2] > corner[0] + 100  # blue

    seconds = collections.defaultdict(float)
    expected = {"made": str(tmp_path), "size": "64x64", "steps": [2], "scheduler": "DPM++ 2M"}
    parts = openvino_genai.load(expected, seconds)
    parts["picture, 2 steps"]()
    assert set(seconds) == {"text", "unet", "decode", "PNG"}
    assert all(value > 0 for value in seconds.values())
    with pytest.raises(BackendError, match="no sampler Heun"):
        openvino_genai.load({**expected, "scheduler": "Heun"}, seconds)
