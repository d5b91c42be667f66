"""How alike images are, as the benchmarks say it: scikit-image's numbers."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from similarity import psnr, ssim


def images():
    y, x = np.mgrid[:40, :56]
    first = np.stack([3 * x + y, 5 * y, 255 - 4 * x], axis=2) % 256
    second = first + np.round(20 * np.sin(x * y / 30.0))[..., None]
    return first.astype(np.uint8), np.clip(second, 0, 255).astype(np.uint8)


def test_numbers_are_scikit_images():
    """Of its version 0.26, with the paper's window: gaussian_weights, sigma 1.5, no sample
    covariance.
    """
    assert psnr(*images()) == pytest.approx(25.30607620725832, abs=1e-9)
    assert ssim(*images()) == pytest.approx(0.41933297689080784, abs=1e-9)


def test_the_same_image_is_the_same():
    first, _ = images()
    assert psnr(first, first) == 100.0 and ssim(first, first) == pytest.approx(1.0)
