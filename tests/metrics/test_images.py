"""PSNR and SSIM against their definitions."""

import math

import numpy as np
import pytest
import torch

from taming.metrics import psnr, ssim


def pair(*shape, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(*shape, generator=generator) * 2 - 1
    return a, (a + noise * torch.randn(*shape, generator=generator)).clamp(-1, 1)


def direct_ssim(a, b, side=11):
    """Wang et al. 2004, written down window by window in float64, for pixels 0..255 as in the paper."""
    x = np.arange(side) - (side - 1) / 2
    w = np.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for p, q in zip(*((x.double().numpy() + 1) * 127.5 for x in (a, b)), strict=True):  # channels
        for i in range(p.shape[0] - side + 1):
            for j in range(p.shape[1] - side + 1):
                u, v = p[i:i + side, j:j + side], q[i:i + side, j:j + side]
                mu, mv = (w * u).sum(), (w * v).sum()
                vu, vv = (w * (u - mu) ** 2).sum(), (w * (v - mv) ** 2).sum()
                cov = (w * (u - mu) * (v - mv)).sum()
                values.append((2 * mu * mv + c1) * (2 * cov + c2) / ((mu**2 + mv**2 + c1) * (vu + vv + c2)))
    return np.mean(values)


def test_psnr_has_the_value_of_its_definition():
    a = torch.zeros(3, 3, 4, 5)
    b = torch.stack([a[0] + 0.2, a[1] + 2.0, a[2]])  # the second is clamped to 1
    values = psnr(a, b)
    assert values.shape == (3,)
    assert values[:2].tolist() == pytest.approx([10 * math.log10(4 / 0.04), 10 * math.log10(4)], rel=1e-5)
    assert values[2].item() == math.inf


@pytest.mark.parametrize("shape", [(2, 3, 16, 13), (1, 1, 11, 20)])
def test_ssim_equals_the_direct_computation(shape):
    a, b = pair(*shape)
    want = [direct_ssim(x, y) for x, y in zip(a, b, strict=True)]
    assert max(want) < 0.98
    assert ssim(a, b).tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(("shape", "side"), [((1, 2, 8, 16), 7), ((1, 2, 9, 9), 9), ((1, 1, 1, 4), 1)])
def test_ssim_cuts_the_window_for_small_images(shape, side):
    a, b = pair(*shape)
    assert ssim(a, b).item() == pytest.approx(direct_ssim(a[0], b[0], side), abs=1e-5)


def test_ssim_of_equal_and_of_opposite_images():
    a, _ = pair(2, 3, 16, 16)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    assert ssim(a, -a).max() < 0


def test_ssim_is_float32_under_autocast():
    a, b = pair(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ssim(a, b)
    assert torch.equal(got, ssim(a, b))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_shapes_must_agree(metric):
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\) and \(1, 3, 16, 15\)"):
        metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 15))
