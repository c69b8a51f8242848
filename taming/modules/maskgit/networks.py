"""Encoder and decoder of MaskGIT's VQGAN (Chang et al. 2022) and of VQGAN+ (Weber et al. 2024, "MaskBit").

The convolutions of the VQGAN without attention, and mostly without biases. Attribute names are the keys of
published checkpoints.

B batch, C channels, H W pixels, h w latent grid, f = 2 ** (len(ch_mult) - 1) = H / h.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Multiples, Normalize, Resolution
from taming.modules.pixel_range import UNIT, PixelRange, from_images, to_images
from taming.parameters import PositiveInt, Probability


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions without biases beside a skip connection.

    Where MaskGIT changes the channels, the result is h + W h for the output h of the convolutions: the
    original code gives its 1x1 convolution W this output, not the block's input, and weights were trained so.

    Args:
        in_channels, out_channels: channels in and out.
        dropout: rate before the second convolution.
        num_groups: groups of the normalization.
        shortcut_of_input: h + W x, as usual and as in Open-MAGVIT2.
    """

    def __init__(
        self, in_channels: int, out_channels: int, dropout: float, num_groups: int,
        shortcut_of_input: bool = False,
    ):
        super().__init__()
        self.shortcut_of_input = shortcut_of_input
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = None
        if in_channels != out_channels:
            shortcut_channels = in_channels if shortcut_of_input else out_channels
            self.nin_shortcut = nn.Conv2d(shortcut_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x if self.shortcut_of_input else h)
        return h + x


def residual_blocks(count: int, in_channels: int, out_channels: int, *arguments: Any) -> nn.ModuleList:
    """Return `count` blocks, the first of which changes the channels; see `ResidualBlock`."""
    ins = [in_channels] + [out_channels] * (count - 1)
    return nn.ModuleList(ResidualBlock(channels, out_channels, *arguments) for channels in ins)


class DownLevel(nn.Module):
    """Residual blocks of one resolution, then H and W halved, rounded down, but at the lowest.

    Args:
        block: the residual blocks.
        channels: of their result.
        last: this is the lowest resolution.
        with_conv: halve by a strided convolution, as VQGAN+ does, not by average pooling.
    """

    def __init__(self, block: nn.ModuleList, channels: int, last: bool, with_conv: bool):
        super().__init__()
        self.block, self.last = block, last
        self.down_conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv and not last else None

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        if self.last:
            return h
        if self.down_conv is None:
            return F.avg_pool2d(h, 2)
        return self.down_conv(F.pad(h, (0, 1, 0, 1)))  # what TensorFlow's SAME is for even sides


class UpLevel(nn.Module):
    """Residual blocks of one resolution, then H and W doubled, but at the full one.

    Args:
        block: the residual blocks.
        channels: of their result.
        last: this is the full resolution.
    """

    def __init__(self, block: nn.ModuleList, channels: int, last: bool):
        super().__init__()
        self.block = block
        self.upsample_conv = None if last else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        if self.upsample_conv is None:
            return h
        return self.upsample_conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Map images (B, in_channels, H, W) in [-1, 1] to latents (B, z_channels, H / f, W / f).

    Args:
        ch: channels at full resolution, a multiple of `num_groups`.
        ch_mult: multiple of `ch` at each resolution; each but the last halves H and W.
        num_res_blocks: residual blocks per resolution, and at the end.
        in_channels: channels of the images.
        z_channels: channels of the latents.
        resolution: training size in pixels, a side or [height, width]; the networks take any size.
        out_ch: channels of the decoded image (the decoder's; taken so that both halves share one `ddconfig`).
        resamp_with_conv: halve by strided convolutions, as VQGAN+ does, not by average pooling.
        dropout: rate inside the residual blocks.
        num_groups: groups of the normalization.
        pixel_range: lowest and highest value of a pixel inside the network; images are in [-1, 1] outside.
        attn_resolutions, double_z: of the VQGAN's networks; there is no attention and no variance here.

    Raises:
        ValueError: `attn_resolutions` names any, or widths are not multiples of `num_groups`.
    """

    def __init__(
        self, *, ch: PositiveInt, ch_mult: Multiples = (1, 1, 2, 2, 4), num_res_blocks: PositiveInt = 2,
        in_channels: PositiveInt = 3, z_channels: PositiveInt, resolution: Resolution,
        out_ch: PositiveInt = 3, resamp_with_conv: bool = False, dropout: Probability = 0.0,
        num_groups: PositiveInt = 32, pixel_range: PixelRange = UNIT, attn_resolutions: Sequence[int] = (),
        double_z: bool = False,
    ):
        super().__init__()
        no_attention(attn_resolutions)
        self.resolution, self.in_channels, self.z_channels = resolution, in_channels, z_channels
        self.factor = 2 ** (len(ch_mult) - 1)
        self.pixel_range, self.from_images = (pixel_range[0], pixel_range[1]), from_images(pixel_range)
        widths = [ch * multiple for multiple in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            DownLevel(
                residual_blocks(num_res_blocks, before, width, dropout, num_groups), width,
                last=i == len(widths) - 1, with_conv=resamp_with_conv,
            )
            for i, (before, width) in enumerate(zip([ch, *widths], widths, strict=False))
        )
        self.mid = residual_blocks(num_res_blocks, widths[-1], widths[-1], dropout, num_groups)
        self.norm_out = Normalize(widths[-1], num_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(self.from_images(x))  # (B, ch, H, W)
        for level in self.down:
            h = level(h)  # (B, ch * ch_mult[i], H / 2**(i+1), W / 2**(i+1))
        for block in self.mid:
            h = block(h)  # (B, ch * ch_mult[-1], h, w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, z_channels, h, w)


class Decoder(nn.Module):
    """Map latents (B, z_channels, h, w) to images (B, out_ch, h * f, w * f), about in [-1, 1].

    Arguments are those of `Encoder`; `resamp_with_conv`, `in_channels` and `resolution` are for the encoder
    alone.
    """

    def __init__(
        self, *, ch: PositiveInt, ch_mult: Multiples = (1, 1, 2, 2, 4), num_res_blocks: PositiveInt = 2,
        in_channels: PositiveInt = 3, z_channels: PositiveInt, resolution: Resolution | None = None,
        out_ch: PositiveInt = 3, resamp_with_conv: bool = False, dropout: Probability = 0.0,
        num_groups: PositiveInt = 32, pixel_range: PixelRange = UNIT, attn_resolutions: Sequence[int] = (),
        double_z: bool = False,
    ):
        super().__init__()
        no_attention(attn_resolutions)
        self.out_ch, self.to_images = out_ch, to_images(pixel_range)
        widths = [ch * multiple for multiple in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = residual_blocks(num_res_blocks, widths[-1], widths[-1], dropout, num_groups)
        self.up = nn.ModuleList(  # the full resolution first
            UpLevel(residual_blocks(num_res_blocks, before, width, dropout, num_groups), width, last=i == 0)
            for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = Normalize(widths[0], num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)  # (B, ch * ch_mult[-1], h, w)
        for block in self.mid:
            h = block(h)
        for level in reversed(self.up):
            h = level(h)  # (B, ch * ch_mult[i], H / 2**(i-1), W / 2**(i-1))
        return self.to_images(self.conv_out(F.silu(self.norm_out(h))))  # (B, out_ch, H, W)


def no_attention(attn_resolutions: Sequence[int]) -> None:
    """Raise ValueError if attention is asked for."""
    if attn_resolutions:
        raise ValueError(
            f"attn_resolutions: {list(attn_resolutions)}, but this network has no attention: set it to [], "
            "or take taming.modules.diffusionmodules.model"
        )
