"""Noise without torch against torch."""

import numpy as np
import pytest
import torch

from sdrt.errors import UsageError
from sdrt.runtime import CpuNoise, CudaNoise, noise_from_seed, randn


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**63])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (16,), (17,), (35,), (1, 4, 64, 96)])
def test_noise_is_torchs(seed, shape):
    generator = torch.Generator("cpu").manual_seed(seed)
    expected = torch.randn(shape, generator=generator).numpy()
    actual = randn(seed, shape)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_a_stream_goes_on_as_torchs(seed):
    """Draws of any size one after the other; small ones come in pairs, and one is kept."""
    generator, stream = torch.Generator("cpu").manual_seed(seed), CpuNoise(seed)
    for shape in ((3,), (5,), (1, 4, 8, 8), (1,), (17,), (7,), (4, 5, 5), (2, 3), (15,)):
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(stream.randn(shape), expected, rtol=2e-6, atol=1e-6)


def test_cuda_noise_is_what_a_gpu_drew():
    """Seed 0 on a GPU, as widely published (to eight digits) by those who mimic it."""
    generated = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    generated += [-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497]
    np.testing.assert_allclose(CudaNoise(0).randn((3, 4)).ravel(), generated, atol=2e-6)


def test_cuda_noise_goes_on_and_is_normal():
    stream = CudaNoise(2**35 + 1)
    first, second = stream.randn((4, 64, 64)), stream.randn((4, 64, 64))
    assert not np.array_equal(first, second)
    assert abs(second.mean()) < 0.02 and abs(second.std() - 1.0) < 0.02
    assert np.array_equal(CudaNoise(2**35 + 1).randn((10,)), first.ravel()[:10])


def test_cuda_noise_that_depends_on_the_gpu_is_refused():
    with pytest.raises(UsageError, match="65536"):
        CudaNoise(0).randn((4, 256, 256))
    with pytest.raises(UsageError, match="cpu or cuda"):
        noise_from_seed(0, "mps")
