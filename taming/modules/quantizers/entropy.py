"""Entropies of the choice of codes, as a loss: each choice sure, all codes in use.

With p_n the distribution over K codes of vector n, and p its mean over the batch,

    L = w_sample mean_n H(p_n) - w_batch H(p)        (Yu et al. 2023, "Language model beats diffusion", eq. 5)

in nats. Each function returns the two entropies. Memory for a batch of N vectors is bounded: no function
holds N x K values, neither in the forward nor in the backward pass, unless they are few. C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from taming.modules.distributed import all_reduce_mean

MEMORY = 256 << 20  # bytes for the probabilities of a block of vectors and what their gradient needs
COPIES = 6  # of a block's probabilities that the backward pass holds at once, about
NEGLIGIBLE = 1e-19  # probability; products of two are not denormal numbers, which CPUs multiply slowly
EPS = 1e-5  # added to p in log p, as in the code of LlamaGen, IBQ and Open-MAGVIT2


def in_blocks(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], z: Tensor, codes: Tensor, memory: int = MEMORY
) -> list[tuple[Tensor, ...]]:
    """Apply a function of vectors (N, C) and all codes (K, C) to blocks of vectors; list its results.

    The blocks are so small that each needs no more than `memory` bytes. Where there are several, what a
    block computes is not kept for the backward pass but computed again.
    """
    rows = max(1, memory // (4 * COPIES * len(codes)))
    if len(z) <= rows:
        return [function(z, codes)]
    return [checkpoint(function, block, codes, use_reentrant=False) for block in z.split(rows)]


def batch_entropy(mean: Tensor, eps: float = EPS) -> Tensor:
    """Return the entropy () of mean probabilities (K,) of the batch.

    Its value is that of the mean over all processes. Each has the gradient to its own part, so that `ddp`,
    which averages gradients, gives the gradient of the whole.
    """
    mean = mean + (all_reduce_mean(mean.detach()) - mean.detach())
    floor = torch.finfo(mean.dtype).tiny  # so that 0 log 0 is 0
    return -(mean * (mean + max(eps, floor)).log()).sum()


def softmax_entropies(
    z: Tensor, codes: Tensor, temperature: float, euclidean: bool, eps: float = EPS, memory: int = MEMORY
) -> tuple[Tensor, Tensor]:
    """Return the mean entropy of each vector (N, C), and that of the batch, both ().

    p_n = softmax over codes e (K, C) of z_n.e / temperature, or of -|z_n - e|^2 / temperature.
    """

    def block(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        logits = z @ codes.t()  # (n, K)
        if euclidean:  # without |z|^2, which all codes have
            logits = 2 * logits - codes.square().sum(1)
        log_p = (logits / temperature).log_softmax(1)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(0)

    sums = in_blocks(block, z, codes, memory)
    sample, total = sums[0]  # (), (K,)
    for of_block in sums[1:]:
        sample, total = sample + of_block[0], total + of_block[1]
    return sample / len(z), batch_entropy(total / len(z), eps)


def bit_entropies(
    z: Tensor, temperature: float, scale: float = 1.0, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """Return the mean entropy of each vector (N, D), and that of the batch, over 2^D codes, both ().

    p_n = softmax over all codes e of -|z_n - e|^2 / temperature, each channel of e +scale or -scale. This is
    a product over channels: that of n's bit d being 1 is sigmoid(4 scale z_nd / temperature). So H(p_n) is
    the sum of the entropies of bits, and the batch's mean is one product of the distributions of the lower
    and of the upper half of the bits, (2^(D/2), N) @ (N, 2^(D/2)): exact, with 2^D + 2 N 2^(D/2) values.
    """
    logits = 4 * scale * z / temperature  # (N, D)
    one, zero = logits.sigmoid(), (-logits).sigmoid()
    sample = -(one * torch.nn.functional.logsigmoid(logits)
               + zero * torch.nn.functional.logsigmoid(-logits)).sum(1).mean()
    half = z.shape[1] // 2
    lower, upper = (_joint(zero[:, part], one[:, part]) for part in (slice(half), slice(half, None)))
    return sample, batch_entropy((upper.t() @ lower / len(z)).flatten(), eps)


def _joint(zero: Tensor, one: Tensor) -> Tensor:
    """Return the joint probabilities (N, 2^D) of independent bits, from each being 0 and being 1, (N, D).

    Those below NEGLIGIBLE are 0.
    """
    joint = zero.new_ones(len(zero), 1)
    for p0, p1 in zip(zero.unbind(1), one.unbind(1), strict=True):
        joint = torch.cat((joint * p0[:, None], joint * p1[:, None]), dim=1)
        joint = torch.nn.functional.threshold(joint, NEGLIGIBLE, 0.0)
    return joint
