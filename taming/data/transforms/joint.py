"""One geometry for a picture and all that belongs to it: resized, cropped and mirrored alike.

A JointTransform draws a JointParams for each picture; the JointParams moves the picture, its mask, its depth
map, its boxes and its joints. H W pixels of the picture as stored, h w pixels of the whole picture after
resizing, N boxes, K joints. Coordinates are continuous: x = 0 is the left edge of the first pixel, x = W
the right edge of the last.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from taming.data.files.errors import BadSample

logger = logging.getLogger(__name__)

Size = int | Sequence[int] | None  # pixels: a side, or [height, width]
Box = tuple[float, float, float, float]  # left, top, right, bottom

# What a picture may be enlarged to: where Pillow suspects an attack on the memory as well, 256 MiB of RGB.
_MOST_PIXELS = 2**28 // 3
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "area", "lanczos")
_TORCH = {  # several times as fast as Pillow, and within one level of it
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
_PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class JointParams:
    """Where the crop lies in one resized picture, and whether the whole picture was mirrored before.

    `source` is the (H, W) that masks, depth maps and coordinates count in; `resized` is (h, w); `corner` is
    (top, left) and `shape` (height, width) of the crop, in pixels of the resized, mirrored picture.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    shape: tuple[int, int]
    mirrored: bool = False
    interpolation: str = "bicubic"

    def image(self, pixels: np.ndarray, box: Box | None = None) -> np.ndarray:
        """Resize, mirror and crop the whole picture, uint8 (any height, any width, C); antialiased.

        `box` is what of `pixels` is the picture, if they have a fringe.
        """
        if box is not None or self.interpolation not in _TORCH:
            method = _PILLOW[self.interpolation]
            size = self.resized[::-1]
            return self._cut(np.asarray(Image.fromarray(pixels).resize(size, method, box)))
        return self._cut(self._resize(pixels, self.interpolation))

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Resize by nearest neighbour, mirror and crop ids (H, W) or colours (H, W, C): uint8, int32."""
        return self._cut(self._resize(ids, "nearest"))

    def plane(self, values: np.ndarray) -> np.ndarray:
        """Resize bilinearly, mirror and crop floats (H, W) or (H, W, C), such as depth; antialiased."""
        return self._cut(self._resize(values, "bilinear"))

    def points(self, points: np.ndarray, swap: Sequence[int] | None = None) -> np.ndarray:
        """Move joints (K, 3), rows of x, y in pixels and visibility, which becomes 0 outside of the crop.

        `swap[k]` is the joint that takes k's place in a mirrored picture: the left elbow becomes a right one.
        """
        points = np.array(points, dtype=np.float32)
        points[:, :2] = self._move(points[:, :2])
        if self.mirrored and swap is not None:
            points = points[list(swap)]
        height, width = self.shape
        inside = (points[:, :2] >= 0).all(1) & (points[:, 0] <= width) & (points[:, 1] <= height)
        points[~inside, 2] = 0
        return points

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Move boxes (N, 4), rows of left, top, width, height in pixels, and clip them to the crop.

        A box outside of the crop comes back with a width or height of 0.
        """
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        first, second = self._move(boxes[:, :2]), self._move(boxes[:, :2] + boxes[:, 2:])
        limit = np.array(self.shape[::-1], dtype=np.float32)
        low = np.minimum(first, second).clip(0, limit)
        high = np.maximum(first, second).clip(0, limit)
        return np.concatenate([low, high - low], axis=1)

    def coord(self) -> np.ndarray:
        """Return (height, width, 1) float32 in [0, 1): each pixel's place in the whole resized picture.

        The place is i / (h * w), counted row by row. It is not mirrored: where a pixel stands counts, not
        where it came from.
        """
        (h, w), (top, left), (height, width) = self.resized, self.corner, self.shape
        rows = np.arange(top, top + height)[:, None, None]
        columns = np.arange(left, left + width)[None, :, None]
        return ((rows * w + columns) / (h * w)).astype(np.float32)

    def _resize(self, values: np.ndarray, interpolation: str) -> np.ndarray:
        """Resize (any height, any width, ...) to (h, w, ...); the same array if nothing changes."""
        if values.shape[:2] == self.resized:
            return values
        if values.ndim == 2:
            return self._resize(values[..., None], interpolation)[..., 0]
        values = values if values.flags.writeable else values.copy()  # torch warns of what Pillow gives
        plane = torch.from_numpy(values).permute(2, 0, 1)
        plane = resize(plane, list(self.resized), _TORCH[interpolation], antialias=interpolation != "nearest")
        return plane.permute(1, 2, 0).numpy().astype(values.dtype, copy=False)

    def _cut(self, values: np.ndarray) -> np.ndarray:
        """Mirror and crop (h, w, ...)."""
        (top, left), (height, width) = self.corner, self.shape
        if self.mirrored:
            left = self.resized[1] - width - left
        part = values[top:top + height, left:left + width]
        return np.ascontiguousarray(part[:, ::-1] if self.mirrored else part)

    def _move(self, points: np.ndarray) -> np.ndarray:
        """Map x, y (N, 2) of the stored picture to the crop."""
        (height, width), (h, w) = self.source, self.resized
        moved = points * np.array([w / width, h / height], dtype=np.float32)
        if self.mirrored:
            moved[:, 0] = w - moved[:, 0]
        return moved - np.array(self.corner[::-1], dtype=np.float32)


