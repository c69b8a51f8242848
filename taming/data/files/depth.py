"""Depth maps as PNG files: the four bytes of a float32, little-endian, are the R, G, B and A of a pixel.

H W pixels.
"""

import os

import numpy as np
from PIL import Image

from taming.data.files.errors import BadSample, file_errors

_FAR = 1e20  # more than any depth; the colours of an opaque picture, taken for float32s, are beyond 1e38


def rgba_to_depth(x: np.ndarray) -> np.ndarray:
    """Join the bytes (H, W, 4), uint8, of a depth map (H, W), float32 in the units of whatever made it.

    Raises:
        ValueError: another type or shape.
    """
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] != 4:
        raise ValueError(f"packed depth is uint8 (H, W, 4), got {x.dtype} {x.shape}")
    return np.ascontiguousarray(x).view("<f4")[..., 0].astype(np.float32, copy=False)


def depth_to_rgba(depth: np.ndarray) -> np.ndarray:
    """Part a depth map (H, W) into the bytes of its numbers, uint8 (H, W, 4), as PNG files have them."""
    return np.ascontiguousarray(depth, dtype="<f4")[..., None].view(np.uint8)


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """Read a depth PNG and stretch it to [-1, 1]: (H, W) float32, its least value -1, its largest 1.

    Raises:
        BadSample: the file is no image, not RGBA, or holds numbers that are no depths.
    """
    with file_errors(path, "depth", BadSample), Image.open(path) as image:
        image.load()
    if image.mode != "RGBA":
        raise BadSample(
            f"depth {path} has mode {image.mode}, but must be RGBA: the four bytes of a float32 a pixel "
            "(taming.data.files.depth.depth_to_rgba makes them)"
        )
    depth = rgba_to_depth(np.asarray(image))
    low, high = depth.min(), depth.max()
    if not max(abs(low), abs(high)) < _FAR:  # nan fails, too
        raise BadSample(f"depth {path} ranges from {low} to {high}: its pixels are no packed float32s")
    spread = max(1e-8, float(high) - float(low))
    return ((depth - low) / spread * 2 - 1).astype(np.float32)
