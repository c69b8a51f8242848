"""Kernel distance between two sets of features: KID on Inception features (Binkowski et al. 2018).

N M samples, D features, S subsets.
"""

import torch
from torch import Tensor

BLOCK = 2048  # rows of a kernel matrix that are in memory at once


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Return the unbiased squared MMD of features (N, D) and (M, D) under the kernel (x.y / D + 1)^3."""
    real, fake = real.double(), fake.double()
    n, m = len(real), len(fake)
    if min(n, m) < 2:
        raise ValueError(f"a kernel distance needs two samples in each set at least, got {n} and {m}")
    within_real = (_kernel_sum(real, real) - _kernel(real, real, paired=True).sum()) / (n * (n - 1))
    within_fake = (_kernel_sum(fake, fake) - _kernel(fake, fake, paired=True).sum()) / (m * (m - 1))
    return float(within_real + within_fake - 2 * _kernel_sum(real, fake) / (n * m))


def kernel_distances(
    real: Tensor, fake: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Tensor:
    """Return the kernel distance of S random subsets of both sets, (S,), float64; its mean is called KID.

    Args:
        real, fake: features (N, D) and (M, D).
        subsets, size: S, and the samples of each, taken without repetition.
        seed: of the subsets.

    Raises:
        ValueError: a subset larger than a set.
    """
    if size > min(len(real), len(fake)):
        raise ValueError(f"subsets of {size}, but there are {len(real)} and {len(fake)} samples: lower size")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows, columns = (
            torch.randperm(len(x), generator=generator)[:size].to(x.device) for x in (real, fake)
        )
        values.append(kernel_distance(real[rows], fake[columns]))
    return torch.tensor(values, dtype=torch.float64)


def _kernel(x: Tensor, y: Tensor, *, paired: bool = False) -> Tensor:
    """Return the kernel of all pairs (N, M), or of rows at the same place (N,)."""
    products = (x * y).sum(1) if paired else x @ y.T
    return (products / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([_kernel(rows, y).sum() for rows in x.split(BLOCK)]).sum()
