"""Search for codes: the nearest, or the most similar, of K codes for each of N vectors, in float32.

No more of the N x K distances is held at once than a tile. N vectors, K codes, C channels.
"""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["euclidean", "inner_product"]
CPU_TILE_BYTES = 8 << 20  # of distances held at once: about a second-level cache, so that they stay in it
GPU_TILE_BYTES = 256 << 20  # for which the matrix products are large enough to keep all cores busy
TILE_ROWS = 1024  # vectors of a tile, where there are as many
MAX_GROUP = 128  # codes that are reduced to their smallest distance before its index is looked for


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Turn off the faster modes of float32 matrix products (TF32, bfloat16), which would change codes."""
    mode = torch.get_float32_matmul_precision()
    if mode != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if mode != "highest":
            torch.set_float32_matmul_precision(mode)


@torch.no_grad()
def nearest_code(
    z: Tensor, codebook: Tensor, metric: Metric = "euclidean", tile_bytes: int | None = None
) -> Tensor:
    """Return the index (N,), int64, of the code (K, C) that is nearest to each vector (N, C).

    That is the code at the smallest Euclidean distance or with the largest inner product, and the first of
    several such. Computed in float32 whatever autocast and the precision of matrix products say: bfloat16
    would change 1 to 7 % of the indices.

    Args:
        tile_bytes: memory for distances; None for what is fast on the device. The result may depend on it
            where two codes are equally near up to rounding. Besides, the search takes 4 K bytes, and those of
            float32 copies of `z` and `codebook` if they are of another type.
    """
    with torch.autocast(z.device.type, enabled=False), exact_matmul():
        z, codebook = z.float(), codebook.float()
        if tile_bytes is None:
            tile_bytes = CPU_TILE_BYTES if z.device.type == "cpu" else GPU_TILE_BYTES
        elements = max(1, tile_bytes // 4)
        rows = len(z) if len(z) * len(codebook) <= elements else min(len(z), TILE_ROWS)
        columns = min(len(codebook), max(1, elements // max(rows, 1)))
        tile = z.new_empty(rows * columns)
        bias, scale = z.new_zeros(len(codebook)), -1.0
        if metric == "euclidean":  # |z - e|^2 = |z|^2 - 2 z.e + |e|^2; |z|^2 is the same for all codes
            bias, scale = squared_lengths(codebook, tile_bytes), -2.0
        nearest = [
            _search(vectors, codebook, bias, scale, tile, columns) for vectors in z.split(max(rows, 1))
        ]
    return torch.cat(nearest)


def squared_lengths(codebook: Tensor, budget: int) -> Tensor:
    """Return |e|^2 (K,) of codes (K, C), with no more memory than a budget in bytes for what lies between."""
    rows = max(1, budget // (4 * codebook.shape[1]))
    return torch.cat([codes.square().sum(1) for codes in codebook.split(rows)])


def _search(
    z: Tensor, codebook: Tensor, bias: Tensor, scale: float, tile: Tensor, columns: int
) -> Tensor:
    """Return the index (n,) of the smallest bias + scale z.e, computed in tiles of so many columns."""
    best = z.new_full((len(z),), torch.inf)
    index = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    for start in range(0, len(codebook), columns):
        codes = codebook[start:start + columns]
        distances = tile[:len(z) * len(codes)].view(len(z), len(codes))
        torch.addmm(bias[start:start + columns], z, codes.t(), alpha=scale, out=distances)
        value, here = _min(distances)
        better = (value < best) | (value.isnan() & ~best.isnan())  # NaN is the smallest, as for argmin
        best = torch.where(better, value, best)
        index = torch.where(better, here + start, index)
    return index


def _min(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest value of each row (n, k) and its first index, both (n,).

    As `x.min(1)`, in a fifth of its time on a CPU: the minimum of a group of neighbors is vectorised there,
    the search for an index is not.
    """
    width = x.shape[1]
    group = max(size for size in range(1, min(MAX_GROUP, width) + 1) if width % size == 0)
    groups = x.view(len(x), width // group, group)
    value, which = groups.amin(2).min(1)
    inside = groups[torch.arange(len(x), device=x.device), which].argmin(1)
    return value, which * group + inside
