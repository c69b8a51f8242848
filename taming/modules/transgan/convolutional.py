"""A convolutional generator and discriminator, to compare TransGAN's transformers with.

Residual networks as Gulrajani et al. 2017 have them, "Improved training of Wasserstein GANs", appendix F: no
batch statistics, so that the gradient penalty is that of single images. B batch, H W pixels, C channels.
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
        channels: C, the same at every resolution; a multiple of 8.
        latent_dim: size of z.
        num_up: doublings of the resolution.

    Raises:
        ValueError: a size that is no multiple of 2 ** num_up, or channels that are none of 8.
    """

    entry_stage = None  # images of low resolution do not enter
    from_rgb = None

    def __init__(
        self, resolution: Resolution, channels: PositiveInt, latent_dim: PositiveInt, num_up: PositiveInt = 3
    ):
        super().__init__()
        height, width = _sides(resolution, 2**num_up)
        if channels % GROUPS:
            raise ValueError(f"channels: {channels} is no multiple of {GROUPS}")
        self.resolution, self.image_size, self.latent_dim = resolution, (height, width), latent_dim
        self.grid = height >> num_up, width >> num_up
        self.first = nn.Linear(latent_dim, channels * self.grid[0] * self.grid[1])
        self.blocks = nn.Sequential(*(UpBlock(channels) for _ in range(num_up)))
        self.last = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.ReLU(), nn.Conv2d(channels, 3, 3, padding=1)
        )

    def forward(self, z: Tensor, radius: int | None = None) -> Tensor:
        """Generate images (B, 3, H, W) of latents (B, d); there is no attention that a radius could bound."""
        return self.last(self.blocks(self.first(z).unflatten(1, (-1, *self.grid))))


class UpBlock(nn.Module):
    """Doubles the resolution: x enlarged, plus two convolutions of it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, h, w) to (B, C, 2 h, 2 w)."""
        y = F.interpolate(F.relu(self.norms[0](x)), scale_factor=2.0)
        y = self.convs[1](F.relu(self.norms[1](self.convs[0](y))))
        return F.interpolate(x, scale_factor=2.0) + y


class ConvDiscriminator(nn.Module):
    """Maps images (B, 3, H, W) to logits (B, 1), with blocks that halve the resolution.

    Args:
        resolution: size of the images, a side or (height, width), in pixels.
        channels: C, the same at every resolution.
        num_down: halvings.

    Raises:
        ValueError: a size that is no multiple of 2 ** num_down.
    """

    fused_attention = False  # there is none: it can be differentiated twice

    def __init__(self, resolution: Resolution, channels: PositiveInt, num_down: PositiveInt = 3):
        super().__init__()
        self.image_size = _sides(resolution, 2**num_down)
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
            for _ in range(num_down)
        )
        self.head = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Judge images (B, 3, H, W)."""
        x = self.first(x)  # (B, C, H, W)
        for first, second in self.blocks:  # type: ignore[misc]  # two of each
            y = second(F.relu(first(F.relu(x))))
            x = F.avg_pool2d(x + y, 2)
        return self.head(F.relu(x).mean((2, 3)))


def _sides(resolution: Resolution, factor: int) -> tuple[int, int]:
    """Return (H, W); raise ValueError unless both are multiples of a factor."""
    sides: Sequence[int] = [resolution] * 2 if isinstance(resolution, int) else resolution
    height, width = sides
    if height % factor or width % factor:
        raise ValueError(f"images of {height}x{width} pixels are no multiple of {factor}")
    return height, width
