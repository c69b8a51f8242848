"""The contract of a first stage: images to codes and back.

B batch, C channels, H W pixels, h w latent grid.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width
Codes = Any  # codes of one grid (B, h, w), or a list of them with an entry per level
Grid = Any  # a Size in codes, or a list of them


class SizeMismatch(ValueError):
    """Training images have another size than the model is made for.

    Args:
        found: (H, W) in pixels of the images.
        wanted: (H, W) of the model.
    """

    def __init__(self, found: tuple[int, int], wanted: tuple[int, int]):
        self.found, self.wanted = found, wanted
        here, there = (f"{height}x{width}" for height, width in (found, wanted))
        super().__init__(
            f"images of {here} pixels (height x width), but the model is made for {there}"
        )


class ImageSizes:
    """The sizes of images that a model takes: any multiples of a factor, and in training one of them.

    Attributes:
        resolution: training size in pixels, a side or (height, width).
        factor: what both sides are multiples of, in pixels.
        size_settings: the parameters of the model that are its training size.
    """

    resolution: int | Sequence[int]
    factor: int
    size_settings: tuple[str, ...] = ("ddconfig.resolution",)

    @property
    def image_size(self) -> Size:
        """Training size, (H, W) in pixels."""
        side = self.resolution
        return (side, side) if isinstance(side, int) else (side[0], side[1])

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, with a size that works, unless both sides are multiples of `factor`."""
        f = self.factor
        if height % f or width % f:
            crop = f"{max(f, height // f * f)}x{max(f, width // f * f)}"
            raise ValueError(
                f"images of {height}x{width} pixels are not a multiple of f = {f}: crop to {crop}"
            )

    def check_training_size(self, height: int, width: int) -> None:
        """Raise SizeMismatch unless images have the size that the model is made for."""
        self.check_size(height, width)
        if (height, width) != self.image_size:
            raise SizeMismatch((height, width), self.image_size)


class Tokenizer(ImageSizes):
    """Turns images into a small grid of codebook indices and back.

    The code cache, the priors, the evaluation and the page know no more of a first stage than this.

    A tokenizer of several levels has a grid for each, the coarsest first, and a list of grids wherever one of
    a single level has one: `encode_codes`, `decode_codes`, `codes_to_latents` and `code_shape`. All levels
    have codebooks of the same size.

    Attributes:
        levels: number of grids.
        factor: pixels per code along each side: on the coarsest grid, or on the finest where one quantizer
            makes several grids from one of latents (`Quantizer.num_levels`).
        pixel_range: lowest and highest value of a pixel inside the network. Images are in [-1, 1] in any
            case; a network that was trained on another range converts them.
        spatial: whether a code describes the place of the image that it has in its grid. If not, no window
            slides over codes, and no part of an image can be kept.
    """

    levels: int = 1
    spatial: bool = True
    pixel_range: tuple[float, float] = (-1.0, 1.0)

    @property
    def codebook_size(self) -> int:
        """Number of different codes, of each level."""
        raise NotImplementedError

    def encode_codes(self, x: Tensor) -> Codes:
        """Turn images (B, C, H, W) in [-1, 1] into codes (B, h, w), int64, or a list of them.

        Raises:
            ValueError: a side that is not a multiple of `factor`, or another number of channels.
        """
        raise NotImplementedError

    def decode_codes(self, codes: Codes) -> Tensor:
        """Turn codes (B, h, w), or a list of them, into images (B, C, H, W), about in [-1, 1]."""
        raise NotImplementedError

    def codes_to_latents(self, codes: Codes) -> Codes:
        """Return the quantized latents (B, C', h, w) that codes (B, h, w) stand for, or a list of them."""
        raise NotImplementedError

    def code_shape(self, height: int, width: int) -> Grid:
        """Return the grid (h, w) of an image of `height` x `width` pixels, or a list of grids.

        Raises:
            ValueError: a side that is not a multiple of `factor`.
        """
        self.check_size(height, width)
        return height // self.factor, width // self.factor

    def num_codes(self, height: int, width: int) -> int:
        """Return the number of codes of an image of that size, on all grids together."""
        return sum(math.prod(grid) for grid in as_list(self.code_shape(height, width)))


def as_list(value: Any) -> list[Any]:
    """Return codes or grids as a list with an entry per level, whether there are several levels or one."""
    return value if isinstance(value, list) else [value]


def flatten_codes(codes: Codes) -> Tensor:
    """Join the codes of all grids to (B, N), the coarsest grid first, each in raster order."""
    return torch.cat([grid.flatten(1) for grid in as_list(codes)], dim=1)


def unflatten_codes(codes: Tensor, grids: Grid) -> Codes:
    """Turn codes (B, N) back into (B, h, w), or a list of these, by the `code_shape` of their image."""
    parts = codes.split([math.prod(grid) for grid in as_list(grids)], dim=1)
    shaped = [part.reshape(-1, *grid) for part, grid in zip(parts, as_list(grids), strict=True)]
    return shaped if isinstance(grids, list) else shaped[0]
