"""Pixels that are kept where nothing is generated, and how they fade into the generated ones."""

import pytest
import torch

from taming.inference.completion import keep_pixels


def completed(kept, f):
    """Decoded images are all 1, originals all 0: what comes out is the weight of the decoded image."""
    height, width = kept.shape
    ones = torch.ones(2, 3, height * f, width * f)
    weights = keep_pixels(ones, torch.zeros(1, 3, *ones.shape[2:]), kept, f)
    assert (weights == weights[:1, :1]).all()
    return weights[0, 0]


@pytest.mark.parametrize("f", [1, 2, 4, 16])
def test_a_kept_upper_half(f):
    kept = torch.tensor([[True], [True], [False]]).expand(3, 5)
    weights = completed(kept, f)
    assert (weights[2 * f :] == 1).all()  # generated: decoded pixels alone
    assert (weights[: 2 * f - f // 2] == 0).all()  # kept, and no border near: those of the original
    fade = weights[2 * f - f // 2 : 2 * f, 0]
    steps = torch.arange(1, f // 2 + 1) / (f // 2 + 1)
    assert torch.allclose(fade, steps)


def test_a_generated_code_in_the_middle():
    kept = torch.ones(3, 3, dtype=torch.bool)
    kept[1, 1] = False
    weights = completed(kept, 4)
    assert (weights[4:8, 4:8] == 1).all()
    assert torch.allclose(weights[4, :4], torch.tensor([0.0, 0.0, 1 / 3, 2 / 3]))
    assert torch.equal(weights, weights.T) and torch.equal(weights, weights.flip(0))


def test_kept_pixels_are_exact():
    images, originals = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    kept = torch.tensor([[True, True], [False, False]])
    found = keep_pixels(images, originals, kept, 8)
    assert torch.equal(found[:, :, :4], originals[:, :, :4])
    assert torch.equal(found[:, :, 8:], images[:, :, 8:])
