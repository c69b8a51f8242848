"""Sliced Wasserstein distance between two sets of features (Bonneel et al. 2015).

N M samples, D features, P projections.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def sliced_wasserstein(real: Tensor, fake: Tensor, *, projections: int = 1000, seed: int = 0) -> float:
    """Return the mean over random directions of the squared 2-Wasserstein distance of the projections.

    Unlike a Frechet distance it needs no more samples than features. Sets of different sizes are compared at
    the quantiles of the smaller one.

    Args:
        real, fake: features (N, D) and (M, D).
        projections: directions P, uniform on the sphere.
        seed: of the directions.
    """
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"the sets have {real.shape[1]} and {fake.shape[1]} features")
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(real.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = F.normalize(directions, dim=0).to(real.device)
    a, b = ((x.double() @ directions).sort(0).values for x in (real, fake))  # (N, P), (M, P)
    size = min(len(a), len(b))
    if len(a) != len(b):
        levels = (torch.arange(size, dtype=torch.float64, device=a.device) + 0.5) / size
        a, b = (_quantiles(x, levels) for x in (a, b))
    return float((a - b).square().mean())


def _quantiles(x: Tensor, levels: Tensor) -> Tensor:
    """Interpolate between the rows of sorted x (N, P), at levels (n,) from 0 to 1: (n, P)."""
    places = levels * (len(x) - 1)
    below = places.floor().long().clamp_max(len(x) - 2) if len(x) > 1 else places.long()
    return torch.lerp(x[below], x[(below + 1).clamp_max(len(x) - 1)], (places - below)[:, None])