class JointTransform:
    """Smallest-side resize, then a crop in the centre or anywhere, with flips if asked for.

    An integer `size` resizes the smallest side to it and crops a square; `[height, width]` covers and crops
    that rectangle; None, 0 and less leave pictures as they are. Smaller pictures are enlarged, with one
    warning. `crop_size` cuts less than `size`, or, without `size`, out of the picture at its own resolution.
    Crops and flips draw from torch's global generator.

    Args:
        size: pixels, see above.
        crop_size: pixels, see above; `size` by default.
        random_crop: crop anywhere, else in the centre.
        flip: mirror every second picture, drawn at random (the whole picture, before the crop).
        interpolation: for pictures: nearest, bilinear, bicubic, area or lanczos; antialiased but the first.
        enlarge: resize pictures smaller than a `crop_size` without `size`; otherwise they are bad samples.
        whole: resize only, crop nothing.

    Raises:
        ValueError: a crop that is larger than `size`, or an unknown interpolation.
    """

    def __init__(
        self,
        size: Size = None,
        crop_size: Size = None,
        random_crop: bool = False,
        *,
        flip: bool = False,
        interpolation: str = "bicubic",
        enlarge: bool = False,
        whole: bool = False,
    ) -> None:
        self.size = check_size("size", size)
        self.crop_size = _check_crop(check_size("crop_size", crop_size), self.size)
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {interpolation!r}; choose one of {', '.join(INTERPOLATIONS)}")
        self.random_crop = random_crop
        self.flip = flip
        self.interpolation = interpolation
        self.enlarge = enlarge
        self.whole = whole
        self._warned_of_enlarging = False

    def get_params(self, height: int, width: int, name: str | os.PathLike = "a picture") -> JointParams:
        """Draw the params of a picture of that many pixels; `name` stands in messages.

        Raises:
            BadSample: the picture has no pixels, is smaller than the crop, or would become huge (such as one
                of 1x4000 pixels at a size of 256).
        """
        h, w = self._resized(name, height, width)
        shape = (self.crop_size if not self.whole else None) or (h, w)
        mirrored = self.flip and torch.rand(()).item() < 0.5
        corner = self._corner(h - shape[0], w - shape[1])
        return JointParams((height, width), (h, w), corner, shape, mirrored, self.interpolation)

    def _resized(self, name: str | os.PathLike, height: int, width: int) -> tuple[int, int]:
        """Return height and width after resizing, and check that they are of use and that the crop fits."""
        if height < 1 or width < 1:
            raise BadSample(f"{os.fspath(name)} has no pixels, {height}x{width} (height x width): remove it")
        cover = self.size
        if cover is None:
            if not self.crop_size or (height >= self.crop_size[0] and width >= self.crop_size[1]):
                return height, width
            if not self.enlarge:
                raise BadSample(
                    f"{os.fspath(name)} is {height}x{width} pixels (height x width), smaller than crop_size "
                    f"{self.crop_size[0]}x{self.crop_size[1]}: give size as well, to enlarge such pictures, "
                    "or choose a smaller crop_size, or remove the file"
                )
            cover = self.crop_size
        scale = max(cover[0] / height, cover[1] / width)
        resized = max(cover[0], round(height * scale)), max(cover[1], round(width * scale))
        if scale > 1 and resized[0] * resized[1] > _MOST_PIXELS:
            raise BadSample(
                f"{os.fspath(name)} is {height}x{width} pixels (height x width), and to cover "
                f"{cover[0]}x{cover[1]} it would become {resized[0]}x{resized[1]}, more than "
                f"{_MOST_PIXELS // 10**6} million pixels: crop or remove it, or choose a smaller size"
            )
        if scale > 1 and not self._warned_of_enlarging:
            self._warned_of_enlarging = True
            logger.warning(
                "%s is %dx%d pixels (height x width), smaller than %dx%d; such pictures are enlarged and "
                "look soft (said once)", os.fspath(name), height, width, *cover,
            )
        return resized

    def _corner(self, free_rows: int, free_columns: int) -> tuple[int, int]:
        if not self.random_crop:
            return free_rows // 2, free_columns // 2
        return tuple(torch.randint(free + 1, ()).item() for free in (free_rows, free_columns))


def check_size(name: str, size: Size) -> tuple[int, int] | None:
    """Return (height, width) in pixels, or None for None, 0 and less (as in 2021).

    Raises:
        ValueError: neither a whole number nor two positive ones; `name` stands in the message.
    """
    if size is None or (isinstance(size, int) and size <= 0):
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name} must be a positive number of pixels or [height, width], got {size!r}")
    return sides


def _check_crop(crop: tuple[int, int] | None, size: tuple[int, int] | None) -> tuple[int, int] | None:
    if crop and size and (crop[0] > size[0] or crop[1] > size[1]):
        raise ValueError(
            f"crop_size {crop[0]}x{crop[1]} (height x width) is larger than size {size[0]}x{size[1]}, to "
            f"which pictures are resized first: raise size to at least {max(crop)}, or lower crop_size"
        )
    return crop or size
