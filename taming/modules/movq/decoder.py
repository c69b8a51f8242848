"""The decoder of MoVQ (Zheng et al. 2022, arXiv 2209.09002, section 3.2): codes also modulate its features.

Attribute names are the keys of Kandinsky 2's checkpoint. B batch, C channels, D channels of a code, H W
pixels, h w latent grid, f = 2 ** (len(ch_mult) - 1) = H / h.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import (
    AttnBlock,
    Multiples,
    Normalize,
    ResnetBlock,
    Resolution,
    Upsample,
    nonlinearity,
)
from taming.modules.pixel_range import UNIT, PixelRange, to_images
from taming.parameters import NonNegativeInt, PositiveInt, Probability


class SpatialNorm(nn.Module):
    """A group normalization whose scale and shift at each position are linear in the code there (eq. 5)."""

    def __init__(self, channels: int, code_channels: int, num_groups: int = 32):
        super().__init__()
        self.norm_layer = Normalize(channels, num_groups)
        self.conv_y = nn.Conv2d(code_channels, channels, kernel_size=1)
        self.conv_b = nn.Conv2d(code_channels, channels, kernel_size=1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Normalize x (B, C, H, W), modulated by codes (B, D, h, w)."""
        # the convolutions see each position alone: they are faster before the map is enlarged
        scale, shift = self.conv_y(codes), self.conv_b(codes)
        scale, shift = (F.interpolate(part, size=x.shape[2:], mode="nearest") for part in (scale, shift))
        return self.norm_layer(x) * scale + shift


@dataclass(frozen=True)
class _Settings:
    """What all blocks of a decoder share: channels of a code, rate of dropout, groups of normalizations."""

    code_channels: int
    dropout: float
    num_groups: int

    def norm(self, channels: int) -> SpatialNorm:
        return SpatialNorm(channels, self.code_channels, self.num_groups)


class SpatialResnetBlock(ResnetBlock):
    """A residual block whose normalizations see the codes."""

    def __init__(self, in_channels: int, out_channels: int, settings: _Settings):
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, dropout=settings.dropout, temb_channels=0,
            num_groups=settings.num_groups,
        )
        self.norm1: Any = settings.norm(in_channels)
        self.norm2: Any = settings.norm(out_channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:  # type: ignore[override]
        """Map x (B, in_channels, H, W), modulated by codes (B, D, h, w)."""
        h = self.conv1(nonlinearity(self.norm1(x, codes)))
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h, codes))))
        return h + (x if self.in_channels == self.out_channels else self.nin_shortcut(x))


class SpatialAttnBlock(AttnBlock):
    """Self-attention whose normalization sees the codes."""

    def __init__(self, in_channels: int, settings: _Settings):
        super().__init__(in_channels, settings.num_groups)
        self.norm: Any = settings.norm(in_channels)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:  # type: ignore[override]
        """Map x (B, C, H, W), modulated by codes (B, D, h, w)."""
        return x + self.attend(self.norm(x, codes))


class _Level(nn.Module):
    """Residual blocks, each with attention if asked, and a change of resolution."""

    upsample: Upsample | None

    def __init__(self, channels: Sequence[int], settings: _Settings, attend: bool):
        super().__init__()
        pairs = zip(channels, channels[1:], strict=False)
        self.block = nn.ModuleList(SpatialResnetBlock(a, b, settings) for a, b in pairs)
        self.attn = nn.ModuleList(SpatialAttnBlock(c, settings) for c in channels[1:] if attend)

    def forward(self, h: Tensor, codes: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h, codes)
            h = self.attn[i](h, codes) if self.attn else h
        return h if self.upsample is None else self.upsample(h)


class _Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, settings: _Settings):
        super().__init__()
        self.block_1 = SpatialResnetBlock(channels, channels, settings)
        self.attn_1 = SpatialAttnBlock(channels, settings)
        self.block_2 = SpatialResnetBlock(channels, channels, settings)

    def forward(self, h: Tensor, codes: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, codes), codes), codes)


class MOVQDecoder(nn.Module):
    """Maps latents and the codes that they are of to images.

    Args:
        embed_dim: channels D of a code.
        ch, out_ch, ch_mult, num_res_blocks, attn_resolutions, dropout, resolution, z_channels, num_groups,
            pixel_range: see `taming.modules.diffusionmodules.model.Encoder`.
        ignored: further arguments of the encoder, which have no effect.
    """

    def __init__(
        self, *, embed_dim: PositiveInt, ch: PositiveInt, out_ch: PositiveInt, ch_mult: Multiples,
        num_res_blocks: NonNegativeInt, attn_resolutions: Iterable[int], resolution: Resolution,
        z_channels: PositiveInt, dropout: Probability = 0.0, num_groups: PositiveInt = 32,
        pixel_range: PixelRange = UNIT, **ignored: Any,
    ):
        super().__init__()
        settings = _Settings(embed_dim, dropout, num_groups)
        widths = [ch * mult for mult in ch_mult]
        side = resolution if isinstance(resolution, int) else min(resolution)
        self.to_images = to_images(pixel_range)
        self.conv_in = nn.Conv2d(z_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = _Middle(widths[-1], settings)
        levels = []
        for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            channels = [before] + [width] * (num_res_blocks + 1)
            level = _Level(channels, settings, side // 2**i in attn_resolutions)
            level.upsample = Upsample(width) if i else None
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out = settings.norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor, codes: Tensor) -> Tensor:
        """Map latents z (B, z_channels, h, w) and codes (B, D, h, w) to images (B, out_ch, h * f, w * f)."""
        h = self.mid(self.conv_in(z), codes)  #                      (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level(h, codes)  #                                   (B, ch * ch_mult[i], ...)
        h = nonlinearity(self.norm_out(h, codes))  #                 (B, ch * ch_mult[0], H, W)
        return self.to_images(self.conv_out(h))  #                   (B, out_ch, H, W)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        return self.conv_out.weight

    @property
    def out_ch(self) -> int:
        """Channels of the images."""
        return self.conv_out.out_channels
