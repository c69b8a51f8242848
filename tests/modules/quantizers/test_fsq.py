"""FSQ: golden values of a peer, digits, bad input."""

import pytest
import torch

from taming.modules.quantizers.bits import digits_to_indices
from taming.modules.quantizers.fsq import FSQ
from tests.modules.quantizers.golden import as_map, as_rows, close, read

CASES = {  # lucidrains/vector-quantize-pytorch, commit 0d7d1aa
    "fsq": dict(levels=[8, 5, 5]),
    "fsq_projected": dict(levels=[8, 5, 5, 5], dim=6),
    "fsq_symmetric": dict(levels=[4, 2, 5], symmetric=True),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_values_of_a_peer(name):
    state, given, want = read(name)
    quantizer = FSQ(**CASES[name])
    quantizer.load_state_dict(state)
    x = as_map(given["x"]).requires_grad_()
    z_q, loss, info = quantizer(x)
    assert torch.equal(info.indices[:, 0], want["indices"]) and loss == 0
    close(as_rows(z_q), want["quantized"])
    (as_rows(z_q) * given["probe"]).sum().backward()
    close(as_rows(x.grad), want["grad_x"])
    close(as_rows(quantizer.indices_to_codes(given["codes"][:, None])), want["codes"])
    z_q, _, info = quantizer(given["image"])
    assert torch.equal(info.indices, want["image_indices"])
    close(z_q, want["image_quantized"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [[2, 3], [8, 5, 5], [4, 4, 2], [7]])
def test_every_index_is_a_code_that_quantizes_to_itself(levels, symmetric):
    quantizer = FSQ(levels, symmetric=symmetric)
    indices = torch.arange(quantizer.codebook_size)[None]
    codes = quantizer.indices_to_codes(indices)  # (1, C, K)
    assert codes.abs().max() == 1 and len(codes[0].t().unique(dim=0)) == quantizer.codebook_size
    digits = torch.stack([(channel[:, None] > channel.unique()).sum(1) for channel in codes[0]], dim=-1)
    assert torch.equal(digits_to_indices(digits, levels), indices[0])  # digits grow with the values
    reached = quantizer(20 * torch.randn(1, len(levels), 100, 100))[2].indices  # far out: the outer levels
    assert reached.min() == 0 and reached.max() == quantizer.codebook_size - 1


def test_bits():
    assert FSQ([4, 4, 2]).num_bits == 5
    with pytest.raises(ValueError, match="a codebook of 200 codes has no bits"):
        _ = FSQ([8, 5, 5]).num_bits


@pytest.mark.parametrize("levels", [[8, 1], []])
def test_bad_input(levels):
    with pytest.raises(ValueError, match="levels: .*: give two or more for each channel"):
        FSQ(levels)
