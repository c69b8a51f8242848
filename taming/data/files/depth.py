"""Depth maps as PNG files: the four bytes of a float32, little-endian, are the R, G, B and A of a pixel.

H W pixels.
"""

import os
from typing import IO

import numpy as np

from taming.data.files.errors import BadSample, file_errors
from taming.data.files.images import decode, open_image

_FAR = 1e20  # more than any depth; the colours of an opaque image, taken for float32s, are beyond 1e38


def rgba_to_depth(x: np.ndarray) -> np.ndarray:
    """Join the bytes (H, W, 4), uint8, of a depth map (H, W), float32 in the units of whatever made it.

    Raises:
        ValueError: another type or shape.
    """
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[2] != 4:
        raise ValueError(f"packed depth is uint8 (H, W, 4), got {x.dtype} {x.shape}")
    return np.ascontiguousarray(x).view("<f4")[..., 0].astype(np.float32, copy=False)


def depth_to_rgba(depth: np.ndarray) -> np.ndarray:
    """Split the numbers of a depth map (H, W) into their bytes, uint8 (H, W, 4), as PNG files have them."""
    return np.ascontiguousarray(depth, dtype="<f4")[..., None].view(np.uint8)


def read_depth(file: str | os.PathLike | IO[bytes]) -> np.ndarray:
    """Read a depth PNG and stretch it to [-1, 1]: (H, W) float32, its smallest value -1, its largest 1.

    Raises:
        BadSample: the file is not an image, too large, not RGBA, or holds numbers that are not depths.
    """
    with file_errors(file, "depth", BadSample), open_image(file) as image:
        pixels, mode = np.asarray(decode(image)), image.mode
    if mode != "RGBA":
        raise BadSample(
            f"depth {file} has mode {mode}, but must be RGBA: the four bytes of a float32 a pixel "
            "(taming.data.files.depth.depth_to_rgba makes them)"
        )
    depth = rgba_to_depth(pixels)
    low, high = depth.min(initial=_FAR), depth.max(initial=-_FAR)
    if not max(abs(low), abs(high)) < _FAR:  # nan fails, too
        raise BadSample(f"depth {file} ranges from {low} to {high}: its pixels are not packed float32s")
    depth = depth - low
    depth /= np.float32(max(1e-8, float(high) - float(low)))
    depth *= 2
    depth -= 1
    return depth
