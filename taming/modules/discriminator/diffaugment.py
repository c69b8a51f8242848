"""Differentiable augmentation of what a discriminator sees, of real and generated images alike.

Source: Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", arXiv 2006.10738.
B batch, C channels, H W pixels. Each transform takes its random numbers as arguments; `DiffAugment` samples
them, one for each image.
"""

import torch
from torch import Tensor, nn

from taming.parameters import NonNegativeFloat, Probability


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """Add `u` (B,) to images (B, C, H, W)."""
    return x + _per_image(u)


def saturation(x: Tensor, u: Tensor) -> Tensor:
    """Multiply the distance of each pixel's channels from their mean by `u` (B,)."""
    mean = x.mean(1, keepdim=True)
    return (x - mean) * _per_image(u) + mean


def contrast(x: Tensor, u: Tensor) -> Tensor:
    """Multiply the distance of each pixel from the image's mean by `u` (B,)."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * _per_image(u) + mean


def translate(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Move images (B, C, H, W) up by `rows` and left by `columns`, (B,) each; zeros come in."""
    _, _, height, width = x.shape
    r = torch.arange(height, device=x.device) + rows[:, None]  #      (B, H), where a row comes from
    c = torch.arange(width, device=x.device) + columns[:, None]  #  (B, W)
    inside = ((r >= 0) & (r < height))[:, None, :, None] & ((c >= 0) & (c < width))[:, None, None, :]
    r, c = r.clamp(0, height - 1)[:, None, :, None], c.clamp(0, width - 1)[:, None, None, :]
    moved = x.gather(2, r.expand(x.shape)).gather(3, c.expand(x.shape))
    return torch.where(inside, moved, 0.0)


def cutout(x: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Set a rectangle of `size` (height, width) around (rows, columns), (B,) each, to zero."""
    _, _, height, width = x.shape
    r = torch.arange(height, device=x.device) - (rows - size[0] // 2)[:, None]  #   (B, H), row of the hole
    c = torch.arange(width, device=x.device) - (columns - size[1] // 2)[:, None]  # (B, W)
    hole = ((r >= 0) & (r < size[0]))[:, None, :, None] & ((c >= 0) & (c < size[1]))[:, None, None, :]
    return x.masked_fill(hole, 0.0)


class DiffAugment(nn.Module):
    """Random transforms of images (B, C, H, W) in [-1, 1], through which gradients pass.

    The defaults are those of the paper. TransGAN has translation_ratio=0.2, cutout_p=0.3 and
    cutout_per_batch=True.

    Args:
        policy: what to do, in this order: "color", "translation" and "cutout", joined by commas.
        color_strength: factor on the ranges of brightness (-0.5 to 0.5), saturation (0 to 2) and contrast
            (0.5 to 1.5); 0 leaves colours alone.
        translation_ratio: largest shift, as a share of each side.
        cutout_ratio: side of the hole, as a share of each side.
        cutout_p: probability of a hole.
        cutout_per_batch: all images of a batch have a hole, or none.

    Raises:
        ValueError: an unknown name in `policy`.
    """

    def __init__(
        self, policy: str = "color,translation,cutout", *, color_strength: NonNegativeFloat = 1.0,
        translation_ratio: Probability = 0.125, cutout_ratio: Probability = 0.5, cutout_p: Probability = 1.0,
        cutout_per_batch: bool = False,
    ):
        super().__init__()
        self.policy = [name.strip() for name in policy.split(",")]
        if unknown := [name for name in self.policy if name not in ("color", "translation", "cutout")]:
            raise ValueError(
                f"policy: {policy!r} names {unknown[0]!r}; it must be a list, separated by commas, of color, "
                "translation and cutout"
            )
        self.color_strength, self.translation_ratio = color_strength, translation_ratio
        self.cutout_ratio, self.cutout_p, self.cutout_per_batch = cutout_ratio, cutout_p, cutout_per_batch

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Transform images (B, C, H, W); a generator in the same state gives the same transforms."""
        for name in self.policy:
            x = getattr(self, f"_{name}")(x, generator)
        return x

    def _color(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        s = self.color_strength
        u = torch.rand(3, len(x), generator=generator, device=_device(x, generator)).to(x)
        x = brightness(x, s * (u[0] - 0.5))
        x = saturation(x, 1.0 + s * (2.0 * u[1] - 1.0))
        return contrast(x, 1.0 + s * (u[2] - 0.5))

    def _translation(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        most = [int(side * self.translation_ratio + 0.5) for side in x.shape[2:]]
        return translate(x, *(_integers(-m, m, x, generator) for m in most))

    def _cutout(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        height, width = (int(side * self.cutout_ratio + 0.5) for side in x.shape[2:])
        rows = _integers(0, x.shape[2] - height % 2, x, generator)
        columns = _integers(0, x.shape[3] - width % 2, x, generator)
        coins = 1 if self.cutout_per_batch else len(x)
        u = torch.rand(coins, generator=generator, device=_device(x, generator)).to(x.device)
        holes = cutout(x, rows, columns, (height, width))
        return torch.where(_per_image(u < self.cutout_p), holes, x)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _device(x: Tensor, generator: torch.Generator | None) -> torch.device:
    return generator.device if generator else x.device


def _integers(least: int, most: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample an integer from `least` to `most` for each image, (B,)."""
    device = _device(x, generator)
    return torch.randint(least, most + 1, (len(x),), generator=generator, device=device).to(x.device)
