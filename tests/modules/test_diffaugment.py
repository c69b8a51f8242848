"""Differentiable augmentation: golden values and gradients, seeds, strength, bad input."""

import pytest
import torch

from taming.modules.discriminator.diffaugment import (
    DiffAugment,
    brightness,
    contrast,
    cutout,
    saturation,
    translate,
)
from tests.test_golden import read


def transforms(given):
    def color(x):
        x = saturation(brightness(x, given["u_brightness"] - 0.5), 2 * given["u_saturation"])
        return contrast(x, given["u_contrast"] + 0.5)

    def move(x):
        return translate(x, given["translation_mit_x"], given["translation_mit_y"])

    def cut(x):
        return cutout(x, given["cutout_x"], given["cutout_y"], (8, 6))

    return {
        "brightness": lambda x: brightness(x, given["u_brightness"] - 0.5),
        "saturation": lambda x: saturation(x, 2 * given["u_saturation"]),
        "contrast": lambda x: contrast(x, given["u_contrast"] + 0.5),
        "color": color,
        "translation_0.125": move,
        "translation_0.2_transgan": lambda x: translate(
            x, given["translation_tg_x"], given["translation_tg_y"]
        ),
        "cutout_0.5": cut,
        "policy_color,translation,cutout": lambda x: cut(move(color(x))),
    }


def test_golden():
    _, given, want = read("diffaugment")
    cases = transforms(given)
    assert len(want) == 2 * len(cases)
    for name, transform in cases.items():
        x = given["x"].clone().requires_grad_()
        out = transform(x)
        (gradient,) = torch.autograd.grad((out * given["probe"]).sum(), x)
        torch.testing.assert_close(out.detach(), want[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, want[f"grad.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["color", "translation", "cutout", "translation,cutout,color"])
def test_the_same_seed_transforms_alike(policy):
    augment = DiffAugment(policy)
    x = torch.rand(6, 3, 16, 12) * 2 - 1
    before = x.clone()
    one, again, other = (augment(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and torch.equal(x, before)
    assert one.shape == x.shape
    moved = augment(x + torch.zeros(1, requires_grad=True), torch.Generator().manual_seed(1))
    assert torch.equal(moved, one) and moved.requires_grad


def test_ranges():
    """Shifts are -2 to 2, about 0 on average; holes have a quarter of the pixels, or less at borders."""
    torch.manual_seed(0)
    x = torch.zeros(2000, 1, 16, 16)
    x[:, :, 8, 8] = 1.0
    places = DiffAugment("translation")(x).flatten(1).argmax(1)
    rows, columns = places // 16 - 8, places % 16 - 8
    for shift in (rows, columns):
        assert shift.unique().tolist() == [-2, -1, 0, 1, 2] and abs(shift.float().mean()) < 0.15
    holes = (DiffAugment("cutout")(torch.ones(2000, 1, 16, 16)) == 0).sum((1, 2, 3))
    assert holes.max() == 64 and 0 < holes.min() < 64 and len(holes.unique()) > 5
    some = DiffAugment("cutout", cutout_p=0.3)(torch.ones(2000, 1, 16, 16)).amin((1, 2, 3)) == 0
    assert 0.25 < some.float().mean() < 0.35
    whole = [
        (DiffAugment("cutout", cutout_p=0.5, cutout_per_batch=True)(torch.ones(9, 1, 16, 16)) == 0)
        .flatten(1).any(1) for _ in range(40)
    ]
    assert {int(each.sum()) for each in whole} == {0, 9}


def test_nothing_at_zero_strength():
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    off = DiffAugment(color_strength=0.0, translation_ratio=0.0, cutout_p=0.0)
    torch.testing.assert_close(off(x), x)


def test_no_gradient_from_a_hole():
    x = torch.ones(1, 3, 8, 8, requires_grad=True)
    out = cutout(x, torch.tensor([2]), torch.tensor([5]), (4, 4))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient == 0, out == 0) and (out == 0).sum() == 48


def test_unknown_policy():
    with pytest.raises(ValueError, match="policy: 'color,blur' names 'blur'; it must be a list"):
        DiffAugment("color,blur")
