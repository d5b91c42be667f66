"""How alike two images are: PSNR, and SSIM of Wang et al. 2004 (doi 10.1109/TIP.2003.819861).

Knows numpy.
"""

import numpy as np

SIGMA, RADIUS = 1.5, 5  # the paper's window: 11 by 11


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """dB of two uint8 images [H, W, 3]; 100 where they are the same."""
    error = float(np.mean((actual.astype(np.float64) - expected) ** 2))
    return 10 * float(np.log10(255.0**2 / error)) if error > 0 else 100.0


def ssim(actual: np.ndarray, expected: np.ndarray) -> float:
    """The mean over channels and windows that lie whole within the uint8 images [H, W, 3]."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blurred(a), blurred(b)
    of_a, of_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float(np.mean(alike / ((mean_a**2 + mean_b**2 + c1) * (of_a + of_b + c2))))


def blurred(x: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [H - 10, W - 10, C], by the Gaussian window."""
    at = np.arange(-RADIUS, RADIUS + 1)
    weights = np.exp(-0.5 * (at / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(x, len(weights), axis=axis)
        x = windows @ weights
    return x
