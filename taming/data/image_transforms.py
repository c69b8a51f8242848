"""Crops and flips of 2021 that also return what they did, so that boxes can follow.

C channels, H W pixels. Images are tensors (C, H, W) of any type; a box is (x0, y0, width, height) in
fractions of the sides of the input image, 0..1. Random numbers come from torch's global generator.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from taming.data.helper_types import BoundingBox


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Return the 8-bit pixels of a Pillow image, 0..255, as a tensor (C, H, W)."""
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


convert_pil_to_tensor = pil_to_tensor  # 2021's second name for it


def _crop(image: Tensor, top: int, left: int, height: int, width: int) -> tuple[BoundingBox, Tensor]:
    rows, columns = image.shape[-2:]
    box = (left / columns, top / rows, width / columns, height / rows)
    return box, F.crop(image, top, left, height, width)


def _random_integer(highest: int) -> int:
    """Sample an integer from 0 to `highest`."""
    return int(torch.randint(highest + 1, ()))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class ResizeToCover(nn.Module):
    """Resizes an image, without distortion, to the smallest size that covers `size` (height, width)."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = _pair(size)

    def forward(self, img: Tensor) -> Tensor:
        (height, width), (rows, columns) = self.size, img.shape[-2:]
        by_height = height * columns >= width * rows
        size = [height, height * columns // rows] if by_height else [width * rows // columns, width]
        return F.resize(img, size, InterpolationMode.BICUBIC, antialias=True)


class _FixedSizeCrop(nn.Module):
    """Crops of one size, in pixels: the side of a square, or (height, width)."""

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        self.size = _pair(size)

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
    """Crops the centre: image -> (box, crop)."""

    @staticmethod
    def get_bbox_of_center_crop(width: int, height: int) -> BoundingBox:
        """Return the box of the largest square in the centre of an image of that many pixels."""
        w, h = min(width, height) / width, min(width, height) / height
        return 0.5 - w / 2, 0.5 - h / 2, w, h

    def forward(self, img: Tensor) -> tuple[BoundingBox, Tensor]:
        rows, columns = self.free(img)
        return _crop(img, rows // 2, columns // 2, *self.size)


class RandomCrop1dReturnCoordinates(_FixedSizeCrop):
    """Crops at a random position: image -> (box, crop)."""

    def forward(self, img: Tensor) -> tuple[BoundingBox, Tensor]:
        rows, columns = self.free(img)
        return _crop(img, _random_integer(rows), _random_integer(columns), *self.size)


class Random2dCropReturnCoordinates(nn.Module):
    """Crops at a random position and scale, at least `min_size`: image -> (box, crop).

    The crop has the proportions of `min_size`, a side or (height, width) in pixels. From an image that is
    smaller, the largest such crop is taken.
    """

    def __init__(self, min_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.min_size = _pair(min_size)

    def forward(self, img: Tensor) -> tuple[BoundingBox, Tensor]:
        (rows, columns), (least, least_width) = img.shape[-2:], self.min_size
        largest = max(1, min(rows, columns * least // least_width))
        height = min(least, largest)
        height += _random_integer(largest - height)
        width = min(columns, max(1, round(height * least_width / least)))
        top, left = _random_integer(rows - height), _random_integer(columns - width)
        return _crop(img, top, left, height, width)


class RandomHorizontalFlipReturn(nn.Module):
    """Mirrors with probability p: image -> (whether it was mirrored, image)."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, img: Tensor) -> tuple[bool, Tensor]:
        flipped = torch.rand(()).item() < self.p
        return flipped, F.horizontal_flip(img) if flipped else img
