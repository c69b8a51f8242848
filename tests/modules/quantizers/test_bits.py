"""Indices as digits and bits, and back, in both orders."""

import pytest
import torch

from taming.modules.quantizers.bits import (
    bits_to_indices,
    digits_to_indices,
    indices_to_bits,
    indices_to_digits,
    num_bits,
    place_values,
)


@pytest.mark.parametrize("levels", [[8, 5, 5], [2, 3], [7], [2] * 18])
def test_digits_are_the_inverse_of_indices_and_count_up(levels):
    size = torch.tensor(levels).prod().item()
    indices = torch.arange(size)
    digits = indices_to_digits(indices, levels)
    assert digits.shape == (size, len(levels)) and digits.dtype == torch.int64
    assert (digits >= 0).all() and (digits < torch.tensor(levels)).all()
    assert len(digits.unique(dim=0)) == size
    assert torch.equal(digits_to_indices(digits, levels), indices)
    assert digits[1].tolist() == [1] + [0] * (len(levels) - 1)  # the first digit is the lowest


def test_the_order_of_bits():
    assert indices_to_bits(torch.tensor(6), 4).tolist() == [0, 1, 1, 0]
    assert indices_to_bits(torch.tensor(1), 4).tolist() == [1, 0, 0, 0]
    assert indices_to_bits(torch.tensor(1), 4, "highest_first").tolist() == [0, 0, 0, 1]
    assert place_values([8, 5, 5]).tolist() == [1, 8, 40]


@pytest.mark.parametrize("order", ["lowest_first", "highest_first"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_bits_are_the_inverse_of_indices(order, dtype):
    indices = torch.randint(1 << 18, (2, 3, 5))
    bits = indices_to_bits(indices, 18, order)
    assert bits.shape == (2, 3, 5, 18) and set(bits.unique().tolist()) == {0, 1}
    assert torch.equal(bits_to_indices(bits.to(dtype), order), indices)


def test_bad_input():
    assert num_bits(1 << 18) == 18 and num_bits(2) == 1
    for size in (1000, 1, 0):
        with pytest.raises(ValueError, match=f"a codebook of {size} codes has no bits: give a power of two"):
            num_bits(size)
    with pytest.raises(ValueError, match="codes of 2 digits, but 3 levels"):
        digits_to_indices(torch.zeros(4, 2), [8, 5, 5])
    for function, arguments in ((indices_to_bits, (torch.tensor(1), 4)), (bits_to_indices, (torch.ones(4),))):
        with pytest.raises(ValueError, match="bit order 'big': give one of lowest_first, highest_first"):
            function(*arguments, "big")
