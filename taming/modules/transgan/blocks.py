"""The transformer block of both networks of TransGAN.

B batch, N tokens, C channels, n heads, d = C / n channels of a head.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention of all tokens, or of those that a mask allows.

    Args:
        dim: channels C.
        heads: n; divides C.
        fused: use torch's fused kernel. It has no second derivative, which a gradient penalty needs.

    Raises:
        ValueError: `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, fused: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels: set heads to a divisor of it")
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within (B, N, C); `mask` (N, N), bool, tells which keys (columns) a query (row) sees."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, n, N, d) each
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = q @ k.mT * q.shape[-1] ** -0.5  #                                     (B, n, N, N)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))  # each query sees itself at least
            y = scores.softmax(-1) @ v  #                                                 (B, n, N, d)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with 4 C hidden units and the exact GELU."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and a perceptron, each normalized before and added to its input; see `Attention`."""

    def __init__(self, dim: int, heads: int, fused: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, fused)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, N, C) to the same shape."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))
