"""The bundle that the wheel carries is the checkpoint's: run by `make wheel` once it is made."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from sdrt.bundle import embedded as shipped_folder
from sdrt.bundle import open_bundle

pytestmark = pytest.mark.release
# The text encoder's names are lost in the export; the second test covers it.
PARTS = {
    "unet": "unet/diffusion_pytorch_model",
    "vae_decoder": "vae/diffusion_pytorch_model",
    "vae_encoder": "vae/diffusion_pytorch_model",
}


@pytest.fixture(scope="module")
def shipped():
    return open_bundle(shipped_folder("shapes"))


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_the_checkpoints(shipped, embedded, part):
    wanted = load_file(embedded / f"{PARTS[part]}.safetensors")
    found = load_file(shipped.folder / part / "model.safetensors")
    weights = {name: array for name, array in found.items() if not name.startswith("__pad.")}
    same = 0
    for name, array in weights.items():
        bare = [n for n in wanted if name == n or name.endswith("." + n) or n.endswith("." + name)]
        if bare:
            assert np.array_equal(array, wanted[bare[0]].astype(array.dtype)), name
            same += 1
    assert same >= 0.5 * len(weights)


def test_it_is_what_a_build_makes_today(shipped, shapes):
    built = open_bundle(shapes)
    for name, record in built.manifest.files.items():
        assert shipped.manifest.files[name].sha256 == record.sha256, name
