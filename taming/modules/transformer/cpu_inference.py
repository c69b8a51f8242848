"""Faster inference of the GPT on a CPU: attention in blocks, and linear layers with reordered weights.

Both give the results of torch's own kernels, up to rounding. B batch, n heads, T queries, S keys, d channels
of a head; R rows, I and O channels in and out of a linear layer.
"""

import math

import torch
from torch import Tensor, nn

FEW = 16  # sequences up to which the scores of one block of queries may lie in memory at once
BLOCK = 128  # queries
PACK_FROM = 64  # positions; reordering the weights takes as long as some 40 steps save
DTYPES = torch.float32, torch.bfloat16


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
    """Return causal attention of the last T of S positions to all of them: (B, n, T, d).

    Computed as matrix products for one block of queries after another, each with the keys that it may see.

    Args:
        q: (B, n, T, d).
        k, v: (B, n, S, d), S >= T.
        n_unmasked: length of the prefix that sees all of itself.
    """
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


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether reordered weights can be used: on a CPU, without gradients, in float32 or bfloat16."""
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return available and device.type == "cpu" and dtype in DTYPES and not torch.is_grad_enabled()


def pack_linears(module: nn.Module, rows: int, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a module with every plain linear layer packed; it shares all else with the original.

    On a CPU, `F.linear` with few rows reads its weights at a fraction of the memory's bandwidth. oneDNN comes
    close to it once they are in its order. The reordered copy takes as much memory as the weights, so it is
    made for one call of a sampler and given back after it; it holds the weights of this moment. Subclasses of
    nn.Linear, and layers with hooks or parametrizations, stay as they are.

    Args:
        module: what to pack; it is not changed.
        rows: R of the calls that matter, batch x tokens of one step; others work as well.
        dtype: in which to compute: the weights' own, or that of autocast.
    """
    if type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks):
        return PackedLinear(module, rows, dtype)
    children = {name: child and pack_linears(child, rows, dtype) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = object.__new__(type(module))  # copy.copy would call the constructor of a sharded module
    twin.__dict__.update(module.__dict__)
    twin._modules = children
    return twin


class PackedLinear(nn.Module):
    """A linear layer, x (..., I) to (..., O), over a reordered copy of another's weights, for inference."""

    def __init__(self, linear: nn.Linear, rows: int, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")
