"""Image files as RGB pixels. H W pixels of the crop.

What is read is bounded: a file by its bytes, an image by the memory that decoding it takes, which its header
tells before it is decoded. With both, one file takes less than 2 GB and 20 seconds.
"""

import io
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from taming.data.files.errors import file_errors
from taming.data.files.headers import check_header
from taming.data.transforms.joint import Box, JointParams, JointTransform
from taming.util import open_file, read_bytes

Path = str | os.PathLike
_ORIENTATION = 0x0112  # the EXIF tag
_REDUCE_FROM = 2  # JPEGs are decoded at a reduced size that is at least this many times the wanted size
_BAND = 1 << 22  # pixels that are converted at a time

# EPS, which runs another program, and kinds that are not photographs are left out.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE = 1 << 28  # bytes of a file: the pixels of a TIFF of 89 million pixels
MAX_MEMORY = 3 << 28  # bytes while an image is decoded
MAX_SIDE = 1 << 17  # pixels
# Bytes per pixel while an image is decoded (measured), by its format or its decoder; the last two are slow.
_COST = {"AVIF": 12, "JPEG2000": 24, "WEBP": 16, "ppm": 64, "ppm_plain": 64}
_USUAL_COST = 8


@contextmanager
def open_image(file: Path | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image file, or the bytes of one, with Pillow; nothing is decoded yet, see `decode`.

    Raises:
        OSError, ValueError, SyntaxError, ...: missing, no image, too large; see file_errors.
    """
    if isinstance(file, str | os.PathLike):
        data = read_bytes(file, "image", max_bytes=MAX_FILE)
    elif len(data := file.read(MAX_FILE + 1)) > MAX_FILE:
        raise ValueError(f"more than {MAX_FILE} bytes")
    Image.init()  # Pillow's other kinds of files; it does this once
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(check_header(data)), formats=formats)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f"cannot identify the file as one of {', '.join(formats)}") from error
    with image:
        yield image


def decode(image: Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Decode an image that was opened, and return it.

    Raises:
        ValueError: the header claims more than `max_pixels`, or an image that takes too much memory.
        OSError, ...: the file is broken.
    """
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(f"{height}x{width} pixels (height x width) are more than {max_pixels}: resize it")
    tiles = getattr(image, "tile", None)
    decoder = tiles[0][0] if tiles else ""
    cost = max(_COST.get(image.format or "", _USUAL_COST), _COST.get(decoder, 0))
    tags = getattr(image, "tag_v2", {})  # of a TIFF: a tile can be larger than the image
    tile = math.prod(int(tags.get(tag, 0)) for tag in (322, 323))
    if max(width * height, tile) * cost > MAX_MEMORY or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"an image of {height}x{width} pixels (height x width) is too large; {image.format} may have "
            f"{MAX_MEMORY // cost // 10**6} million pixels and sides of {MAX_SIDE}: resize it"
        )
    image.load()
    return image


def read_image(path: Path) -> np.ndarray:
    """Read one image file as RGB: uint8 (H, W, 3), 0..255, upright.

    EXIF orientation is applied; transparency is composited over white; 16-bit gray is scaled, not clipped, to
    8 bits; of an animation the first frame is read. Colour profiles are not applied.

    Raises:
        BadImage: missing, truncated, not an image, too large, or of a mode without a defined range (32-bit
            float).
    """
    with file_errors(path), open_image(path) as image:
        return to_rgb(upright(image))


def read_transformed(
    path: Path, transform: JointTransform, file: IO[bytes] | None = None
) -> tuple[np.ndarray, JointParams]:
    """Read one image file as `read_image` does, resized and cropped: uint8 (H, W, 3), and where that lies.

    JPEGs of more than twice the wanted size are decoded at a half, a quarter or an eighth of their size.

    Args:
        path: the file, or what messages call it.
        transform: resize, crop and flip.
        file: what to read instead.

    Raises:
        BadImage: as read_image.
        BadSample: as JointTransform.get_params.
    """
    with ExitStack() as stack:
        with file_errors(path):
            image = stack.enter_context(open_image(path if file is None else file))
            # Only the size of an upright JPEG is known, and can be reduced, before it is decoded.
            reducible = image.format in ("JPEG", "MPO") and image.getexif().get(_ORIENTATION, 1) == 1
            image = image if reducible else upright(image)
        params = transform.get_params(image.height, image.width, path)
        with file_errors(path):
            box = _reduce(image, *params.resized) if reducible else None
            pixels = to_rgb(decode(image) if reducible else image)
        return params.image(pixels, box), params


def _reduce(image: Image.Image, h: int, w: int) -> Box | None:
    """Reduce a JPEG to a size of at least twice (h, w), if that is smaller, while it is decoded.

    Returns the part of its pixels that is the image: the decoder rounds sizes up, so that the last row and
    column can reach beyond the image.
    """
    before = image.size
    drafted = image.draft(None, (_REDUCE_FROM * w, _REDUCE_FROM * h))
    return drafted[1] if drafted and image.size != before else None


def upright(image: Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Decode an image that was opened, turn it by its EXIF orientation, and return it; errors as decode."""
    ImageOps.exif_transpose(decode(image, max_pixels), in_place=True)
    return image


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a decoded image of any mode to uint8 (H, W, 3), in bands of rows, to save memory."""
    if image.mode == "F":
        raise ValueError("float pixels have no defined range; convert the file to 8 or 16 bits")
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _BAND // max(1, width))
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        band = image if rows >= height else image.crop((0, top, width, bottom))
        pixels[top:bottom] = _band(band)
    return pixels


def _band(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # "I;16" and its byte orders (PNG, TIFF), "I" (PGM, TIFF)
        values = np.asarray(image).astype(np.int32)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"integer pixels from {values.min()} to {values.max()} are not 16-bit gray")
        return ((values * 255 + 32767) // 65535).astype(np.uint8)[..., None]  # (H, W, 1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_npy(path: Path) -> np.ndarray:
    """Read an image that numpy saved, uint8 (1, 3, H, W), (3, H, W) or (H, W, 3), as uint8 (H, W, 3).

    Raises:
        BadImage: missing, broken, too large, or of another type or shape.
    """
    with file_errors(path), open_file(path, "image", max_bytes=MAX_FILE) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"version {version} of the format is not known")
        shape, in_columns, dtype = read_header(file)
        if dtype != np.uint8 or len(shape) not in (3, 4) or any(side < 0 for side in shape):
            raise ValueError(f"{dtype} {shape}, but an image is uint8 (1, 3, H, W)")
        data = file.read()
        if len(data) != math.prod(shape):
            raise ValueError(f"{len(data)} bytes of pixels, but the header claims the shape {shape}")
        pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if in_columns else "C")
        pixels = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 and pixels.shape[0] == 3 else pixels
        if pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(f"uint8 {pixels.shape}, but an image is uint8 (1, 3, H, W)")
        if max(pixels.shape) > MAX_SIDE:
            raise ValueError(f"sides of {pixels.shape}, more than {MAX_SIDE} pixels")
    return np.ascontiguousarray(pixels)
