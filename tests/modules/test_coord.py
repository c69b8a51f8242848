"""Coordinates as condition tokens: golden values, and the limits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming.modules.misc.coord import CoordStage

GOLDEN = Path(__file__).parents[1] / "golden"


def coordinates(height, width):
    return torch.arange(height * width).reshape(1, 1, height, width) / (height * width)


def test_golden():
    case = load_file(GOLDEN / "coord_stage.safetensors")
    stage = CoordStage(64, 4).eval()
    quant, loss, info = stage.encode(case["in/c"])
    assert torch.equal(quant, case["out/quant"])
    assert torch.equal(info[2], case["out/indices"])
    assert torch.equal(stage.decode(quant), case["out/decoded"])
    assert loss is None


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_one_token_per_latent_and_none_beyond_the_last(height, width):
    stage = CoordStage(n_embed=8, down_factor=8)
    indices = stage.encode(coordinates(height, width))[2][2]
    assert indices[0].numel() == stage.num_tokens(height, width) == height * width // 64
    assert stage.vocab_size == 8
    ones = stage.encode(torch.ones(1, 1, 8, 8))
    assert ones[2][2].item() == 7 and ones[0].item() == 7
    assert not stage.state_dict()


def test_decoding_is_within_half_a_step():
    stage, c = CoordStage(n_embed=1024, down_factor=4), torch.rand(2, 1, 4, 6).repeat_interleave(4, 2)
    c = c.repeat_interleave(4, 3)
    decoded = stage.decode(stage.encode(c)[0])
    assert decoded.shape == c.shape
    assert (decoded - c).abs().max() <= 1 / 1024


@pytest.mark.parametrize(("c", "message"), [
    (torch.zeros(1, 3, 8, 8), r"\(1, 3, 8, 8\)"),
    (torch.full((1, 1, 8, 8), 1.5), r"to 1\.5"),
    (torch.full((1, 1, 8, 8), -0.5), r"from -0\.5"),
    (torch.full((1, 1, 8, 8), torch.nan), "nan"),
    (torch.zeros(1, 1, 3, 13), "3 x 13.*at least 4 x 4"),
])
def test_refuses_with_the_values(c, message):
    with pytest.raises(ValueError, match=message):
        CoordStage(64, 4).encode(c)


def test_sides_that_do_not_divide_are_rounded_down_as_in_2021():
    assert CoordStage(64, 4).encode(torch.rand(1, 1, 10, 13))[0].shape == (1, 1, 2, 3)


def test_a_whole_picture_runs_from_its_first_pixel_to_its_last():
    c = CoordStage(8, 1).default((2, 4))
    assert c.shape == (1, 1, 2, 4)
    assert c.flatten().tolist() == [i / 8 for i in range(8)]
