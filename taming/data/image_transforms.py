"""Crops and flips that say what they did, so that boxes can follow.

C channels, H W pixels. Images are tensors (C, H, W) of any type; a box is (x0, y0, width, height) in shares
of the sides of the image that came in, 0..1. Random numbers are drawn from torch's global generator.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from taming.data.helper_types import BoundingBox


def convert_pil_to_tensor(image: Image.Image) -> Tensor:
    """Turn a Pillow image into a tensor (C, H, W) of its 8-bit pixels, 0..255."""
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _crop(image: Tensor, top: int, left: int, height: int, width: int) -> tuple[BoundingBox, Tensor]:
    rows, columns = image.shape[-2:]
    return (left / columns, top / rows, width / columns, height / rows), F.crop(
        image, top, left, height, width
    )


def _draw(free: int) -> int:
    """Draw an integer in 0..free."""
    return torch.randint(free + 1, ()).item()


class _FixedSizeCrop(nn.Module):
    """Crops rectangles of one size, in pixels: a side of a square, or (height, width)."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def free(self, image: Tensor) -> tuple[int, int]:
        """Return how many pixels the crop may move down and right."""
        height, width = image.shape[-2:]
        if height < self.size[0] or width < self.size[1]:
            raise ValueError(
                f"an image of {height}x{width} pixels (height x width) is smaller than the crop of "
                f"{self.size[0]}x{self.size[1]}: resize it first"
            )
        return height - self.size[0], width - self.size[1]


class CenterCropReturnCoordinates(_FixedSizeCrop):
    """Crops the middle: image -> (box, crop)."""

    def forward(self, img: Tensor) -> tuple[BoundingBox, Tensor]:
        rows, columns = self.free(img)
        return _crop(img, rows // 2, columns // 2, *self.size)


class RandomCrop1dReturnCoordinates(_FixedSizeCrop):
    """Crops anywhere: image -> (box, crop). Where the smaller side fits already, only the other varies."""

    def forward(self, img: Tensor) -> tuple[BoundingBox, Tensor]:
        rows, columns = self.free(img)
        return _crop(img, _draw(rows), _draw(columns), *self.size)


class Random2dCropReturnCoordinates(nn.Module):
    """Crops a square anywhere, of a random side from `min_size` to all that fits: image -> (box, crop).

    Of an image that is smaller than `min_size` pixels, the largest square is taken.
    """

    def __init__(self, min_size: int) -> None:
        super().__init__()
        self.min_size = min_size

    def forward(self, img: Tensor) -> tuple[BoundingBox, Tensor]:
        height, width = img.shape[-2:]
        largest = min(height, width)
        side = min(self.min_size, largest)
        side += _draw(largest - side)
        return _crop(img, _draw(height - side), _draw(width - side), side, side)


class RandomHorizontalFlipReturn(nn.Module):
    """Mirrors with probability p: image -> (whether it did, image)."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, img: Tensor) -> tuple[bool, Tensor]:
        flipped = torch.rand(()).item() < self.p
        return flipped, F.horizontal_flip(img) if flipped else img
