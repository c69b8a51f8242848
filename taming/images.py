"""Images in and out: float tensors in [-1, 1] on one side; 8-bit pixels, PNG files and grids on the other.

B batch, C channels (1 or 3), H W pixels. This file is the only place that knows the factor 127.5.
"""

import math
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, PngImagePlugin
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
    """Lay images (B, C, H, W) out in rows, left to right: (C, rows*(H+padding)+padding, ...), white between.

    `columns` defaults to the next integer above the square root of B. The last row is filled with white.
    """
    batch, channels, height, width = images.shape
    columns = min(batch, columns or math.ceil(math.sqrt(batch)))
    rows = math.ceil(batch / columns)
    grid = images.new_ones(
        channels, rows * (height + padding) + padding, columns * (width + padding) + padding
    )
    for i, image in enumerate(images):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        grid[:, top:top + height, left:left + width] = image
    return grid


def to_pil(image: Tensor) -> Image.Image:
    """Turn one image (C, H, W) in [-1, 1] with C = 1 or 3 into a Pillow image of mode L or RGB."""
    pixels = to_uint8(image.detach().cpu()).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def save_png(image: Tensor, path: str | Path, text: dict[str, str] | None = None) -> Path:
    """Write one image (C, H, W) in [-1, 1] as a PNG, making folders as needed; `text` becomes PNG text
    chunks.

    The file appears whole or not at all (written beside its place, then renamed).
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
