"""Blur: of what a discriminator sees, and in place of bare strides inside of it.

B batch, C channels, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.parameters import PositiveInt


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur images (B, C, H, W) by a Gaussian of the deviation `sigma` in pixels; borders are mirrored."""
    height, width = x.shape[2:]
    radius = min(math.ceil(3.0 * sigma), height - 1, width - 1)
    if sigma <= 0.0 or radius < 1:
        return x
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma).square())
    line = (line / line.sum()).to(x.dtype).expand(x.shape[1], 1, 1, -1)  # (C, 1, 1, 2 radius + 1)
    x = F.conv2d(F.pad(x, (radius,) * 4, mode="reflect"), line, groups=x.shape[1])
    return F.conv2d(x, line.transpose(2, 3), groups=x.shape[1])


class BlurPool(nn.Module):
    """Blur with the binomial 4x4 filter and keep every second position: (B, C, H, W) to (B, C, H/2, W/2).

    Source: Zhang 2019, "Making convolutional networks shift-invariant again".
    """

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
        self.register_buffer("filter", torch.outer(line, line)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H/2, W/2), rounded up."""
        height, width = x.shape[2:]
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2), mode="replicate")
        filters = self.filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, filters, stride=2, groups=x.shape[1])


class BlurPoolDiscriminator(nn.Module):
    """A patch discriminator that blurs before it subsamples, with group instead of batch normalization.

    No logit depends on other images of the batch. Source: Weber et al. 2024, "MaskBit", section 3.1, after Yu
    et al. 2024, "Language model beats diffusion: Tokenizer is key to visual generation", appendix.

    Args:
        input_nc: image channels C.
        ndf: features of the first layer; they double with each stage, to 8 * ndf at most.
        n_layers: number of stages, each of half the height and width.
    """

    def __init__(self, input_nc: PositiveInt = 3, ndf: PositiveInt = 64, n_layers: PositiveInt = 3):
        super().__init__()
        self.input_nc, self.n_layers = input_nc, n_layers
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 5, padding=2), nn.LeakyReLU(0.2)]
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [
                nn.Conv2d(before, after, 3, padding=1), BlurPool(), nn.GroupNorm(math.gcd(after, 32), after),
                nn.LeakyReLU(0.2),
            ]
        layers += [nn.Conv2d(widths[-1], widths[-1], 1), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 5, padding=2))
        self.main = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to logits (B, 1, H / 2**n_layers, W / 2**n_layers)."""
        check_channels(input, self.input_nc)
        return self.main(input)


def check_channels(x: Tensor, channels: int) -> None:
    """Raise ValueError unless images (B, C, H, W) have the channels that a discriminator takes."""
    if x.shape[1] != channels:
        raise ValueError(
            f"the discriminator takes {channels} channels, got {x.shape[1]}: set disc_in_channels in "
            "lossconfig"
        )
