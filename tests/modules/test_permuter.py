"""Permuters: golden orders, and that every one is a permutation with its inverse, for any size it takes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming.modules.transformer import permuter as p

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "permuters_8x8.safetensors")
ALL = [p.Subsample, p.ZCurve, p.SpiralOut, p.SpiralIn, p.Random, p.AlternateParsing]
ANY_SIZE = ALL[1:]


def order(permuter, height, width):
    return permuter(torch.arange(height * width)[None])[0]


@pytest.mark.parametrize("name", [key.removeprefix("out/") for key in GOLDEN if key.startswith("out/")])
def test_golden(name):
    permuter = p.Identity() if name == "Identity" else getattr(p, name)(8, 8)
    assert torch.equal(permuter(GOLDEN["in/index"][None])[0], GOLDEN[f"out/{name}"])


@pytest.mark.parametrize("cls", ALL)
def test_buffers_are_those_of_the_checkpoints(cls):
    state = cls(H=4, W=4).state_dict()
    assert {k: (v.dtype, v.shape) for k, v in state.items()} == {
        "forward_shuffle_idx": (torch.long, (16,)), "backward_shuffle_idx": (torch.long, (16,)),
    }
    assert not p.Identity().state_dict()


@pytest.mark.parametrize(("cls", "size"), [
    *[(cls, size) for cls in ANY_SIZE for size in [(1, 1), (4, 6), (7, 3), (5, 5), (1, 9), (16, 4)]],
    *[(p.Subsample, size) for size in [(1, 1), (4, 4), (4, 8), (24, 8), (1, 9)]],
])
def test_permutes_and_inverts(cls, size):
    permuter, tokens = cls(*size), size[0] * size[1]
    assert sorted(order(permuter, *size).tolist()) == list(range(tokens))
    x = torch.rand(2, tokens, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuter(permuter(x), reverse=True), x)
    assert torch.equal(permuter(permuter(x, reverse=True)), x)


def test_orders_that_can_be_read_off():
    assert order(p.Subsample(2, 4), 2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert order(p.ZCurve(2, 4), 2, 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order(p.AlternateParsing(2, 3), 2, 3).tolist() == [0, 1, 2, 5, 4, 3]
    assert order(p.SpiralOut(3, 3), 3, 3).tolist() == [4, 1, 2, 5, 8, 7, 6, 3, 0]
    assert order(p.SpiralIn(2, 3), 2, 3).tolist() == order(p.SpiralOut(2, 3), 2, 3).tolist()[::-1]


def test_subsample_reads_the_coarsest_grid_first():
    assert order(p.Subsample(8, 16), 8, 16)[:2].tolist() == [0, 8]


def test_identity_takes_any_length_both_ways():
    x = torch.arange(7)[None]
    assert torch.equal(p.Identity()(x), x)
    assert torch.equal(p.Identity()(x, reverse=True), x)


@pytest.mark.parametrize("size", [(6, 6), (8, 12), (3, 5)])
def test_subsample_rejects_sizes_it_cannot_halve(size):
    with pytest.raises(ValueError, match=f"H={size[0]}, W={size[1]}"):
        p.Subsample(*size)


@pytest.mark.parametrize("cls", ALL)
def test_rejects_no_grid_and_another_length(cls):
    with pytest.raises(ValueError, match="H=0, W=4"):
        cls(0, 4)
    with pytest.raises(ValueError, match="16 tokens, got a sequence of 17"):
        cls(4, 4)(torch.zeros(1, 17))
