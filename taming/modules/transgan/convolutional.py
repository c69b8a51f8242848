"""A convolutional generator and discriminator, to compare TransGAN's transformers with.

Residual networks as Gulrajani et al. 2017 have them, "Improved training of Wasserstein GANs", appendix F, but
with half the channels at twice the resolution. There are no batch statistics, so that the gradient penalty is
that of single images. B batch, H W pixels, C channels, h w of a block.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Resolution
from taming.parameters import PositiveInt

GROUPS = 8  # of the generator's normalization


class ConvGenerator(nn.Module):
    """Generates images (B, 3, H, W), about in [-1, 1], of latents (B, latent_dim), with upsampling blocks.

    Args:
        resolution: size of the images, a side or (height, width), in pixels.
        channels: C of the first grid; half of them after each block.
        latent_dim: size of z.
        num_up: blocks, each of which doubles the resolution.

    Raises:
        ValueError: a size that is not a multiple of 2 ** num_up, or channels not of 8 * 2 ** num_up.
    """

    entry_stage = None  # images of low resolution do not enter
    from_rgb = None

    def __init__(
        self, resolution: Resolution, channels: PositiveInt, latent_dim: PositiveInt, num_up: PositiveInt = 3
    ):
        super().__init__()
        height, width = _sides(resolution, 2**num_up)
        if channels % (GROUPS * 2**num_up):
            raise ValueError(f"channels: {channels} is not a multiple of {GROUPS * 2**num_up}")
        self.resolution, self.image_size, self.latent_dim = resolution, (height, width), latent_dim
        self.grid = height >> num_up, width >> num_up
        self.first = nn.Linear(latent_dim, channels * self.grid[0] * self.grid[1])
        self.blocks = nn.Sequential(*(UpBlock(channels >> k) for k in range(num_up)))
        self.last = nn.Sequential(
            nn.GroupNorm(GROUPS, channels >> num_up), nn.ReLU(),
            nn.Conv2d(channels >> num_up, 3, 3, padding=1),
        )

    def forward(self, z: Tensor, radius: int | None = None) -> Tensor:
        """Generate images (B, 3, H, W) of latents (B, d); there is no attention that a radius could bound."""
        return self.last(self.blocks(self.first(z).unflatten(1, (-1, *self.grid))))


class UpBlock(nn.Module):
    """Doubles the resolution and halves the channels: two convolutions, beside a 1x1 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, channels // 2)
        self.conv1 = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(channels // 2, channels // 2, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, h, w) to (B, C / 2, 2 h, 2 w)."""
        y = self.conv1(F.interpolate(F.relu(self.norm1(x)), scale_factor=2.0))
        return F.interpolate(self.skip(x), scale_factor=2.0) + self.conv2(F.relu(self.norm2(y)))


class ConvDiscriminator(nn.Module):
    """Maps images (B, 3, H, W) to logits (B, 1), with blocks that halve the resolution.

    Args:
        resolution: size of the images, a side or (height, width), in pixels.
        channels: C at the full resolution; twice as many after each block.
        num_down: blocks.

    Raises:
        ValueError: a size that is not a multiple of 2 ** num_down.
    """

    fused_attention = False  # there is none: it can be differentiated twice

    def __init__(self, resolution: Resolution, channels: PositiveInt, num_down: PositiveInt = 3):
        super().__init__()
        self.image_size = _sides(resolution, 2**num_down)
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(DownBlock(channels << k) for k in range(num_down)))
        self.head = nn.Linear(channels << num_down, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Judge images (B, 3, H, W)."""
        return self.head(F.relu(self.blocks(self.first(x))).mean((2, 3)))


class DownBlock(nn.Module):
    """Halves the resolution and doubles the channels: two convolutions, beside a 1x1 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, h, w) to (B, 2 C, h / 2, w / 2)."""
        y = self.conv2(F.relu(self.conv1(F.relu(x))))
        return F.avg_pool2d(y, 2) + self.skip(F.avg_pool2d(x, 2))


def _sides(resolution: Resolution, factor: int) -> tuple[int, int]:
    """Return (H, W); raise ValueError unless both are multiples of a factor."""
    sides: Sequence[int] = [resolution] * 2 if isinstance(resolution, int) else resolution
    height, width = sides
    if height % factor or width % factor:
        raise ValueError(f"images of {height}x{width} pixels are not a multiple of {factor}")
    return height, width
