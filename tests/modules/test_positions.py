"""Positions that begin with the places of their tokens."""

import pytest
import torch

from taming.modules.transformer.mingpt import GPT
from taming.modules.transformer.positions import layout_positions


def test_cells_begin_like_those_of_other_grids_at_the_same_place():
    """The nearest condition token of each code, by its position, is that of the cell it lies in."""
    places = layout_positions([1, [4, 8], [8, 16]], 64)
    assert places.shape == (1 + 32 + 128, 64)
    cells, codes = places[1:33], places[33:]
    cells, codes = cells - cells.mean(0), codes - codes.mean(0)  # without what tells the parts apart
    nearest = torch.cdist(codes, cells).argmin(1).view(8, 16)
    want = torch.arange(32).view(4, 8).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(nearest, want)
    assert torch.cdist(places, places).fill_diagonal_(1).min() > 0.01  # no two positions alike


def test_a_transformer_begins_with_them_and_learns_them():
    model = GPT(10, 11, n_layer=1, n_head=2, n_embd=16, layout=[4, [2, 4]])
    assert torch.equal(model.pos_emb[0], layout_positions([4, [2, 4]], 16)[:11])
    assert model.pos_emb.requires_grad
    assert not GPT(10, 11, n_layer=1, n_head=2, n_embd=16).pos_emb.any()
    with torch.device("meta"):
        assert GPT(10, 11, n_layer=1, n_head=2, n_embd=16, layout=[4, [2, 4]]).pos_emb.is_meta


@pytest.mark.parametrize(("layout", "channels", "message"), [
    ([4], 16, "layout has 4 tokens, fewer than block_size: 11"),
    ([20], 18, "n_embd to be a multiple of 4, got 18"),
    ([[2, 3, 4]], 16, r"\[2, 3, 4\] is neither a number of tokens nor"),
    ([0, 20], 16, "0 is neither a number of tokens nor"),
])
def test_layouts_that_cannot_be_are_rejected(layout, channels, message):
    with pytest.raises(ValueError, match=message):
        GPT(10, 11, n_layer=1, n_head=2, n_embd=channels, layout=layout)
