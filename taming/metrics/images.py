"""How close a reconstruction is to its image.

B batch, C channels, H W pixels; images are in [-1, 1], so the data range is 2.
"""

import functools
import math

import torch
from torch import Tensor

DATA_RANGE = 2.0


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, per image.

    Args:
        a, b: images (B, C, H, W) in [-1, 1]; what lies outside is clamped.

    Returns:
        (B,) float32; inf where the images are equal.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = _clamped(a, b)
    return 10 * torch.log10(DATA_RANGE**2 / (a - b).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity, per image: the mean over channels and over all places where the window fits.

    The window is a Gaussian of 11 x 11 pixels, sigma 1.5. Where a side is shorter than 11 pixels, the window
    is cut to the largest odd size that fits; such values compare with each other only. Computed in float32;
    the same as for 8-bit pixels with a data range of 255.
    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity",
    equation 13, K1 = 0.01, K2 = 0.03.

    Args:
        a, b: images (B, C, H, W) in [-1, 1]; what lies outside is clamped.

    Returns:
        (B,) float32 in [-1, 1]; 1 where the images are equal.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = (x + 1 for x in _clamped(a, b))  # 0 is black, as in the paper: the luminance term depends on it
    window = _gaussian(min(11, *a.shape[2:]), 1.5)
    mu_a, mu_b, aa, bb, ab = _blur(torch.stack([a, b, a * a, b * b, a * b]), window).flatten(2)  # (B, C*h*w)
    var_a, var_b, cov = aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    numerator = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
    return (numerator / ((mu_a * mu_a + mu_b * mu_b + c1) * (var_a + var_b + c2))).mean(1)


def _clamped(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"two batches (B, C, H, W) are needed, got {tuple(a.shape)} and {tuple(b.shape)}")
    return a.float().clamp(-1, 1), b.float().clamp(-1, 1)


def _gaussian(room: int, sigma: float) -> list[float]:
    """Return a Gaussian window of the largest odd length up to `room`, with sum 1."""
    radius = (room - 1) // 2
    window = [math.exp(-x * x / (2 * sigma**2)) for x in range(-radius, radius + 1)]
    return [w / sum(window) for w in window]


def _blur(x: Tensor, window: list[float]) -> Tensor:
    """Filter the two last dimensions, where the window fits.

    Written as sums, since a convolution would run in TF32 or bf16 where the variances need all of float32.
    """
    for dim in (-1, -2):
        size = x.shape[dim] - len(window) + 1
        parts = (w * x.narrow(dim, k, size) for k, w in enumerate(window))
        x = functools.reduce(torch.add, parts)
    return x
