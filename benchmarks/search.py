"""How fast the nearest code of each latent is found, beside all distances at once as in 2021."""

import argparse
from functools import partial

import torch

from benchmarks import training_2021 as old
from benchmarks.parts import Row, compare, pick
from taming.modules.quantizers.base import nearest_code

MATRIX = 2**31  # bytes of the distances that 2021's way keeps, at most


def search(options: argparse.Namespace) -> list[Row]:
    """The nearest of K codes for 32,768 vectors (fewer where 2021's distances would take over 2 GB)."""
    sizes = (256, 1024) if options.quick else (1024, 16384, 2**18)
    rows: list[Row] = []
    for dim in (8, 32) if options.quick else (8, 32, 256):
        for size in sizes:
            torch.manual_seed(0)
            vectors = pick(options, "batch", min(32768, MATRIX // (4 * size)), 512)
            z = torch.randn(vectors, dim, device=options.device)
            codes = torch.randn(size, dim, device=options.device)
            found = [
                (z - codes[each]).double().square().sum(1)
                for each in (old.nearest(z, codes), nearest_code(z, codes))
            ]
            torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)  # ties may be broken either way
            rows += compare(
                options,
                {"2021": partial(old.nearest, z, codes), "nearest_code": partial(nearest_code, z, codes)},
                what=f"{vectors} x {dim}, {size} codes", unit="vectors", amount=vectors, against="2021",
            )
    return rows


PARTS = {"search": search}
