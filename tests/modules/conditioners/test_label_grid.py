"""LabelGrid: label maps to one token per cell and back."""

import pytest
import torch

from taming.modules.conditioners.label_grid import LabelGrid

IDS = torch.tensor([[[0, 0, 2, 1], [0, 1, 2, 1], [3, 3, 1, 1], [3, 0, 0, 1]]])


def test_a_cell_is_its_most_common_label():
    stage = LabelGrid(4, 2)
    shares, _, (_, _, tokens) = stage.encode(stage.one_hot(IDS))
    assert tokens.tolist() == [[[0, 1], [3, 1]]]  # two of each in one cell: the lower id
    assert shares[0, :, 0, 0].tolist() == [0.75, 0.25, 0.0, 0.0]
    assert (stage.vocab_size, stage.num_tokens(4, 6), stage.factor) == (4, 6, 2)


def test_a_label_can_be_favored():
    maps = LabelGrid(4, 2).one_hot(IDS)
    favored = {f: LabelGrid(4, 2, {1: f}).encode(maps)[2][2][0, 0].tolist() for f in (2.9, 3.1)}
    assert favored == {2.9: [0, 1], 3.1: [1, 1]}  # one pixel of four
    assert LabelGrid(4, 2, {2: 0.1, 0: 5}).encode(maps)[2][2].tolist() == [[[0, 1], [0, 0]]]
    with pytest.raises(ValueError, match="favor: there is no label 4, they are 0 to 3"):
        LabelGrid(4, 2, {1: 2, 4: 2})


def test_tokens_come_back_as_maps_of_their_cells():
    stage = LabelGrid(4, 2)
    tokens = torch.randint(4, (2, 3, 5))
    maps = stage.decode(tokens)
    assert maps.shape == (2, 4, 6, 10)
    assert torch.equal(stage.encode(maps)[2][2], tokens)
    assert torch.equal(maps.argmax(1), tokens.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert stage.to_rgb(maps).shape == (2, 3, 6, 10) and stage.to_rgb(maps).abs().max() <= 1


@pytest.mark.parametrize(("maps", "message"), [
    (torch.zeros(1, 3, 4, 4), r"\(B, 4, H, W\), got \(1, 3, 4, 4\)"),
    (torch.zeros(1, 4, 5, 4), "5 x 4 pixels do not divide by down_factor 2: 4 x 4 would do"),
])
def test_other_maps_are_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        LabelGrid(4, 2).encode(maps)
    with pytest.raises(ValueError, match="label id 4 is outside 0..3"):
        LabelGrid(4, 1).one_hot(torch.tensor([[[0, 4]]]))
