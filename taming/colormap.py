"""Colors of labels, the same in every image, figure and page.

B batch, L labels, H W pixels.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taming.images import from_uint8

# Easy to tell apart and to name. The first ten suit the labels of the built-in landscapes.
COLORS = (
    "#87ceeb", "#ffd500", "#d8dbe8", "#7d6b91", "#fffafa", "#1f6fd0", "#0b6b2d", "#7ccb3f", "#e5c07b",
    "#8a5a34", "#e6194b", "#f032e6", "#f58231", "#46f0f0", "#911eb4", "#fabebe", "#008080", "#800000",
    "#000075", "#808000", "#404040", "#aaffc3",
)


@cache
def label_colors(n_labels: int) -> np.ndarray:
    """Return a fixed color for each label, uint8 (L, 3), read-only.

    They are those of `COLORS`, then colors far from all before them.

    Raises:
        ValueError: more labels than there are different colors.
    """
    colors = [tuple(bytes.fromhex(color[1:])) for color in COLORS][:n_labels]
    if len(colors) < n_labels:
        steps = np.linspace(0, 255, 12).round().astype(np.int64)
        grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
        if n_labels > len(grid):
            raise ValueError(f"{n_labels} labels are too many: there are {len(grid)} different colors")
        nearest = ((grid[:, None] - np.array(colors)) ** 2).sum(-1).min(1)  # squared distance, (G,)
        while len(colors) < n_labels:
            chosen = grid[nearest.argmax()]
            colors.append(tuple(chosen.tolist()))
            nearest = np.minimum(nearest, ((grid - chosen) ** 2).sum(-1))
    array = np.array(colors, dtype=np.uint8)
    array.setflags(write=False)  # the cache returns this array again
    return array


def colorize(maps: Tensor) -> Tensor:
    """Paint label maps (B, L, H, W), one-hot or shares, in `label_colors`: (B, 3, H, W) in [-1, 1]."""
    colors = from_uint8(torch.tensor(label_colors(maps.shape[1]))).T  # (3, L)
    return F.conv2d(maps.float(), colors[:, :, None, None].to(maps.device))


def random_colors(n_labels: int) -> Tensor:
    """Return the buffer `colorize` of models of 2021, (3, L, 1, 1): arbitrary, and the same in every run."""
    return torch.randn(3, n_labels, 1, 1, generator=torch.Generator().manual_seed(0))
