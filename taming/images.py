"""Images in and out: float tensors in [-1, 1] on one side; 8-bit pixels, PNG files and grids on the other.

B batch, C channels (1 or 3), H W pixels. This file is the only place that knows the factor 127.5.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)


def from_uint8(pixels: Array) -> Array:
    """Map 8-bit pixels 0..255, of any shape, to float32 in [-1, 1]; numpy stays numpy."""
    if isinstance(pixels, np.ndarray):
        return (pixels.astype(np.float32) / 127.5) - 1.0
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: Array) -> Array:
    """Map floats in [-1, 1], of any shape, to the nearest 8-bit pixel; what lies outside is clamped."""
    if isinstance(images, np.ndarray):
        return np.clip(np.rint((images + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Lay images (B, C, H, W) in [-1, 1] out in rows, left to right, on white: one image (C, H', W').

    `columns` defaults to the square root of B, rounded up. There are `padding` pixels of white around each
    image, and white where the last row is not full: H' = rows * (H + padding) + padding, and W' likewise.
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
    """Write a line on each of B white pictures of `size` (H, W), broken where words end: (B, 1, H, W)."""
    height, width = size
    font = ImageFont.load_default(max(9, min(size) // 8))
    drawn = []
    for line in lines:
        picture = Image.new("L", (width, height), "white")
        pen, rows = ImageDraw.Draw(picture), [""]
        for word in line.split():
            longer = f"{rows[-1]} {word}".strip()
            fits = not rows[-1] or pen.textlength(longer, font) <= width - 4
            rows = [*rows[:-1], longer] if fits else [*rows, word]
        pen.multiline_text((2, 1), "\n".join(rows), fill="black", font=font, spacing=1)
        drawn.append(torch.from_numpy(np.array(picture)))
    return from_uint8(torch.stack(drawn))[:, None]


def to_pil(image: Tensor) -> Image.Image:
    """Turn one image (C, H, W) in [-1, 1] with C = 1 or 3 into a Pillow image of mode L or RGB."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"an image (C, H, W) with C = 1 or 3 is needed, got the shape {tuple(image.shape)}")
    pixels = to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def save_png(image: Tensor, path: str | Path, text: dict[str, str] | None = None) -> Path:
    """Write one image (C, H, W) in [-1, 1] as a PNG file, and make its folders.

    `text` becomes text chunks of the file, which appears whole or not at all: it is written beside its place
    and renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    partial = path.with_name(f".{path.name}.part")
    to_pil(image).save(partial, format="PNG", pnginfo=info)
    partial.replace(path)
    return path
