"""nearest_code: exact, the first of equal codes, in tiles, in little memory."""

import pytest
import torch

from taming.modules.quantizers import base
from taming.modules.quantizers.search import CHUNK_BYTES, CPU_TILE_BYTES, nearest_code
from tests.modules.quantizers.memory import PeakBytes


def whole(z, codebook):
    """The search as it was: all distances at once."""
    return torch.addmm(codebook.square().sum(1), z, codebook.t(), alpha=-2.0).argmin(1)


@pytest.mark.parametrize(("n", "k", "c"), [(1, 1, 1), (7, 13, 3), (500, 1024, 256), (2000, 997, 8)])
def test_a_single_block_is_what_it_was_bit_for_bit(n, k, c):
    z, codebook = torch.randn(n, c), torch.randn(k, c)
    assert base.nearest_code is nearest_code
    assert torch.equal(nearest_code(z, codebook), whole(z, codebook))


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
@pytest.mark.parametrize("tile_bytes", [4, 4 * 37, 4096, 1 << 16])
def test_tiles_find_the_nearest(metric, tile_bytes):
    z, codebook = torch.randn(130, 5), torch.randn(211, 5) * torch.rand(211, 1) * 3
    products = z.double() @ codebook.double().t()
    want = products if metric == "inner_product" else -torch.cdist(z.double(), codebook.double())
    assert torch.equal(nearest_code(z, codebook, metric, tile_bytes), want.argmax(1))


@pytest.mark.parametrize("tile_bytes", [None, 4, 4 * 40])
@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_the_first_of_equal_codes_is_taken(metric, tile_bytes):
    codebook = torch.eye(8).repeat(6, 1)  # (48, 8): each code six times
    indices = nearest_code(torch.eye(8), codebook, metric, tile_bytes)
    assert indices.tolist() == [*range(8)]


@pytest.mark.parametrize("tile_bytes", [None, 4 * 16])
def test_values_that_are_not_finite_give_an_index_all_the_same(tile_bytes):
    z = torch.randn(5, 4)
    z[1], z[2, 0] = torch.nan, torch.inf
    codebook = torch.randn(40, 4)
    indices = nearest_code(z, codebook, tile_bytes=tile_bytes)
    assert torch.equal(indices[[0, 3, 4]], whole(z, codebook)[[0, 3, 4]])
    assert indices.min() >= 0 and indices.max() < 40 and indices[1] == 0
    codebook[7] = torch.nan
    assert (nearest_code(z, codebook, tile_bytes=tile_bytes)[[0, 3]] == 7).all()  # as argmin does


def test_no_vectors_have_no_codes():
    assert nearest_code(torch.zeros(0, 4), torch.randn(9, 4)).shape == (0,)


def test_faster_matrix_products_do_not_change_codes():
    z, codebook = torch.randn(300, 64), torch.randn(500, 64)
    want = nearest_code(z, codebook)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not torch.allclose(z @ codebook.t(), (z.double() @ codebook.double().t()).float(), atol=1e-3)
        assert torch.equal(nearest_code(z, codebook), want)
        assert torch.equal(nearest_code(z, codebook, tile_bytes=1 << 14), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("n", "k", "c"), [(2048, 8192, 16), (64, 1 << 18, 16), (40_000, 600, 64)])
def test_memory_is_bounded(n, k, c):
    """Less than a tile, a chunk of vectors and what is proportional to N."""
    z, codebook = torch.randn(n, c), torch.randn(k, c)
    with PeakBytes() as memory:
        nearest_code(z, codebook)
    assert 4 * n * k > 2 * CPU_TILE_BYTES
    assert memory.peak < 2 * CPU_TILE_BYTES + min(CHUNK_BYTES, 4 * n * (c + 1)) + 40 * n
