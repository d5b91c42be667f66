"""Resizing of arrays against torch."""

import numpy as np
import pytest
import torch

from sdrt.runtime.interpolation import interpolate

MODES = [
    ("nearest", False),
    ("nearest-exact", False),
    ("bilinear", False),
    ("bilinear", True),
    ("bicubic", False),
    ("bicubic", True),
]


@pytest.mark.parametrize("sides", [(16, 16), (11, 13), (5, 30), (3, 2), (8, 9)])
@pytest.mark.parametrize(("mode", "antialias"), MODES)
def test_resizing_equals_torch(mode, antialias, sides):
    array = np.random.default_rng(0).normal(size=(2, 4, 8, 9)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(array), size=sides, mode=mode, antialias=antialias
    )
    np.testing.assert_allclose(interpolate(array, sides, mode, antialias), expected, atol=1e-5)
