"""Encoder and decoder of VQ-VAE (van den Oord et al. 2017, section 4.1) and VQ-VAE-2 (Razavi et al. 2019).

Strided convolutions, then residual blocks at the lowest resolution, without normalization or attention.
Attribute names are the keys of rosinality/vq-vae-2-pytorch's checkpoints.

B batch, C channels, H W pixels, h w latent grid, f = 2 ** num_down = H / h.
"""

from typing import Any

from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Resolution
from taming.modules.pixel_range import UNIT
from taming.parameters import NonNegativeInt, PositiveInt


class ResidualBlock(nn.Module):
    """Two convolutions, 3x3 to `res_ch` channels and 1x1 back, beside a skip connection."""

    def __init__(self, ch: int, res_ch: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(), nn.Conv2d(ch, res_ch, 3, padding=1), nn.ReLU(), nn.Conv2d(res_ch, ch, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Encoder(nn.Module):
    """Map images (B, in_channels, H, W) to features (B, ch, H / f, W / f).

    The first 4x4 convolution gives ch / 2 channels, the others ch; a 3x3 convolution leads to the residual
    blocks.

    Args:
        in_channels: channels of the images.
        resolution: training size in pixels, a side or [height, width]; the networks take any size.
        ch: channels of the features, even.
        num_res_blocks: residual blocks.
        res_ch: channels inside of them.
        num_down: strided convolutions, each of which halves H and W.
        out_ch: channels of the decoded image (the decoder's; taken so that both halves share one `ddconfig`).

    Raises:
        ValueError: an odd `ch`.
    """

    def __init__(
        self, *, in_channels: PositiveInt, resolution: Resolution, ch: PositiveInt,
        num_res_blocks: NonNegativeInt, res_ch: PositiveInt, num_down: PositiveInt = 2,
        out_ch: PositiveInt | None = None,
    ):
        super().__init__()
        self.in_channels, self.resolution, self.z_channels = in_channels, resolution, ch
        self.pixel_range = UNIT
        self.factor = 2**num_down
        widths = [in_channels, _half(ch)] + [ch] * (num_down - 1)
        blocks: list[nn.Module] = []
        for before, width in zip(widths, widths[1:], strict=False):
            blocks += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.ReLU()]
        blocks += [nn.Conv2d(widths[-1], ch, 3, padding=1)]
        blocks += [ResidualBlock(ch, res_ch) for _ in range(num_res_blocks)]
        self.blocks = nn.Sequential(*blocks, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # (B, in_channels, H, W) -> (B, ch, h, w)


class Decoder(nn.Module):
    """Map latents (B, z_channels, h, w) to images (B, out_ch, h * f, w * f): the encoder in reverse.

    Arguments are those of `Encoder`, whose `in_channels` and `resolution` have no effect here.

    Args:
        z_channels: channels of the latents; `ch` when None.
    """

    def __init__(
        self, *, out_ch: PositiveInt, ch: PositiveInt, num_res_blocks: NonNegativeInt, res_ch: PositiveInt,
        num_down: PositiveInt = 2, z_channels: PositiveInt | None = None,
        in_channels: PositiveInt | None = None, resolution: Resolution | None = None,
    ):
        super().__init__()
        widths = [ch] * max(1, num_down - 1) + [_half(ch)] * (num_down > 1) + [out_ch]
        blocks: list[nn.Module] = [nn.Conv2d(z_channels or ch, ch, 3, padding=1)]
        blocks += [ResidualBlock(ch, res_ch) for _ in range(num_res_blocks)]
        for before, width in zip(widths, widths[1:], strict=False):
            blocks += [nn.ReLU(), nn.ConvTranspose2d(before, width, 4, stride=2, padding=1)]
        self.blocks, self.out_ch = nn.Sequential(*blocks), out_ch

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        weight: Any = self.blocks[-1].weight
        return weight

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(z)  # (B, z_channels, h, w) -> (B, out_ch, H, W)


def _half(ch: int) -> int:
    if ch % 2:
        raise ValueError(f"ch: {ch} is odd, but the outermost convolutions have half as many channels")
    return ch // 2
