"""The logit-Laplace likelihood of pixels (Ramesh et al. 2021, appendix A.3).

B batch, C channels of a pixel, H W pixels. Pixels p are in [0, 1].
"""

import math

import torch
from torch import Tensor

EPS = 0.1  # the logit is not defined at 0 and 1, where many pixels are


def map_pixels(p: Tensor) -> Tensor:
    """Map [0, 1] to [eps, 1 - eps]."""
    return (1 - 2 * EPS) * p + EPS


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Invert `map_pixels`; values outside of its range become 0 or 1."""
    return ((mapped - EPS) / (1 - 2 * EPS)).clamp(0.0, 1.0)


def logit_laplace_nll(stats: Tensor, mapped: Tensor) -> Tensor:
    """Return -ln f(x | mu, b) of each value, (B, C, H, W), in nats, float32; a density may exceed 1.

        f(x | mu, b) = 1 / (2 b x (1 - x)) * exp(-|logit(x) - mu| / b)                     eq. 2

    Args:
        stats: mu and then ln b, (B, 2 C, H, W).
        mapped: x, pixels from `map_pixels`, (B, C, H, W), above 0 and below 1.
    """
    mu, ln_b = stats.float().chunk(2, dim=1)
    x = mapped.float()
    distance = (torch.logit(x) - mu).abs()
    return math.log(2) + ln_b + torch.log(x * (1 - x)) + distance * torch.exp(-ln_b)


def mean_pixels(stats: Tensor) -> Tensor:
    """Return the pixels (B, C, H, W) in [0, 1] that DALL-E shows: those of mu; b is not looked at."""
    mu, _ = stats.float().chunk(2, dim=1)
    return unmap_pixels(torch.sigmoid(mu))
