"""DINOv2: vision transformers that were trained without labels.

B batch, C channels, H W pixels, h w patches of 14 x 14 pixels, N = 1 + h * w tokens, D width.
Source: Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision"; as a metric Stein et
al. 2023, "Exposing flaws of generative model evaluation metrics".
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 14  # pixels
GRID = 37  # patches on a side of the images that the positions belong to
SIDE = 224  # pixels that metrics use
SIZES = {"small": (12, 384, 6), "base": (12, 768, 12), "large": (24, 1024, 16)}  # blocks, width, heads


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (B, N, D)."""
        return x * self.gamma


class Block(nn.Module):
    """A transformer block: attention and MLP, each normalized before, scaled after, and added."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A linear map of each patch."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to tokens (B, h * w, D)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class DINOv2(nn.Module):
    """The transformer, with the names of the published weights, `dinov2_vitl14_pretrain.pth`.

    Args:
        size: "small", "base" or "large"; or (blocks, width, heads).
    """

    def __init__(self, size: str | tuple[int, int, int] = "large"):
        super().__init__()
        blocks, self.width, heads = SIZES[size] if isinstance(size, str) else size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID * GRID, self.width))
        self.mask_token = nn.Parameter(torch.zeros(1, self.width))  # of its training; in the file
        self.patch_embed = PatchEmbed(self.width)
        self.blocks = nn.Sequential(*(Block(self.width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, D) of the class token.

        Args:
            x: images (B, 3, H, W), H and W multiples of 14, with ImageNet's mean and deviation.
        """
        return self.norm(self.blocks(self.embed(x))[:, 0])

    def embed(self, x: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) into tokens with positions, the class token first: (B, N, D)."""
        height, width = (size // PATCH for size in x.shape[2:])
        tokens = self.patch_embed(x)  # (B, h*w, D)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)  # (B, N, D)
        return tokens + self.positions(height, width)

    def maps(self, x: Tensor, blocks: Collection[int]) -> list[Tensor]:
        """Return the tokens of the patches after some blocks, counted from 0, as maps (B, D, h, w)."""
        height, width = (size // PATCH for size in x.shape[2:])
        tokens, maps = self.embed(x), []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in blocks:
                maps.append(self.norm(tokens[:, 1:]).transpose(1, 2).unflatten(2, (height, width)))
        return maps

    def positions(self, height: int, width: int) -> Tensor:
        """Interpolate the position embeddings to a grid of h x w patches: (1, N, D).

        The ratio of the sizes has 0.1 added, as in the training of the published weights.
        """
        if (height, width) == (GRID, GRID):
            return self.pos_embed
        first, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)  # (1, D, 37, 37)
        ratios = [(size + 0.1) / GRID for size in (height, width)]
        grid = F.interpolate(grid, scale_factor=ratios, mode="bicubic")  # (1, D, h, w)
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)
