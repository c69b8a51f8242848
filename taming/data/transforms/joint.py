"""Resize, crop and mirror an image together with its mask, depth map and keypoints.

`JointTransform.get_params` samples the JointParams of one image, which transform whatever belongs to it.
H W pixels of the image as stored, h w pixels of the whole image after resizing, K keypoints.
Coordinates are continuous: x = 0 is the left edge of the first pixel, x = W the right edge of the last.
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

_MOST_PIXELS = 2**28 // 3  # of an enlarged image, 256 MiB of RGB: Pillow's limit against decompression bombs
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
    """The parameters of a JointTransform for one image, and the transform itself.

    `source` is the (H, W) of the stored image, masks, depth maps and coordinates; `resized` is (h, w);
    `mirrored` says whether the whole resized image is mirrored before the crop; `corner` is (top, left) and
    `shape` (height, width) of the crop, in pixels of the resized, mirrored image.
    """

    source: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    shape: tuple[int, int]
    mirrored: bool = False
    interpolation: str = "bicubic"

    def image(self, pixels: np.ndarray, box: Box | None = None) -> np.ndarray:
        """Resize, mirror and crop the whole image, uint8 (any height, any width, C), with antialiasing.

        `box` is the part of `pixels` that holds the image, if there are pixels beyond it.
        """
        if box is not None or self.interpolation not in _TORCH:
            method = _PILLOW[self.interpolation]
            size = self.resized[::-1]
            return self._cut(np.asarray(Image.fromarray(pixels).resize(size, method, box)))
        return self._cut(self._resize(pixels, self.interpolation))

    def mask(self, ids: np.ndarray) -> np.ndarray:
        """Resize by nearest neighbour, mirror and crop ids (H, W) or colors (H, W, C): uint8, int32."""
        return self._cut(self._resize(ids, "nearest"))

    def plane(self, values: np.ndarray) -> np.ndarray:
        """Resize bilinearly, mirror and crop floats (H, W) or (H, W, C), such as depth, with antialiasing."""
        return self._cut(self._resize(values, "bilinear"))

    def points(self, points: np.ndarray, swap: Sequence[int] | None = None) -> np.ndarray:
        """Transform keypoints (K, 3): x, y in pixels, and visibility, which becomes 0 outside the crop.

        `swap[k]` is the keypoint that becomes number k in a mirrored image: a left elbow becomes a right one.
        """
        points = np.array(points, dtype=np.float32)
        points[:, :2] = self._move(points[:, :2])
        if self.mirrored and swap is not None:
            points = points[list(swap)]
        height, width = self.shape
        inside = (points[:, :2] >= 0).all(1) & (points[:, 0] <= width) & (points[:, 1] <= height)
        points[~inside, 2] = 0
        return points

    def coord(self) -> np.ndarray:
        """Return (height, width, 1) float32 in [0, 1): the position of each pixel in the whole resized image.

        The position is i / (h * w), counted row by row in the mirrored image, as if it were not mirrored.
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
        values = values if values.flags.writeable else values.copy()  # torch warns of read-only arrays
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
        """Map x, y (N, 2) of the stored image to the crop."""
        (height, width), (h, w) = self.source, self.resized
        moved = points * np.array([w / width, h / height], dtype=np.float32)
        if self.mirrored:
            moved[:, 0] = w - moved[:, 0]
        return moved - np.array(self.corner[::-1], dtype=np.float32)


