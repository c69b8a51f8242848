"""Conversion of images: float tensors in [-1, 1] from and to 8-bit pixels, PNG files and grids.

B batch, C channels (1 or 3), H W pixels. The factor 127.5 occurs in this file only.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from taming.util import atomic_write

Array = TypeVar("Array", np.ndarray, Tensor)

PNG_END = b"IEND\xaeB`\x82"  # the last bytes of every PNG file
SOFTWARE = "taming"  # what the PNG files that are written here name as their software


def from_uint8(pixels: Array) -> Array:
    """Map 8-bit pixels 0..255 of any shape to float32 in [-1, 1]; an array gives an array."""
    if isinstance(pixels, np.ndarray):
        return (pixels.astype(np.float32) / 127.5) - 1.0
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Array) -> Array:
    """Map floats in [-1, 1] of any shape to the nearest 8-bit pixels; values outside are clamped."""
    if isinstance(images, np.ndarray):
        return np.clip(np.rint((images + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Arrange images (B, C, H, W) in [-1, 1] in rows, left to right, on white: one image (C, H', W').

    H' = rows * (H + padding) + padding, and W' likewise.

    Args:
        columns: images in a row; the square root of B, rounded up, when None.
        padding: white pixels around each image.

    Raises:
        ValueError: there are no images.
    """
    batch, channels, height, width = images.shape
    if batch == 0:
        raise ValueError("a grid needs at least one image, got an empty batch")
    columns = min(batch, columns or math.ceil(math.sqrt(batch)))
    rows = math.ceil(batch / columns)
    size = rows * (height + padding) + padding, columns * (width + padding) + padding
    grid = images.new_ones(channels, *size)
    for i, image in enumerate(images):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        grid[:, top:top + height, left:left + width] = image
    return grid


def text_pictures(lines: Sequence[str], size: tuple[int, int]) -> Tensor:
    """Write each of B lines on a white image of `size` (H, W), broken between words: (B, 1, H, W)."""
    height, width = size
    font = ImageFont.load_default(max(9, min(size) // 8))
    images = []
    for line in lines:
        image = Image.new("L", (width, height), "white")
        pen, rows = ImageDraw.Draw(image), [""]
        for word in line.split():
            longer = f"{rows[-1]} {word}".strip()
            fits = not rows[-1] or pen.textlength(longer, font) <= width - 4
            rows = [*rows[:-1], longer] if fits else [*rows, word]
        pen.multiline_text((2, 1), "\n".join(rows), fill="black", font=font, spacing=1)
        images.append(torch.from_numpy(np.array(image)))
    return from_uint8(torch.stack(images))[:, None]


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (C, H, W) in [-1, 1], C = 1 or 3, to a Pillow image of mode L or RGB."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image has the shape (C, H, W) with C = 1 or 3, got {tuple(image.shape)}")
    pixels = to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def from_pil(image: Image.Image) -> Tensor:
    """Turn a Pillow image of any mode into an image (3, H, W) in [-1, 1]; the inverse of `to_pil` for RGB."""
    return from_uint8(torch.from_numpy(np.array(image.convert("RGB")))).permute(2, 0, 1)


def load_png(path: str | Path) -> Tensor:
    """Read a PNG file as an image (3, H, W) in [-1, 1]."""
    with Image.open(path) as image:
        return from_pil(image)


def save_png(image: Tensor, path: str | Path, text: dict[str, str] | None = None) -> Path:
    """Write an image (C, H, W) in [-1, 1] as a PNG file, and make its folders; return the path.

    `text` becomes text chunks of the file, beside `Software`. The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in {"Software": SOFTWARE, **(text or {})}.items():
        info.add_text(key, value)
    with atomic_write(path) as partial:
        to_pil(image).save(partial, format="PNG", pnginfo=info)
    return path


def is_complete_png(path: str | Path) -> bool:
    """Tell whether a file is a PNG that does not break off."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(-min(len(PNG_END), path.stat().st_size), os.SEEK_END)
        return file.read() == PNG_END


def is_own_png(path: str | Path) -> bool:
    """Tell whether `save_png` wrote a file, or the beginning of it; an empty file counts, too."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, SyntaxError, ValueError):
        return Path(path).stat().st_size == 0
