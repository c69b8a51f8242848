"""The contract of a quantizer, and what vector quantizers share.

B batch, C channels of a code, h w latent grid, K codes, N vectors.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from taming.modules.distributed import all_reduce_sum, is_distributed


class QuantizerInfo(NamedTuple):
    """What a quantizer returns beside the quantized latents and the loss.

    It unpacks as the triple of 2021: `quant, loss, (_, _, indices) = quantizer(z)`.

    Attributes:
        perplexity: of the batch, (), or None where it is not computed.
        encodings: one-hot codes (B*h*w, K), or None.
        indices: of the codes, int64, (B, h, w) or flat (B*h*w,).
    """

    perplexity: Tensor | None
    encodings: Tensor | None
    indices: Tensor


class Quantizer(nn.Module):
    """Replaces each latent vector by one of finitely many codes: `quantizer(z) -> (z_q, loss, info)`.

    `forward` takes latents (B, C', h, w) and returns quantized latents (B, C, h, w) with a gradient
    estimator, a loss () and a `QuantizerInfo`. A new quantizer is a subclass in one file.
    """

    @property
    def codebook_size(self) -> int:
        """Number of different indices."""
        raise NotImplementedError

    @property
    def code_dim(self) -> int:
        """Channels C of a code."""
        raise NotImplementedError

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes (B, C, ...) of indices (B, ...)."""
        raise NotImplementedError


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the index (N,) of the code (K, C) with the smallest Euclidean distance to each vector (N, C).

    Computed in float32: under bfloat16 1 to 7 % of the indices would change, so autocast is off here.
    """
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        z, codebook = z.float(), codebook.float()
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2; the first term is the same for every code and left out
        return torch.addmm(codebook.square().sum(1), z, codebook.t(), alpha=-2.0).argmin(1)


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
