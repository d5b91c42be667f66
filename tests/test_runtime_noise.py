"""Noise without torch against torch."""

import numpy as np
import pytest
import torch
from sdrt.runtime import randn


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**63])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (16,), (17,), (35,), (1, 4, 64, 96)])
def test_noise_is_torchs(seed, shape):
    generator = torch.Generator("cpu").manual_seed(seed)
    wanted = torch.randn(shape, generator=generator).numpy()
    found = randn(seed, shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


def test_too_little_noise_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        randn(0, (3, 5))
