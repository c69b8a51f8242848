"""Fidelity and diversity by nearest neighbours in feature space.

Improved precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020). N real and
M fake samples, D features. Distances are computed in blocks and float64: 50,000 x 10,000 samples fit in 2 GB.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 2**28  # bytes of a block of distances


@dataclass(frozen=True)
class Manifold:
    """Shares, 0 to 1; density may exceed 1.

    Attributes:
        precision: of fake samples within the neighbourhood of any real one.
        recall: of real samples within the neighbourhood of any fake one.
        density: mean over fake samples of the number of real neighbourhoods that hold it, over k.
        coverage: of real samples whose neighbourhood holds a fake one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@torch.no_grad()
def manifold_metrics(real: Tensor, fake: Tensor, *, k: int) -> Manifold:
    """Compare features (N, D) and (M, D); a neighbourhood reaches to the k-th nearest sample of its own set.

    The usual k is 3 for precision and recall, 5 for density and coverage.

    Raises:
        ValueError: k is not below the number of samples of both sets.
    """
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k is {k}: give 1 to {min(len(real), len(fake)) - 1}, below the number of samples")
    real, fake = real.double(), fake.double()
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    inside_real = []
    holding = torch.zeros((), dtype=torch.float64, device=real.device)
    nearest = torch.full_like(real_radii, torch.inf)
    found = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(fake.split(_rows(real)), fake_radii.split(_rows(real)), strict=True):
        distances = torch.cdist(rows, real)  # (rows, N)
        held = distances < real_radii
        inside_real.append(held.any(1))
        holding += held.sum()
        nearest = torch.minimum(nearest, distances.amin(0))
        found |= (distances < radii[:, None]).any(0)
    covered = nearest < real_radii
    return Manifold(
        precision=float(torch.cat(inside_real).double().mean()), recall=float(found.double().mean()),
        density=float(holding / (k * len(fake))), coverage=float(covered.double().mean()),
    )


def _radii(x: Tensor, k: int) -> Tensor:
    """Return the distance of each sample (N, D) to its k-th nearest, itself not counted: (N,)."""
    parts = [torch.cdist(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(_rows(x))]
    return torch.cat(parts)


def _rows(x: Tensor) -> int:
    """Return how many rows of distances to all samples (N, D) fit in a block."""
    return max(1, MEMORY // (8 * len(x)))
