"""Image files as RGB pixels. H W pixels of the crop."""

import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from taming.data.files.errors import file_errors
from taming.data.transforms.joint import Box, JointParams, JointTransform

Path = str | os.PathLike
_ORIENTATION = 0x0112  # the EXIF tag
_REDUCE_FROM = 2  # JPEGs are decoded at a reduced size that is at least this many times the wanted size


def read_image(path: Path) -> np.ndarray:
    """Read one image file of any mode that Pillow knows as RGB: uint8 (H, W, 3), 0..255, upright.

    EXIF orientation is applied; transparency is composited over white; 16-bit gray is scaled, not clipped, to
    8 bits; of an animation the first frame is read.

    Raises:
        BadImage: missing, truncated, not an image, or of a mode without a defined range (32-bit float).
    """
    with file_errors(path), Image.open(path) as image:
        return np.asarray(_to_rgb(image))


def read_transformed(
    path: Path, transform: JointTransform, file: IO[bytes] | None = None
) -> tuple[np.ndarray, JointParams]:
    """Read one image file as `read_image` does, resized and cropped: uint8 (H, W, 3), and where that lies.

    JPEGs of more than twice the wanted size are decoded at a half, a quarter or an eighth of their size.

    Args:
        path: the file, or what messages call it.
        transform: says where to.
        file: what to read instead.

    Raises:
        BadImage: as read_image.
        BadSample: as JointTransform.place.
    """
    with file_errors(path):
        opened = Image.open(path if file is None else file)
    with opened:
        with file_errors(path):
            # Only of an upright JPEG the size is known, and may be chosen, before it is decoded.
            reducible = opened.format == "JPEG" and opened.getexif().get(_ORIENTATION, 1) == 1
            picture = opened if reducible else _to_rgb(opened)
        params = transform.get_params(picture.height, picture.width, path)
        with file_errors(path):
            box = _reduce(picture, *params.resized) if reducible else None
            return params.image(np.asarray(_to_rgb(picture)), box), params


def _reduce(image: Image.Image, h: int, w: int) -> Box | None:
    """Have a JPEG decoded small if more than twice (h, w) remains; return what of its pixels is the picture.

    The decoder rounds sizes up, so that the last row and column can reach beyond the picture.
    """
    before = image.size
    drafted = image.draft(None, (_REDUCE_FROM * w, _REDUCE_FROM * h))
    return drafted[1] if drafted and image.size != before else None


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
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


def read_npy(path: Path) -> np.ndarray:
    """Read an image that numpy saved, uint8 (1, 3, H, W), (3, H, W) or (H, W, 3), as uint8 (H, W, 3).

    Raises:
        BadImage: missing, broken, or of another type or shape.
    """
    with file_errors(path):
        pixels = np.load(path, allow_pickle=False)
        pixels = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 and pixels.shape[0] == 3 else pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(f"{pixels.dtype} {pixels.shape}, but an image is uint8 (1, 3, H, W)")
    return np.ascontiguousarray(pixels)
