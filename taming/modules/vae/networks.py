"""Convolutional encoder and decoder of a variational autoencoder, for images of any one size.

B batch, C channels, H W pixels, d latent dimensions.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Resolution
from taming.modules.group_norm import GroupNorm
from taming.parameters import PositiveInt

Size = tuple[int, int]


def _norm(kind: str, channels: int) -> nn.Module:
    """Return a normalization by its name."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return GroupNorm(math.gcd(8, channels), channels)
    raise ValueError(f'ddconfig.norm: {kind!r} is unknown; choose "batch" or "group"')


def _shape(
    resolution: int | Sequence[int], ch: int, ch_mult: Sequence[int] | None
) -> tuple[list[Size], list[int]]:
    """Return the sizes from full to lowest resolution, and the channels of all but the first."""
    h, w = (resolution, resolution) if isinstance(resolution, int) else resolution
    if ch_mult is None:  # down to 2 pixels of the shorter side
        ch_mult = [2**i for i in range(max(0, math.ceil(math.log2(min(h, w))) - 1))]
    sizes = [(h, w)]
    for _ in ch_mult:
        h, w = (h + 1) // 2, (w + 1) // 2
        sizes.append((h, w))
    return sizes, [ch * multiple for multiple in ch_mult]


class Encoder(nn.Module):
    """Map images (B, in_channels, H, W) to mean and log-variance (B, 2 d) of their latents.

    Strided 3x3 convolutions with normalization and LeakyReLU, each of which halves H and W, rounding up; then
    one linear layer.

    Args:
        in_channels: channels of the images.
        resolution: their size in pixels, a side or [height, width]: any, but always the same.
        latent_dim: d.
        ch: channels after the first convolution.
        ch_mult: multiple of `ch` after each convolution; None doubles them down to 2 pixels. An empty list
            leaves the linear layer alone.
        norm: "batch" or "group".
    """

    def __init__(
        self, *, in_channels: PositiveInt, resolution: Resolution, latent_dim: PositiveInt,
        ch: PositiveInt = 32, ch_mult: Sequence[PositiveInt] | None = None, norm: str = "batch",
    ):
        super().__init__()
        self.in_channels, self.resolution, self.latent_dim = in_channels, resolution, latent_dim
        sizes, widths = _shape(resolution, ch, ch_mult)
        layers: list[nn.Module] = []
        for before, width in zip([in_channels, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), _norm(norm, width), nn.LeakyReLU()]
        self.layers = nn.Sequential(*layers)
        self.moments = nn.Linear([in_channels, *widths][-1] * math.prod(sizes[-1]), 2 * latent_dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)  # (B, ch * ch_mult[-1], h, w)
        return self.moments(h.flatten(1))  # (B, 2 d)


class Decoder(nn.Module):
    """Map latents (B, d) to parameters of a likelihood (B, out_ch, H, W); the encoder in reverse.

    Arguments are those of `Encoder`, whose `in_channels` has no effect here.

    Args:
        out_ch: channels of the parameters.
    """

    def __init__(
        self, *, out_ch: PositiveInt, resolution: Resolution, latent_dim: PositiveInt, ch: PositiveInt = 32,
        ch_mult: Sequence[PositiveInt] | None = None, norm: str = "batch", in_channels: Any = None,
    ):
        super().__init__()
        sizes, widths = _shape(resolution, ch, ch_mult)
        self.start = ([out_ch, *widths][-1], *sizes[-1])
        self.linear = nn.Linear(latent_dim, math.prod(self.start))
        layers: list[nn.Module] = []
        afterwards = [widths[0], *widths[:-1]] if widths else []
        steps = [*zip(widths, afterwards, sizes[1:], sizes, strict=False)]
        for width, after, small, large in reversed(steps):
            more = [side - (2 * half - 1) for side, half in zip(large, small, strict=True)]  # 1 if even
            layers += [
                nn.ConvTranspose2d(width, after, 3, stride=2, padding=1, output_padding=(more[0], more[1])),
                _norm(norm, after), nn.LeakyReLU(),
            ]
        if widths:
            layers.append(nn.Conv2d(widths[0], out_ch, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        h = self.linear(z).unflatten(1, self.start)  # (B, ch * ch_mult[-1], h, w)
        return self.layers(h)  # (B, out_ch, H, W)
