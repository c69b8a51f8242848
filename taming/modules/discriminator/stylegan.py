"""The residual discriminator of StyleGAN2: one logit per image.

Source: Karras et al. 2020, "Analyzing and improving the image quality of StyleGAN", section 4.1; for
tokenizers Yu et al. 2022, "Vector-quantized image modeling with improved VQGAN".
B batch, C channels, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.discriminator.blur import BlurPool, check_channels
from taming.parameters import NonNegativeInt, PositiveInt

GRID = 4  # positions on a side before the last layers


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut, of which both end with a blur and half the height and width."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_in, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.down = BlurPool()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H/2, W/2)."""
        y = F.leaky_relu(self.conv1(x), 0.2)
        y = F.leaky_relu(self.down(self.conv2(y)), 0.2)
        return (y + self.shortcut(self.down(x))) / math.sqrt(2.0)


class StyleGANDiscriminator(nn.Module):
    """Residual blocks down to 4x4 positions, the deviation within a few images, and two linear layers.

    Weights begin as He et al. 2015 do, without StyleGAN's equalized learning rate, since a tokenizer and its
    discriminator share one. Maps that are not 4x4 in the end are averaged to that, so any size is possible.

    Args:
        input_nc: image channels C.
        ndf: features of the first layer; they double with each block, to 8 * ndf at most.
        n_layers: number of blocks; log2(H / 4) reaches 4x4 positions exactly.
        deviation_group: images whose deviation is a feature of each of them (Karras et al. 2018, "Progressive
            growing of GANs", section 3), or as many as divide the batch; 0 leaves it out, and no logit
            depends on other images.
    """

    def __init__(
        self, input_nc: PositiveInt = 3, ndf: PositiveInt = 64, n_layers: PositiveInt = 5,
        deviation_group: NonNegativeInt = 4,
    ):
        super().__init__()
        self.input_nc, self.deviation_group = input_nc, deviation_group
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        self.from_rgb = nn.Conv2d(input_nc, ndf, 1)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.conv = nn.Conv2d(widths[-1] + (deviation_group > 0), widths[-1], 3, padding=1)
        self.linear = nn.Linear(widths[-1] * GRID * GRID, widths[-1])
        self.logit = nn.Linear(widths[-1], 1)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight, a=0.2)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to logits (B, 1)."""
        check_channels(input, self.input_nc)
        x = self.blocks(F.leaky_relu(self.from_rgb(input), 0.2))  # (B, C', h, w)
        if self.deviation_group:
            x = torch.cat((x, self._deviation(x)), dim=1)  # (B, C' + 1, h, w)
        x = F.leaky_relu(self.conv(x), 0.2)
        if x.shape[2:] != (GRID, GRID):
            x = F.adaptive_avg_pool2d(x, GRID)
        return self.logit(F.leaky_relu(self.linear(x.flatten(1)), 0.2))

    def _deviation(self, x: Tensor) -> Tensor:
        """Return the mean deviation of features within groups of images: (B, 1, h, w)."""
        batch, _, height, width = x.shape
        size = math.gcd(batch, self.deviation_group)
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = precise.view(size, batch // size, *x.shape[1:])  # image i is in group i mod (B / size)
        deviation = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (B / size,)
        return deviation.repeat(size).to(x.dtype)[:, None, None, None].expand(-1, 1, height, width)
