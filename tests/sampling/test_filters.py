"""Filters and samples against naive versions, and against the probabilities that they stand for."""

import pytest
import torch

from taming.sampling.filters import filter_logits, sample_from


def kept(logits, **arguments):
    return (filter_logits(logits, **arguments) > -torch.inf).tolist()


def naive_nucleus(logits, p):
    """The smallest set of the most likely codes with probability p, code by code."""
    probabilities = logits.double().softmax(-1)
    chosen, total = set(), 0.0
    for code in sorted(range(len(logits)), key=lambda code: (-float(logits[code]), code)):
        if total >= p:
            break
        chosen.add(code)
        total += float(probabilities[code])
    return [code in chosen for code in range(len(logits))]


def test_temperature_divides():
    assert filter_logits(torch.tensor([[1.0, -2.0]]), temperature=0.5).tolist() == [[2.0, -4.0]]


def test_top_k_keeps_the_most_likely_of_each_row_as_they_are():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 1.0, 4.0, 0.0]])
    inf = torch.inf
    want = [[-inf, 3.0, -inf, 2.0], [5.0, -inf, 4.0, -inf]]
    assert filter_logits(logits, top_k=2).tolist() == want


def test_top_k_keeps_ties_with_the_last():
    assert kept(torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0]), top_k=2) == [True, True, True, False, True]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set(p):
    for logits in torch.randn(20, 30) * 3:
        assert kept(logits, top_p=p) == naive_nucleus(logits, p)


def test_top_p_of_equal_probabilities_and_of_one():
    assert sum(kept(torch.zeros(4), top_p=0.5)) == 2
    tail = torch.linspace(0, -60, 50_000)  # sums in float32 would reach 1 before the end
    assert all(kept(tail, top_p=1.0))


def test_top_p_looks_at_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of two codes the first has 4/7 of the probability
    assert kept(logits, top_k=2, top_p=0.55) == [True, False, False, False]
    assert kept(logits, top_p=0.55) == [True, True, False, False]


def test_min_p_keeps_a_share_of_the_most_likely():
    logits = torch.tensor([0.5, 0.26, 0.14, 0.06, 0.04]).log()
    assert kept(logits, min_p=0.2) == [True, True, True, False, False]  # from 0.1 up
    assert kept(logits + 7.0, min_p=0.5) == [True, True, False, False, False]
    assert all(kept(torch.tensor([0.0, -900.0]), min_p=0.0))
    assert kept(torch.tensor([2.0, 3.0, 3.0]), min_p=1.0) == [False, True, True]  # ties stay together
    # a temperature of 2 takes roots: 0.26 / 0.5 becomes 0.72, 0.14 / 0.5 0.53
    assert kept(logits, min_p=0.6, temperature=2.0) == [True, True, False, False, False]


def test_filters_together_keep_what_each_keeps():
    logits = torch.randn(50, 30) * 2
    got = filter_logits(logits, top_k=10, min_p=0.1)
    both = filter_logits(logits, top_k=10).isfinite() & filter_logits(logits, min_p=0.1).isfinite()
    assert torch.equal(got.isfinite(), both) and 0 < both.float().mean() < 0.3
    got = filter_logits(logits, top_k=10, top_p=0.8, min_p=0.1)
    both &= filter_logits(logits, top_k=10, top_p=0.8).isfinite()
    assert torch.equal(got.isfinite(), both)
    assert torch.equal(got[both], logits[both])


def test_each_image_may_have_its_own_settings():
    logits = torch.randn(4, 20) * 2
    logits[1, :5] = logits[1].max()  # ties
    settings = dict(
        temperature=torch.tensor([1.0, 0.7, 2.0, 1.3]), top_k=torch.tensor([20, 3, 7, 1]),
        top_p=torch.tensor([1.0, 0.9, 0.5, 0.3]), min_p=torch.tensor([0.0, 0.3, 0.05, 1.0]),
    )
    for names in (["temperature"], ["top_k"], ["top_p"], ["min_p"], list(settings)):
        chosen = {name: settings[name] for name in names}
        alone = [
            filter_logits(row, **{name: values[i].item() for name, values in chosen.items()})
            for i, row in enumerate(logits)
        ]
        assert torch.equal(filter_logits(logits, **chosen), torch.stack(alone))
    # with several positions of each image, the settings are still the image's
    several = filter_logits(logits[:, None].expand(-1, 3, -1), **settings)
    assert torch.equal(several, filter_logits(logits, **settings)[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0.*greedy"),
        ({"temperature": float("nan")}, "temperature must be above 0, not nan"),
        ({"top_k": 6}, r"top_k = 6 is outside 1\.\.5"),
        ({"top_k": 0}, "top_k = 0 is outside"),
        ({"top_p": 0.0}, r"top_p = 0\.0 is outside"),
        ({"top_p": 1.5}, r"top_p = 1\.5 is outside"),
        ({"min_p": -0.1}, r"min_p = -0\.1 is outside \[0, 1\]"),
        ({"top_k": torch.tensor([3, 6])}, r"top_k = 6 is outside 1\.\.5"),
        ({"temperature": torch.tensor([1.0, 0.0])}, r"temperature must be above 0, not 0\.0"),
        ({"top_p": torch.ones(3)}, r"top_p \(3,\) does not fit logits \(2, 5\): give a number, or 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        filter_logits(torch.zeros(2, 5), **arguments)


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([0.2, 0.0, 0.3, 0.5, 0.0]).log().expand(6, 5)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 1.0 - 2**-53], dtype=torch.float64)
    assert sample_from(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]  # never 1 or 4, which are impossible
    assert sample_from(torch.tensor([[0.0, 1.0]]).log(), torch.zeros(1)).tolist() == [1]


def test_frequencies_of_samples_are_the_probabilities():
    logits, n = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf, 0.5]), 20_000
    sampled = sample_from(logits.expand(n, -1), torch.rand(n, dtype=torch.float64))
    counts = sampled.bincount(minlength=6).double()
    expected = logits.double().softmax(-1) * n
    assert counts[4] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible].square() / expected[possible]).sum()
    assert chi_square < 18.5  # of 4 degrees of freedom: one in a thousand exceeds it


def test_logits_that_are_no_numbers_draw_a_code_that_exists():
    assert sample_from(torch.full((1, 5), torch.nan), torch.tensor([0.9]))[0] in range(5)
