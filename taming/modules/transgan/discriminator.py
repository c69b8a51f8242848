"""TransGAN's discriminator: a vision transformer with one logit per image.

Sources: Jiang, Chang and Wang 2021, "TransGAN", section 3.1; Dosovitskiy et al. 2021, "An image is worth
16x16 words"; parameter names are those of TransGAN's published code. B batch, H W pixels, N patches, C = dim.
"""

import torch
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Resolution
from taming.modules.transgan.blocks import Block
from taming.parameters import PositiveInt


class ViTDiscriminator(nn.Module):
    """Maps images (B, 3, H, W) to logits (B, 1).

    Args:
        resolution: size of the images, a side or (height, width), in pixels.
        dim: channels C of a token.
        depth: number of blocks.
        heads: attention heads.
        patch_size: side of a patch in pixels; 4 at 32 pixels is a grid of 8x8 patches.
        fused_attention: use torch's fused kernel: faster, but without the second derivative that a gradient
            penalty needs.

    Raises:
        ValueError: patches do not divide the image, or heads the channels.
    """

    def __init__(
        self, resolution: Resolution, dim: PositiveInt = 384,
        depth: PositiveInt = 7, heads: PositiveInt = 4, patch_size: PositiveInt = 4,
        fused_attention: bool = False,
    ):
        super().__init__()
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"patches of {patch_size}x{patch_size} pixels do not divide images of {height}x{width}: set "
                "patch_size to a divisor of both sides"
            )
        self.image_size, self.fused_attention = (height, width), fused_attention
        patches = height * width // patch_size**2
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, fused_attention) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize: linear layers and positions N(0, 0.02), truncated; the convolution after Glorot."""
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight)

    def features(self, x: Tensor) -> Tensor:
        """Return the normalized class token (B, C) of images (B, 3, H, W)."""
        if tuple(x.shape[2:]) != self.image_size:
            wanted, found = (f"{h}x{w}" for h, w in (self.image_size, x.shape[2:]))
            raise ValueError(f"the discriminator takes images of {wanted} pixels, got {found}")
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  #                         (B, N, C)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)  #           (B, 1 + N, C)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])  # of this token alone: the normalization is per token

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, 1), higher for real ones."""
        return self.head(self.features(x))
