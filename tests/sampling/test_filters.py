"""Filters and draws against naive versions, and against the probabilities that they stand for."""

import pytest
import torch

from taming.sampling.filters import draw, filter_logits


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0.*greedy"),
        ({"temperature": float("nan")}, "temperature must be above 0, not nan"),
        ({"top_k": 6}, r"top_k = 6 is outside 1\.\.5"),
        ({"top_k": 0}, "top_k = 0 is outside"),
        ({"top_p": 0.0}, r"top_p = 0\.0 is outside"),
        ({"top_p": 1.5}, r"top_p = 1\.5 is outside"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        filter_logits(torch.zeros(2, 5), **arguments)


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([0.2, 0.0, 0.3, 0.5, 0.0]).log().expand(6, 5)
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform).tolist() == [0, 0, 2, 2, 3, 3]  # never 1 or 4, which are impossible
    assert draw(torch.tensor([[0.0, 1.0]]).log(), torch.zeros(1)).tolist() == [1]


def test_frequencies_of_draws_are_the_probabilities():
    logits, n = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf, 0.5]), 20_000
    drawn = draw(logits.expand(n, -1), torch.rand(n, dtype=torch.float64))
    counts = drawn.bincount(minlength=6).double()
    expected = logits.double().softmax(-1) * n
    assert counts[4] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible].square() / expected[possible]).sum()
    assert chi_square < 18.5  # of 4 degrees of freedom: one in a thousand exceeds it


def test_logits_that_are_no_numbers_draw_a_code_that_exists():
    assert draw(torch.full((1, 5), torch.nan), torch.tensor([0.9]))[0] in range(5)