class JointTransform:
    """Resize the smallest side, then crop in the centre or at random, and mirror at random if asked for.

    An integer `size` resizes the smallest side to it and crops a square; `[height, width]` resizes to cover
    that rectangle and crops it; None, 0 and negative numbers keep images as they are. Smaller images are
    enlarged, with one warning. `crop_size` crops less than `size`, or, without `size`, from the image at its
    own resolution. Crops and flips use torch's global generator.

    Args:
        size: pixels, see above.
        crop_size: pixels, see above; `size` by default.
        random_crop: crop at a random position instead of the centre.
        flip: mirror images at random, half of them (the whole image, before the crop).
        interpolation: for images: nearest, bilinear, bicubic, area or lanczos; all but nearest antialias.
        enlarge: resize images smaller than a `crop_size` without `size`; otherwise they are bad samples.
        whole: resize only, do not crop.

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
        self.random_crop, self.flip, self.interpolation = random_crop, flip, interpolation
        self.enlarge, self.whole = enlarge, whole
        self._warned_of_enlarging = False

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Transform "image" and other arrays of its size alike; uint8 (H, W, C) as images, floats as planes.

        The call of 2021: `preprocessor(image=pixels, depth=depth)["depth"]`.

        Raises:
            BadSample: as get_params, or an array has another size than the image.
        """
        if self.size is None and self.crop_size is None:
            return arrays
        first = next(iter(arrays.values()))
        sizes = {name: array.shape[:2] for name, array in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise BadSample(f"all arrays must have one height and width, got {sizes}")
        height, width = first.shape[:2]
        params = self.get_params(height, width)
        return {
            name: params.image(array) if array.dtype == np.uint8 else params.plane(array)
            for name, array in arrays.items()
        }

    def get_params(self, height: int, width: int, name: str | os.PathLike = "an image") -> JointParams:
        """Sample the parameters for an image of that many pixels; `name` stands in messages.

        Raises:
            BadSample: the image has no pixels, is smaller than the crop, or would become huge (such as one of
                1x4000 pixels at a size of 256).
        """
        h, w = self._resized(name, height, width)
        shape = (self.crop_size if not self.whole else None) or (h, w)
        mirrored = self.flip and torch.rand(()).item() < 0.5
        corner = self._corner(h - shape[0], w - shape[1])
        return JointParams((height, width), (h, w), corner, shape, mirrored, self.interpolation)

    def _resized(self, name: str | os.PathLike, height: int, width: int) -> tuple[int, int]:
        """Return height and width after resizing; check that they are usable and that the crop fits."""
        if height < 1 or width < 1:
            raise BadSample(f"{os.fspath(name)} has no pixels, {height}x{width} (height x width): remove it")
        cover = self.size
        if cover is None:
            if not self.crop_size or (height >= self.crop_size[0] and width >= self.crop_size[1]):
                return height, width
            if not self.enlarge:
                raise BadSample(
                    f"{os.fspath(name)} is {height}x{width} pixels (height x width), smaller than crop_size "
                    f"{self.crop_size[0]}x{self.crop_size[1]}: give size as well, to enlarge such images, "
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
                "%s is %dx%d pixels (height x width), smaller than %dx%d; such images are enlarged and "
                "look soft (said once)", os.fspath(name), height, width, *cover,
            )
        return resized

    def _corner(self, free_rows: int, free_columns: int) -> tuple[int, int]:
        if not self.random_crop:
            return free_rows // 2, free_columns // 2
        top, left = (int(torch.randint(free + 1, ())) for free in (free_rows, free_columns))
        return top, left


def check_size(name: str, size: Size) -> tuple[int, int] | None:
    """Return (height, width) in pixels, or None for None, 0 and negative numbers (as in 2021).

    Raises:
        ValueError: not an integer or two positive ones; `name` stands in the message.
    """
    if size is None or (isinstance(size, int) and size <= 0):
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name} must be a positive number of pixels or [height, width], got {size!r}")
    return sides[0], sides[1]


def _check_crop(crop: tuple[int, int] | None, size: tuple[int, int] | None) -> tuple[int, int] | None:
    if crop and size and (crop[0] > size[0] or crop[1] > size[1]):
        raise ValueError(
            f"crop_size {crop[0]}x{crop[1]} (height x width) is larger than size {size[0]}x{size[1]}, to "
            f"which images are resized first: raise size to at least {max(crop)}, or lower crop_size"
        )
    return crop or size
