"""PSNR and SSIM against their definitions; codebook usage alone and over two ranks."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from taming.metrics import CodebookUsage, psnr, ssim
from tests.ranks import on_two_ranks


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


def test_usage_and_perplexity_over_batches():
    codes = CodebookUsage(8)
    assert (codes.usage().item(), codes.perplexity().item()) == (0, 0)
    codes.update(torch.tensor([[0, 1], [2, 3]]))
    assert codes.usage().item() == 0.5
    assert codes.perplexity().item() == pytest.approx(4)
    codes.update(torch.tensor([0, 0, 0, 0], dtype=torch.int32))
    assert codes.histogram.tolist() == [5, 1, 1, 1, 0, 0, 0, 0]
    p = torch.tensor([5, 1, 1, 1]) / 8
    assert codes.perplexity().item() == pytest.approx(math.exp(-(p * p.log()).sum().item()))
    codes.reset()
    assert codes.histogram.tolist() == [0] * 8


@pytest.mark.parametrize("wrong", [-1, 8])
def test_indices_outside_the_codebook_are_named(wrong):
    codes = CodebookUsage(8)
    with pytest.raises(ValueError, match=rf"{wrong} is outside 0\.\.7"):
        codes.update(torch.tensor([1, wrong]))
    assert codes.usage().item() == 0


def test_counting_crosses_inference_mode():
    codes = CodebookUsage(4)
    with torch.inference_mode():
        codes.reset()
        codes.update(torch.tensor([1]))
    codes.update(torch.tensor([2]))
    assert codes.histogram.tolist() == [0, 1, 1, 0]


def test_counts_are_in_no_checkpoint_and_no_buffer():
    owner = nn.ModuleDict({"codes": CodebookUsage(4)})
    owner["codes"].update(torch.tensor([1, 1]))
    assert not owner.state_dict() and not list(owner.buffers())
    assert copy.deepcopy(owner)["codes"].histogram.tolist() == [0, 2, 0, 0]
    assert owner.half()["codes"].histogram.dtype == torch.long
    with torch.device("meta"):
        built = CodebookUsage(4)
    built.update(torch.tensor([3]))
    assert built.to_empty(device="cpu").histogram.tolist() == [0, 0, 0, 1]


class Model(nn.Module):
    """Counts inside a wrapped forward, beside a buffer that the wrapper does synchronise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.codes = CodebookUsage(4)

    def forward(self, indices):
        self.codes.update(indices)
        return self.layer(indices[:, None].float())


def _count(rank):
    model = nn.parallel.DistributedDataParallel(Model())
    for indices in ([0, rank], [2 * rank, 3]):  # rank 0 sees 0 0 0 3, rank 1 sees 0 1 2 3
        model(torch.tensor(indices))
    model.module.codes.all_reduce()
    return model.module.codes.histogram


@pytest.mark.slow
def test_every_rank_gets_the_counts_of_all(tmp_path):
    for histogram in on_two_ranks(_count, tmp_path):
        assert histogram.tolist() == [4, 1, 1, 2]


def test_alone_all_reduce_changes_nothing():
    codes = CodebookUsage(4)
    codes.update(torch.tensor([1]))
    codes.all_reduce()
    assert codes.histogram.tolist() == [0, 1, 0, 0]
