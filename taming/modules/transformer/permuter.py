"""Orders in which a transformer may read the latent grid, as permutations of the raster order.

B batch, T = H * W tokens of an H x W latent grid. `forward_shuffle_idx[k]` is the raster position that is
read at step k; both index buffers are part of the checkpoint.
Source: Esser et al. 2021, the appendix on the ordering of image representations, where row-major was best.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class AbstractPermuter(nn.Module):
    """Reorder dimension 1 of a batch of sequences; subclasses set the order."""

    is_raster = False  # whether it is raster order, for any size

    forward_shuffle_idx: Tensor
    backward_shuffle_idx: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def _set_order(self, order: np.ndarray) -> None:
        self.register_buffer("forward_shuffle_idx", torch.tensor(order.tolist(), dtype=torch.long))
        inverse = np.argsort(order)
        self.register_buffer("backward_shuffle_idx", torch.tensor(inverse.tolist(), dtype=torch.long))

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """Reorder x (B, T, ...) from raster order into this order; with `reverse`, back into raster order.

        Raises:
            ValueError: T is not the H * W that the permuter was built for.
        """
        tokens = self.forward_shuffle_idx.numel()
        if x.shape[1] != tokens:
            raise ValueError(
                f"{type(self).__name__} was built for H * W = {tokens} tokens, got a sequence of "
                f"{x.shape[1]}: set H and W in permuter_config to the latent grid"
            )
        return x[:, self.backward_shuffle_idx if reverse else self.forward_shuffle_idx]


class Identity(AbstractPermuter):
    """Raster order, for any size."""

    is_raster = True

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """Return x as it is."""
        return x


class Subsample(AbstractPermuter):
    """From coarse to fine: the corners of large squares first, then the grids between them.

    The shorter side must be a power of two that divides the longer one.
    """

    def __init__(self, H: int, W: int):
        super().__init__()
        short, long = sorted((H, W))
        if short < 1 or short & (short - 1) or long % short:
            raise ValueError(
                f"Subsample halves the grid until one row or column is left: the shorter side must be a "
                f"power of two that divides the longer, got H={H}, W={W}"
            )
        order = _raster(H, W)[None]  # (C, h, w): C grids, each a coarser sampling of the one before
        while min(order.shape[1:]) > 1:
            c, h, w = order.shape
            corners = order.reshape(c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3)
            order = corners.reshape(c * 4, h // 2, w // 2)
        self._set_order(order.ravel())


class ZCurve(AbstractPermuter):
    """Morton order: each quarter of the grid before the next, and each quarter in the same way. Any size."""

    def __init__(self, H: int, W: int):
        super().__init__()
        _raster(H, W)
        codes = [mortonify(i, j) for i in range(H) for j in range(W)]
        self._set_order(np.argsort(codes))


class SpiralOut(AbstractPermuter):
    """From the center outwards in a spiral, which skips positions outside of a grid that is not square."""

    def __init__(self, H: int, W: int):
        super().__init__()
        self._set_order(_spiral(H, W))


class SpiralIn(AbstractPermuter):
    """From the border inwards: SpiralOut read backwards."""

    def __init__(self, H: int, W: int):
        super().__init__()
        self._set_order(_spiral(H, W)[::-1])


class Random(AbstractPermuter):
    """A random order that is fixed for each grid size, the same in every process and run."""

    def __init__(self, H: int, W: int):
        super().__init__()
        # the legacy generator: checkpoints and golden tensors hold its order
        self._set_order(np.random.RandomState(1).permutation(_raster(H, W).size))


class AlternateParsing(AbstractPermuter):
    """Rows from left to right and from right to left in turn, so that neighbors in the sequence touch."""

    def __init__(self, H: int, W: int):
        super().__init__()
        order = _raster(H, W)
        order[1::2] = order[1::2, ::-1].copy()
        self._set_order(order.ravel())


def _raster(height: int, width: int) -> np.ndarray:
    if height < 1 or width < 1:
        raise ValueError(f"a permuter needs at least one row and one column, got H={height}, W={width}")
    return np.arange(height * width).reshape(height, width)


def mortonify(i: int, j: int) -> int:
    """Interleave the bits of row i and column j; those of the row are the higher of each pair."""
    code = 0
    for bit in range(max(i, j).bit_length()):
        code |= (j >> bit & 1) << (2 * bit) | (i >> bit & 1) << (2 * bit + 1)
    return code


def _spiral(height: int, width: int) -> np.ndarray:
    """List raster positions along the spiral that starts at the center and goes up, right, down, left."""
    raster = _raster(height, width)
    order = [raster[i, j] for i, j in _spiral_cells(height, width) if 0 <= i < height and 0 <= j < width]
    return np.array(order)


def _spiral_cells(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Walk (row, column) along a square spiral that is wide enough to cover the grid."""
    i, j = height // 2, (width - 1) // 2
    yield i, j
    directions = ((-1, 0), (0, 1), (1, 0), (0, -1))
    for leg in range(2 * max(height, width) + 2):
        di, dj = directions[leg % 4]
        for _ in range(leg // 2 + 1):  # legs of 1, 1, 2, 2, 3, 3, ... cells
            i, j = i + di, j + dj
            yield i, j
