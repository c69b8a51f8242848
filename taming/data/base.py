"""One image file into RGB pixels, and a list of image files into a data set.

H W pixels of the crop, h w pixels of the whole picture after resizing. Items are dicts of HWC float32 arrays
in [-1, 1].
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from taming.images import from_uint8

logger = logging.getLogger(__name__)

Size = int | Sequence[int] | None  # pixels: a side, or [height, width]


class BadImage(ValueError):
    """A file cannot be read as an image; the message names the file and the reason."""


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read one image file of any mode that Pillow knows as RGB: uint8 (H, W, 3), 0..255, upright.

    EXIF orientation is applied; transparency is composited over white; 16-bit gray is scaled, not clipped, to
    8 bits; of an animation the first frame is read.

    Raises:
        BadImage: missing, truncated, not an image, or of a mode without a defined range (32-bit float).
    """
    return np.asarray(_open_rgb(path))


def _open_rgb(path: str | os.PathLike) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))  # exif_transpose copies, so the file may be closed
    except MemoryError:
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error, IndexError, ...
        message = f"cannot read image {os.fspath(path)}: {type(error).__name__}: {error}"
        raise BadImage(message) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" and its byte orders (PNG, TIFF), "I" (PGM, TIFF)
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"integer pixels from {values.min()} to {values.max()} are not 16-bit gray")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels have no defined range; convert the file to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


