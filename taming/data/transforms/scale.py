"""Images of a lower resolution. H W pixels."""

import numpy as np
from PIL import Image

from taming.images import from_uint8, to_uint8


def imscale(
    x: np.ndarray, factor: int | None, keepshapes: bool = False, keepmode: str = "bicubic"
) -> np.ndarray:
    """Make an image (H, W, 3) of floats in [-1, 1] `factor` times smaller; see shrink."""
    if factor is None or factor == 1:
        return x
    return from_uint8(shrink(to_uint8(x), factor, keepshapes, keepmode)).astype(x.dtype)


def shrink(
    pixels: np.ndarray, factor: int, keepshapes: bool = False, keepmode: str = "bicubic"
) -> np.ndarray:
    """Make an image (H, W, 3), uint8, `factor` times smaller, and enlarge it again with `keepshapes`.

    `keepmode` is how it is enlarged: nearest, bilinear or bicubic.

    Raises:
        ValueError: another mode, or a factor larger than the image.
    """
    modes = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic")}
    if keepmode not in modes:
        raise ValueError(f"keep_mode is {keepmode!r}; choose one of {', '.join(modes)}")
    height, width = pixels.shape[:2]
    if not 1 <= factor <= min(height, width):
        raise ValueError(f"an image of {height}x{width} pixels cannot be made {factor} times smaller")
    small = Image.fromarray(pixels).resize((width // factor, height // factor), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((width, height), modes[keepmode]) if keepshapes else small)
