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
CHUNK_BYTES = 64 << 20  # of vectors for which all codes are gone through
TILE_ROWS = 1024  # vectors of a tile, where there are as many
MAX_GROUP = 64  # codes that are reduced to their smallest distance before its index is looked for


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
            where two codes are equally near up to rounding. Besides, the search takes at most
            `CHUNK_BYTES`, and float32 copies of `z` and `codebook` if they are of another type.
    """
    with torch.autocast(z.device.type, enabled=False), exact_matmul():
        z, codebook = z.float(), codebook.float()
        if tile_bytes is None:
            tile_bytes = CPU_TILE_BYTES if z.device.type == "cpu" else GPU_TILE_BYTES
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2; |z|^2 is the same for all codes and left out
        euclidean = metric == "euclidean"
        scale = -2.0 if euclidean else -1.0
        if 4 * len(z) * len(codebook) <= tile_bytes:
            lengths = codebook.square().sum(1) if euclidean else z.new_zeros(len(codebook))
            return _argmin(torch.addmm(lengths, z, codebook.t(), alpha=scale))
        rows = max(1, CHUNK_BYTES // (4 * z.shape[1] + 4))
        parts = z.split(rows)
        return torch.cat([_search(part, codebook, scale, euclidean, tile_bytes // 4) for part in parts])


def _search(z: Tensor, codebook: Tensor, scale: float, euclidean: bool, elements: int) -> Tensor:
    """Return the index (n,) of the smallest scale * z.e (+ |e|^2) for vectors (n, C), in tiles.

    A channel of ones in z, and |e|^2 in the codes, add the lengths within the product.
    """
    rows = max(1, min(len(z), TILE_ROWS))
    columns = min(len(codebook), max(1, elements // rows))
    tile = z.new_empty(rows * columns)
    best = z.new_full((len(z),), torch.inf)
    index = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    z = torch.cat((z, z.new_ones(len(z), 1)), dim=1) if euclidean else z  # (n, C + 1)
    for start in range(0, len(codebook), columns):
        codes = codebook[start:start + columns]
        lengths = [codes.square().sum(1, keepdim=True)] if euclidean else []
        codes = torch.cat((codes * scale, *lengths), dim=1)  # (k, C + 1)
        parts = zip(z.split(rows), best.split(rows), index.split(rows), strict=True)
        for vectors, smallest, where in parts:
            distances = tile[:len(vectors) * len(codes)].view(len(vectors), len(codes))
            _keep_nearer(torch.mm(vectors, codes.t(), out=distances), start, smallest, where)
    return index


def _keep_nearer(distances: Tensor, start: int, smallest: Tensor, where: Tensor) -> None:
    """Put the smallest distance of each row of a tile (n, k), and its code, in place where it is smaller.

    The tile begins at the code `start`; `smallest` and `where`, (n,), are what was found before.
    """
    groups = _groups(distances)
    value, which = groups.amin(2).min(1)
    better = (value < smallest) | (value.isnan() & ~smallest.isnan())  # NaN first, as for argmin
    if distances.is_cpu:  # others would have to wait for the number of rows
        rows = better.nonzero().squeeze(1)
    else:
        rows = torch.arange(len(better), device=better.device)
        value = torch.where(better, value, smallest)
    here = start + which[rows] * groups.shape[2] + groups[rows, which[rows]].argmin(1)
    smallest[rows] = value[rows]
    where[rows] = torch.where(better[rows], here, where[rows])


def _argmin(x: Tensor) -> Tensor:
    """Return the first index (n,) of the smallest value of each row (n, k).

    As `x.argmin(1)`, in a third of its time on a CPU: the minimum of a group of neighbors is vectorised
    there, the search for an index is not.
    """
    groups = _groups(x)
    which = groups.amin(2).argmin(1)
    return which * groups.shape[2] + groups[torch.arange(len(x), device=x.device), which].argmin(1)


def _groups(x: Tensor) -> Tensor:
    """Return rows (n, k) as groups of neighbors, (n, k / group, group)."""
    width = x.shape[1]
    group = max(size for size in range(1, min(MAX_GROUP, width) + 1) if width % size == 0)
    return x.view(len(x), width // group, group)
