"""Causal attention of the priors: torch's fused kernel, or matrix products where these are faster on a CPU.

All ways give the same results, up to rounding. B batch, n heads, T queries, S keys, d channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 16  # sequences up to which the scores of one block of queries may lie in memory at once
BLOCK = 128  # queries
KEPT = 2**23  # scores that may be kept for the backward pass


def attend(q: Tensor, k: Tensor, v: Tensor, n_unmasked: int = 0, dropout: float = 0.0) -> Tensor:
    """Return causal attention of the last T of S positions to all of them: (B, n, T, d).

    Args:
        q: (B, n, T, d).
        k, v: (B, n, S, d), S >= T.
        n_unmasked: length of the prefix that sees all of itself.
        dropout: rate, 0 outside of training.
    """
    if suits_blocks(q, dropout):
        return attend_in_blocks(q, k, v, n_unmasked)
    if suits_scores(q, k, dropout):
        return attend_by_scores(q, k, v, n_unmasked)
    queries, end = q.shape[2], k.shape[2]
    masked = queries > 1 and (queries < end or n_unmasked > 1)
    mask = causal_mask(end - queries, end, end, n_unmasked, q.device) if masked else None
    causal = not masked and queries > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def causal_mask(start: int, end: int, seen: int, n_unmasked: int, device: torch.device) -> Tensor:
    """Return which of the first `seen` positions start..end may attend to: bool (end - start, seen).

    A position sees itself and all before it; the first `n_unmasked` also see all of each other.
    """
    mask = torch.ones(end - start, seen, dtype=torch.bool, device=device).tril(start)
    mask[: max(0, n_unmasked - start), :n_unmasked] = True
    return mask


def suits_blocks(q: Tensor, dropout: float) -> bool:
    """Say whether attention in blocks is faster than the fused kernel for queries (B, n, T, d).

    It is for few sequences on a CPU, without gradients: in bfloat16 the fused kernel takes more than twice as
    long.
    """
    few = len(q) <= FEW or q.shape[2] == 1
    return few and q.device.type == "cpu" and not dropout and not q.requires_grad


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, n_unmasked: int) -> Tensor:
    """Compute `attend` by matrix products, for a block of queries at a time with the keys that it may see."""
    queries, end = q.shape[2], k.shape[2]
    start, blocks = end - queries, []
    q = q * q.shape[-1] ** -0.5
    for first in range(0, queries, BLOCK):
        last = min(first + BLOCK, queries)
        seen = min(end, max(start + last, n_unmasked if start + first < n_unmasked else 0))
        scores = q[:, :, first:last] @ k[:, :, :seen].transpose(-2, -1)  # (B, n, block, seen)
        if queries > 1:
            mask = causal_mask(start + first, start + last, seen, n_unmasked, q.device)
            scores = scores.masked_fill_(~mask, -math.inf)
        blocks.append(scores.softmax(-1) @ v[:, :, :seen])
    return torch.cat(blocks, dim=2)


def suits_scores(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Say whether matrix products over all scores are faster than the fused kernel for training.

    They are in bfloat16 on a CPU: the backward pass of the fused kernel takes 1.4 to 5 times as long. Their
    scores are kept for it, and so must not be too many.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or dropout or not q.requires_grad:
        return False
    return q.shape[:3].numel() * k.shape[2] <= KEPT


def attend_by_scores(q: Tensor, k: Tensor, v: Tensor, n_unmasked: int) -> Tensor:
    """Compute `attend` by matrix products over all scores (B, n, T, S), masked ones too."""
    end, queries = k.shape[2], q.shape[2]
    hidden = ~causal_mask(end - queries, end, end, n_unmasked, q.device)
    bias = q.new_zeros(queries, end).masked_fill_(hidden, -math.inf)
    rows, keys, values = (each.flatten(0, 1) for each in (q, k, v))
    scores = torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ values).view(q.shape)