class ImagePaths(Dataset):
    """Image files as items {"image": HWC float32 in [-1, 1], "file_path_": str, and one value per label}.

    An integer `size` resizes the smallest side to it and crops a square; `[height, width]` covers and crops
    that rectangle; None leaves pictures as they are. Smaller pictures are enlarged, with one warning.
    `crop_size` cuts less than `size`, or, without `size`, out of the picture at its own resolution, where a
    picture that is too small is an error. Resizing is antialiased bicubic. Crops and flips draw from torch's
    global generator.

    An unreadable file is skipped with a warning: the next readable image, with its own labels, takes its
    place. When more than `max_bad_fraction` of the files, and at least two, turn out unreadable, the data set
    raises. Bad files are counted per copy of the data set, that is per loader process.

    Args:
        paths: image files.
        size: pixels, see above.
        random_crop: crop anywhere, else in the centre.
        labels: lists as long as `paths`, by the key that items hold them under.
        flip: mirror every second picture, drawn at random (the whole picture, before the crop).
        crop_size: pixels, see above; `size` by default.
        coord: add "coord", HW1 float32 in [0, 1): the row-major position i / (h * w) of each pixel in the
            whole resized picture, of which the crop is a part (as FacesHQ did in 2021).
        max_bad_fraction: share of unreadable files that is tolerated.

    Raises:
        ValueError: no paths, labels of another length, or a crop that is larger than `size`.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        size: Size = None,
        random_crop: bool = False,
        labels: Mapping[str, Sequence[Any]] | None = None,
        *,
        flip: bool = False,
        crop_size: Size = None,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.paths = [os.fspath(path) for path in paths]
        if not self.paths:
            raise ValueError("the list of image paths is empty: give at least one image")
        for key, values in (labels or {}).items():
            if len(values) != len(self.paths):
                raise ValueError(
                    f"labels[{key!r}] has {len(values)} values for {len(self.paths)} images: give one each"
                )
        self.labels = {**(labels or {}), "file_path_": self.paths}
        self.size = _check_size("size", size)
        self.crop_size = _check_crop(_check_size("crop_size", crop_size), self.size)
        self.random_crop = random_crop
        self.flip = flip
        self.coord = coord
        self.max_bad_fraction = max_bad_fraction
        self._bad: dict[int, str] = {}  # index -> why it cannot be read
        self._warned_of_enlarging = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        for step in range(len(self)):  # that many are tried only if max_bad_fraction tolerates everything
            candidate = (index + step) % len(self)
            if candidate in self._bad:
                continue
            try:
                item = self.load(self.paths[candidate])
            except BadImage as error:
                self._note_bad(candidate, error)
                continue
            return item | {key: values[candidate] for key, values in self.labels.items()}
        raise AssertionError("unreachable: a data set without any readable image has raised")

    def preprocess_image(self, image_path: str | os.PathLike) -> np.ndarray:
        """Read, resize, crop and flip one file: (H, W, 3) float32 in [-1, 1]."""
        return self.load(image_path)["image"]

    def load(self, path: str | os.PathLike) -> dict[str, np.ndarray]:
        """Read one file into "image" (H, W, 3), float32 in [-1, 1], and "coord" (H, W, 1) if asked for."""
        picture = _open_rgb(path)
        h, w = self._resized(path, *picture.size)
        height, width = self.crop_size or (h, w)
        if self.flip and torch.rand(()).item() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        top, left = self._corner(h - height, w - width)
        picture = picture.resize((w, h), Image.Resampling.BICUBIC)  # antialiased; a copy if nothing changes
        picture = picture.crop((left, top, left + width, top + height))
        item = {"image": from_uint8(np.asarray(picture))}  # (H, W, 3)
        if self.coord:
            rows = np.arange(top, top + height)[:, None, None]
            columns = np.arange(left, left + width)[None, :, None]
            item["coord"] = ((rows * w + columns) / (h * w)).astype(np.float32)  # (H, W, 1)
        return item

    def _resized(self, path: str | os.PathLike, width: int, height: int) -> tuple[int, int]:
        """Return height and width after resizing, and check that the crop fits."""
        if self.size is None:
            if self.crop_size and (height < self.crop_size[0] or width < self.crop_size[1]):
                wanted = "x".join(map(str, self.crop_size))
                raise ValueError(
                    f"{os.fspath(path)} is {height}x{width} pixels (height x width), smaller than crop_size "
                    f"{wanted}: "
                    "give size as well, to enlarge such pictures, or choose a smaller crop_size, or remove "
                    "the file"
                )
            return height, width
        scale = max(self.size[0] / height, self.size[1] / width)
        if scale > 1 and not self._warned_of_enlarging:
            self._warned_of_enlarging = True
            logger.warning(
                "%s is %dx%d pixels (height x width), smaller than size %dx%d; such pictures are enlarged "
                "and look soft "
                "(said once)", os.fspath(path), height, width, *self.size,
            )
        return max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale))

    def _corner(self, free_rows: int, free_columns: int) -> tuple[int, int]:
        if not self.random_crop:
            return free_rows // 2, free_columns // 2
        return tuple(torch.randint(free + 1, ()).item() for free in (free_rows, free_columns))

    def _note_bad(self, index: int, error: BadImage) -> None:
        self._bad[index] = str(error)
        count, total = len(self._bad), len(self)
        if count == total or (count >= 2 and count > self.max_bad_fraction * total):
            first = "\n  ".join(list(self._bad.values())[:5])
            raise ValueError(
                f"{count} of {total} images cannot be read so far, more than "
                f"max_bad_fraction={self.max_bad_fraction} allows; "
                f"repair or remove them, or raise max_bad_fraction. The first:\n  {first}"
            ) from error
        logger.warning("%s; the next image takes its place (%d of %d are bad so far)", error, count, total)


def _check_size(name: str, size: Size) -> tuple[int, int] | None:
    """Return (height, width) in pixels, or None for None and 0 (as in 2021)."""
    if size is None or size == 0:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name} must be a positive number of pixels or [height, width], got {size!r}")
    return sides


def _check_crop(crop: tuple[int, int] | None, size: tuple[int, int] | None) -> tuple[int, int] | None:
    if crop and size and (crop[0] > size[0] or crop[1] > size[1]):
        raise ValueError(
            f"crop_size {crop[0]}x{crop[1]} (height x width) is larger than size {size[0]}x{size[1]}, to "
            "which pictures are "
            f"resized first: raise size to at least {max(crop)}, or lower crop_size"
        )
    return crop or size


def image_batches(
    paths: Sequence[str | os.PathLike], size: Size, multiple: int, batch_size: int, bad: list[str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Read images, in their order, into batches of neighbours of the same size: (paths, (B, 3, H, W)).

    Args:
        size: resize and crop to it, as ImagePaths does; None keeps each picture's own.
        multiple: what both sides are cropped to a multiple of, around the centre, in pixels.
        batch_size: most images in a batch.
        bad: gets a line for each file that cannot be read, or is smaller than `multiple`.
    """
    reader = ImagePaths(paths, size)
    batch: list[tuple[str, Tensor]] = []
    for path in reader.paths:
        try:
            image = torch.from_numpy(reader.load(path)["image"])  # (H, W, 3)
        except BadImage as error:
            bad.append(str(error))
            continue
        height, width = (side // multiple * multiple for side in image.shape[:2])
        if height == 0 or width == 0:
            bad.append(f"{path} is smaller than {multiple} pixels: give a size to enlarge it")
            continue
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        image = image[top:top + height, left:left + width].permute(2, 0, 1)
        if batch and (len(batch) == batch_size or batch[0][1].shape != image.shape):
            yield [name for name, _ in batch], torch.stack([x for _, x in batch])
            batch = []
        batch.append((path, image))
    if batch:
        yield [name for name, _ in batch], torch.stack([x for _, x in batch])
