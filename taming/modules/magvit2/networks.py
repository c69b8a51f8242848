"""Encoder and decoder of Open-MAGVIT2 (Luo et al. 2024), after MAGVIT-v2 (Yu et al. 2023, section 3.2).

Residual convolutions without attention. In the decoder, the statistics of the whole code grid scale and shift
each resolution. Attribute names are the keys of published checkpoints.

B batch, C channels, H W pixels, h w latent grid, f = 2 ** (len(ch_mult) - 1) = H / h.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Multiples, Normalize, Resolution
from taming.modules.maskgit.networks import no_attention, residual_blocks
from taming.modules.pixel_range import UNIT, PixelRange, from_images, to_images
from taming.parameters import PositiveInt, Probability


class DownLevel(nn.Module):
    """Residual blocks, then a strided convolution that halves H and W, but at the lowest resolution."""

    def __init__(self, block: nn.ModuleList, channels: int, last: bool):
        super().__init__()
        self.block = block
        self.downsample = None if last else nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        return h if self.downsample is None else self.downsample(h)


class DepthToSpace(nn.Module):
    """Double H and W: a 3x3 convolution to 4 C channels, whose quarters are the four pixels of each place."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return rearrange(self.conv1(h), "b (row column c) h w -> b c (h row) (w column)", row=2, column=2)


class UpLevel(nn.Module):
    """Residual blocks, then H and W doubled, but at the full resolution."""

    def __init__(self, block: nn.ModuleList, channels: int, last: bool):
        super().__init__()
        self.block = block
        self.upsample = None if last else DepthToSpace(channels)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        return h if self.upsample is None else self.upsample(h)


class AdaptiveGroupNorm(nn.Module):
    """Normalize h, then scale it by a map of the codes' standard deviation and shift it by one of their mean.

    Both are statistics over the places of a code grid, of each channel; the variance is the unbiased one.

    Args:
        z_channels: channels of the codes.
        channels: channels of h.
        num_groups: groups of the normalization.
    """

    def __init__(self, z_channels: int, channels: int, num_groups: int):
        super().__init__()
        self.gn = nn.GroupNorm(num_groups, channels, eps=1e-6, affine=False)
        self.gamma = nn.Linear(z_channels, channels)
        self.beta = nn.Linear(z_channels, channels)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        """Map h (B, channels, h', w'), given codes z (B, z_channels, h, w) of at least two places."""
        places = z.flatten(2)  # (B, z_channels, h * w)
        deviation = (places.var(2) + 1e-6).sqrt()
        scale, shift = self.gamma(deviation), self.beta(places.mean(2))  # (B, channels)
        return scale[..., None, None] * self.gn(h) + shift[..., None, None]


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
        dropout: rate inside the residual blocks.
        num_groups: groups of the normalization.
        pixel_range: lowest and highest value of a pixel inside the network; images are in [-1, 1] outside.
        attn_resolutions, double_z: of the VQGAN's networks; there is no attention and no variance here.

    Raises:
        ValueError: `attn_resolutions` names any, or widths are not multiples of `num_groups`.
    """

    def __init__(
        self, *, ch: PositiveInt, ch_mult: Multiples = (1, 1, 2, 2, 4), num_res_blocks: PositiveInt = 4,
        in_channels: PositiveInt = 3, z_channels: PositiveInt, resolution: Resolution,
        out_ch: PositiveInt = 3, dropout: Probability = 0.0, num_groups: PositiveInt = 32,
        pixel_range: PixelRange = UNIT, attn_resolutions: Sequence[int] = (), double_z: bool = False,
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
                residual_blocks(num_res_blocks, before, width, dropout, num_groups, True), width,
                last=i == len(widths) - 1,
            )
            for i, (before, width) in enumerate(zip([ch, *widths], widths, strict=False))
        )
        self.mid_block = residual_blocks(
            num_res_blocks, widths[-1], widths[-1], dropout, num_groups, True
        )
        self.norm_out = Normalize(widths[-1], num_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(self.from_images(x))  # (B, ch, H, W)
        for level in self.down:
            h = level(h)  # (B, ch * ch_mult[i], H / 2**(i+1), W / 2**(i+1))
        for block in self.mid_block:
            h = block(h)  # (B, ch * ch_mult[-1], h, w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, z_channels, h, w)


class Decoder(nn.Module):
    """Map codes (B, z_channels, h, w) to images (B, out_ch, h * f, w * f), about in [-1, 1].

    Arguments are those of `Encoder`; `in_channels` is for the encoder alone.

    Raises:
        ValueError: also a `resolution` of a single code, whose places have no variance.
    """

    def __init__(
        self, *, ch: PositiveInt, ch_mult: Multiples = (1, 1, 2, 2, 4), num_res_blocks: PositiveInt = 4,
        in_channels: PositiveInt = 3, z_channels: PositiveInt, resolution: Resolution,
        out_ch: PositiveInt = 3, dropout: Probability = 0.0, num_groups: PositiveInt = 32,
        pixel_range: PixelRange = UNIT, attn_resolutions: Sequence[int] = (), double_z: bool = False,
    ):
        super().__init__()
        no_attention(attn_resolutions)
        sides, factor = [resolution] if isinstance(resolution, int) else resolution, 2 ** (len(ch_mult) - 1)
        if max(sides) // factor < 2:
            raise ValueError(
                f"resolution: {resolution} is one code of {factor}x{factor} pixels, but the adaptive "
                f"normalization needs several: make it at least {2 * factor}, or give fewer ch_mult"
            )
        self.out_ch, self.to_images = out_ch, to_images(pixel_range)
        widths = [ch * multiple for multiple in ch_mult]
        above = [*widths[1:], widths[-1]]  # channels that a level gets from the one before it
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid_block = residual_blocks(
            num_res_blocks, widths[-1], widths[-1], dropout, num_groups, True
        )
        self.up = nn.ModuleList(  # the full resolution first
            UpLevel(
                residual_blocks(num_res_blocks, before, width, dropout, num_groups, True), width, last=i == 0
            )
            for i, (before, width) in enumerate(zip(above, widths, strict=True))
        )
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(z_channels, width, num_groups) for width in above)
        self.norm_out = Normalize(widths[0], num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)  # (B, ch * ch_mult[-1], h, w)
        for block in self.mid_block:
            h = block(h)
        for level, norm in zip(reversed(self.up), reversed(self.adaptive), strict=True):
            h = level(norm(h, z))  # (B, ch * ch_mult[i], H / 2**(i-1), W / 2**(i-1))
        return self.to_images(self.conv_out(F.silu(self.norm_out(h))))  # (B, out_ch, H, W)
