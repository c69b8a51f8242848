"""The contract of a quantizer, and what vector quantizers share.

B batch, C channels of a code, h w latent grid, K codes, N vectors.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from taming.modules.distributed import all_reduce_sum, is_distributed
from taming.modules.quantizers.search import nearest_code


class QuantizerInfo(NamedTuple):
    """What a quantizer returns beside the quantized latents and the loss.

    It unpacks as the triple of 2021: `quant, loss, (_, _, indices) = quantizer(z)`.

    Attributes:
        perplexity: of the batch, (), or None where it is not computed.
        encodings: one-hot codes (B*h*w, K), or None.
        indices: of the codes, int64, (B, h, w) or flat (B*h*w,). Of several levels, (B, N): one grid after
            the other, the coarsest first, each row by row.
    """

    perplexity: Tensor | None
    encodings: Tensor | None
    indices: Tensor


class Quantizer(nn.Module):
    """Replaces each latent vector by one of finitely many codes: `quantizer(z) -> (z_q, loss, info)`.

    `forward` takes latents (B, C', h, w) and returns quantized latents (B, C, h, w) with a gradient
    estimator, a loss () and a `QuantizerInfo`. A new quantizer is a subclass in one file.

    Attributes:
        num_levels: number of grids of codes for one grid of latents. Where there are several, all of them
            have `codebook_size` codes, and `indices_to_codes` takes a list of grids, the coarsest first.
    """

    num_levels: int = 1

    @property
    def codebook_size(self) -> int:
        """Number of different indices."""
        raise NotImplementedError

    @property
    def code_dim(self) -> int:
        """Channels C of a code."""
        raise NotImplementedError

    def indices_to_codes(self, indices: Any) -> Tensor:
        """Return the codes (B, C, ...) of indices (B, ...), or (B, C, h, w) of a list of grids."""
        raise NotImplementedError

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the grid of codes of each level, for latents of `height` x `width`."""
        return [(height, width)] * self.num_levels

    def to_grids(self, indices: Tensor, height: int, width: int) -> Any:
        """Return indices of a `QuantizerInfo` as a grid (B, h, w), or a list of them of several levels."""
        grids = self.grids(height, width)
        if self.num_levels == 1:
            return indices.view(-1, *grids[0])
        levels = indices.split([math.prod(grid) for grid in grids], dim=1)
        return [level.reshape(-1, *grid) for level, grid in zip(levels, grids, strict=True)]


def projection(in_channels: int, out_channels: int) -> nn.Module:
    """Return a linear map of the last dimension, or nothing in its place if it need not change."""
    return nn.Linear(in_channels, out_channels) if in_channels != out_channels else nn.Identity()


def is_finite(z: Tensor) -> Tensor:
    """Return which vectors (N, C) have a finite length: (N,) bool."""
    return z.square().sum(1).isfinite()


def count_codes(indices: Tensor, size: int) -> Tensor:
    """Count how often each of `size` codes occurs: (K,) int64, without a wait for the device.

    The index `size` counts for no code.
    """
    indices = indices.flatten()
    counts = torch.zeros(size + 1, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, indices, torch.ones_like(indices))[:size]


def sum_by_code(z: Tensor, indices: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Count the vectors (N, C) of each of `size` codes, and add them up: (K,) and (K, C), over all processes.

    Both are float32. Vectors with the index `size` count for no code.
    """
    counts = count_codes(indices, size).float()
    sums = torch.zeros(size + 1, z.shape[1], device=z.device).index_add_(0, indices, z.float())
    return all_reduce_sum(counts), all_reduce_sum(sums[:size])


@torch.no_grad()
def kmeans(z: Tensor, size: int, steps: int) -> Tensor:
    """Return the centres (K, C) of `size` clusters of vectors (N, C), the same on all processes.

    Centres begin at random vectors, and move `steps` times to the mean of those that are nearest to them
    (Lloyd 1982, "Least squares quantization in PCM"). Some coincide if there are fewer vectors than centres.
    """
    rounds = range(-(-size // len(z)))
    centres = z[torch.cat([torch.randperm(len(z), device=z.device) for _ in rounds])[:size]].float()
    if is_distributed():
        dist.broadcast(centres, src=0)
    for _ in range(steps):
        counts, sums = sum_by_code(z, nearest_code(z, centres), size)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1.0)[:, None], centres)
    return centres
