"""The bundle that the wheel carries is the checkpoint's: run by `make wheel` once it is made."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdrt.bundle import open_bundle
from sdrt.bundle.store import embedded_path as shipped_folder
from sdrt.runtime.reference_outputs import REFERENCE_FILE

pytestmark = pytest.mark.release
PARTS = {
    "text_encoder": "text_encoder/model",
    "unet": "unet/diffusion_pytorch_model",
    "vae_decoder": "vae/diffusion_pytorch_model",
    "vae_encoder": "vae/diffusion_pytorch_model",
}
VAE_PARTS = {
    "vae_decoder": ("decoder.", "post_quant_conv."),
    "vae_encoder": ("encoder.", "quant_conv."),
}


@pytest.fixture(scope="module")
def shipped():
    return open_bundle(shipped_folder("shapes"))


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_the_checkpoints(shipped, embedded, part):
    expected = load_file(embedded / f"{PARTS[part]}.safetensors")
    actual = load_file(shipped.folder / part / "model.safetensors")
    for name, array in expected.items():
        if PARTS[part].startswith("vae") and not name.startswith(VAE_PARTS[part]):
            continue
        same = [n for n in actual if n.removesuffix(".T").endswith(name)]
        # Positions are added as the exporter cut them out, under a name of its own.
        assert len(same) == 1 or "position" in name, name
        for item in same:
            stored = actual[item].T if item.endswith(".T") else actual[item]
            assert np.array_equal(stored, array.astype(stored.dtype)), name


def test_it_is_what_a_build_makes_today(shipped, shapes):
    built = open_bundle(shapes)
    for name, record in built.manifest.files.items():
        if name != REFERENCE_FILE:
            assert shipped.manifest.files[name].sha256 == record.sha256, name
    # On a busy machine the last digit of a few of torch's own answers has been seen to differ.
    expected, actual = (
        numbers(json.loads((b.folder / REFERENCE_FILE).read_text())) for b in (built, shipped)
    )
    assert expected.keys() == actual.keys()
    assert np.allclose([*expected.values()], [*actual.values()], rtol=1e-4, atol=1e-5)


def numbers(value, place=()):
    """The numbers in parsed JSON by where they are; text is its own place."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {place: value} if isinstance(value, int | float) else {(*place, value): 0}
    return {k: v for key, item in items for k, v in numbers(item, (*place, key)).items()}
