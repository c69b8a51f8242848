"""Codebook indices as digits of a mixed radix, and as bits: what a prior over bits models.

An index is a number whose digit i has `levels[i]` values, the first digit the lowest:

    index = sum_i digit_i * levels_0 * ... * levels_{i-1}

Bits are digits of two levels. The first bit of a code is the lowest one of its index ("lowest_first", as in
Open-MAGVIT2 and MaskBit) or the highest one ("highest_first", as in vector-quantize-pytorch).
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

BitOrder = Literal["lowest_first", "highest_first"]
BIT_ORDERS = ("lowest_first", "highest_first")


def num_bits(codebook_size: int) -> int:
    """Return the number of bits of an index.

    Raises:
        ValueError: a size that is not a power of two, so that not every row of bits is an index.
    """
    bits = codebook_size.bit_length() - 1
    if codebook_size < 2 or 1 << bits != codebook_size:
        near = 1 << max(1, round(math.log2(max(codebook_size, 2))))
        raise ValueError(
            f"a codebook of {codebook_size} codes has no bits: give a power of two, {near} for example"
        )
    return bits


def place_values(levels: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the value of each digit of an index, (D,) int64: 1, levels[0], levels[0] * levels[1], ..."""
    values = [math.prod(levels[:i]) for i in range(len(levels))]
    return torch.tensor(values, dtype=torch.int64, device=device)


def indices_to_digits(indices: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the digits (..., D) of indices (...), int64, the lowest first: digit i is in [0, levels[i])."""
    base = torch.tensor(levels, dtype=torch.int64, device=indices.device)
    return indices[..., None] // place_values(levels, indices.device) % base


def digits_to_indices(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """Return the indices (...), int64, of digits (..., D), the lowest first.

    Raises:
        ValueError: another number of digits.
    """
    if digits.shape[-1] != len(levels):
        raise ValueError(f"codes of {digits.shape[-1]} digits, but {len(levels)} levels: {list(levels)}")
    return (digits.long() * place_values(levels, digits.device)).sum(-1)


def indices_to_bits(indices: Tensor, num_bits: int, order: BitOrder = "lowest_first") -> Tensor:
    """Return the bits (..., num_bits) of indices (...), 0 or 1, int64.

    Raises:
        ValueError: an unknown order.
    """
    bits = indices_to_digits(indices, [2] * num_bits)
    return bits.flip(-1) if check_order(order) == "highest_first" else bits


def bits_to_indices(bits: Tensor, order: BitOrder = "lowest_first") -> Tensor:
    """Return the indices (...), int64, of bits (..., num_bits), 0 or 1 of any dtype.

    Raises:
        ValueError: an unknown order.
    """
    bits = bits.flip(-1) if check_order(order) == "highest_first" else bits
    return digits_to_indices(bits, [2] * bits.shape[-1])


def check_order(order: str) -> BitOrder:
    """Return the order of bits, or raise ValueError for one that does not exist."""
    if order not in BIT_ORDERS:
        raise ValueError(f"bit order {order!r}: give one of {', '.join(BIT_ORDERS)}")
    return cast(BitOrder, order)
