"""MaskBit: a bidirectional transformer that reads and predicts the bits of codes, without a table of codes.

Weber et al. 2024, "MaskBit: embedding-free image generation via bit tokens". Codes are those of tokenizers
whose indices are bits: LFQ, BSQ, FSQ of levels that are powers of two.

B batch, N codes of b bits, G groups of b / G bits, V = 2^(b / G) values of a group, M condition tokens,
D = n_embd channels. The first bit is the lowest one of the index.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.priors.masked import MaskedPrior, init_weights, start_positions
from taming.modules.quantizers.bits import digits_to_indices, indices_to_bits, indices_to_digits, num_bits
from taming.modules.transformer.positions import Part
from taming.parameters import PositiveInt, Probability


def bits_per_group(vocab_size: int, groups: int) -> int:
    """Return how many bits of a code each of the groups has.

    Raises:
        ValueError: a number of codes that is not a power of two, or groups that do not divide the bits.
    """
    bits = num_bits(vocab_size)
    if bits % groups:
        divisors = ", ".join(str(n) for n in range(1, bits + 1) if bits % n == 0)
        raise ValueError(
            f"bit_groups: {groups} does not divide the {bits} bits of {vocab_size} codes: give one of "
            f"{divisors}"
        )
    return bits // groups


def signed_bits(parts: Tensor, masked: Tensor, bits: int) -> Tensor:
    """Return bits (..., G * bits) of groups (..., G): 1 and -1, and 0 where they are masked (..., G)."""
    signs = 2.0 * indices_to_bits(parts, bits) - 1.0  # (..., G, bits)
    return signs.masked_fill(masked[..., None], 0.0).flatten(-2)


class _Attention(nn.Module):
    """Attention and its layer norm."""

    def __init__(self, n_embd: int, n_head: int, dropout: float):
        super().__init__()
        self.mha = nn.MultiheadAttention(n_embd, n_head, dropout, batch_first=True)
        self.norm = nn.LayerNorm(n_embd, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class _FeedForward(nn.Module):
    """A perceptron and its layer norm."""

    def __init__(self, n_embd: int, n_inner: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_embd, n_inner), nn.GELU(), nn.Linear(n_inner, n_embd))
        self.norm = nn.LayerNorm(n_embd, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class MaskBit(MaskedPrior):
    """p(codes | condition) over groups of bits, each of which is masked on its own.

    Codes come first in the sequence, then the condition tokens. The names are those of the published
    generators.

    Args:
        vocab_size: number of codes, a power of two.
        condition_vocab_size, block_size: C, M + N - 1; see `MaskedPrior`.
        bit_groups: G, a divisor of the number of bits.
        n_layer, n_head, n_embd: number of blocks, heads, channels D.
        n_inner: channels inside the perceptrons; 4 * D when None.
        dropout: rate, of embeddings, attention and results.
        pre_norm: layer norms at the inputs of the blocks' parts, in place of after the sums.
        layout: see `GPT`; condition first, as there.
        training: arguments of `MaskedPrior`: masks, losses, likelihood.

    Raises:
        ValueError: a number of codes that is not a power of two; groups that do not divide bits; heads that
            do not divide the channels; a layout with fewer tokens than `block_size` + 1.
    """

    def __init__(
        self, vocab_size: PositiveInt, condition_vocab_size: PositiveInt, block_size: PositiveInt,
        bit_groups: PositiveInt = 2, n_layer: PositiveInt = 24, n_head: PositiveInt = 16,
        n_embd: PositiveInt = 1024, n_inner: PositiveInt | None = None, dropout: Probability = 0.1,
        pre_norm: bool = False, *, layout: Sequence[Part] | None = None, **training: Any,
    ):
        super().__init__(vocab_size, condition_vocab_size, block_size, **training)
        self.bits, self.groups = bits_per_group(vocab_size, bit_groups), bit_groups
        self.group_size = 2**self.bits
        if n_embd % n_head:
            raise ValueError(f"n_embd: {n_embd} is not a multiple of n_head: {n_head}")
        self.pre_norm = pre_norm
        self.class_emb = nn.Embedding(condition_vocab_size, n_embd)
        self.input_proj = nn.Linear(bit_groups * self.bits, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size + 1, n_embd))  # the last code is read, too
        self.first_layer = nn.Sequential(nn.LayerNorm(n_embd, eps=1e-12), nn.Dropout(dropout))
        self.transformer: Any = nn.Module()
        self.transformer.layers = nn.ModuleList([
            nn.ModuleList([_Attention(n_embd, n_head, dropout), _FeedForward(n_embd, n_inner or 4 * n_embd)])
            for _ in range(n_layer)
        ])
        if pre_norm:
            self.norm_after_transformer = nn.LayerNorm(n_embd, eps=1e-12)
        self.last_layer = nn.Sequential(
            nn.Linear(n_embd, n_embd), nn.GELU(), nn.LayerNorm(n_embd, eps=1e-12)
        )
        self.prediction_layer = nn.Linear(n_embd, self.groups * self.group_size)
        self.drop = nn.Dropout(dropout)
        self.apply(init_weights)
        start_positions(layout and [layout[-1], *layout[:-1]], self.pos_emb)

    def split(self, codes: Tensor) -> Tensor:
        """Return the groups (B, N, G) of codes (B, N), that of the lowest bits first."""
        return indices_to_digits(codes, [self.group_size] * self.groups)

    def join(self, parts: Tensor) -> Tensor:
        """Return the codes (B, N) of groups (B, N, G)."""
        return digits_to_indices(parts, [self.group_size] * self.groups)

    def part_logits(self, parts: Tensor, masked: Tensor, condition: Tensor) -> Tensor:
        bits = signed_bits(parts, masked, self.bits).to(self.input_proj.weight.dtype)  # (B, N, b)
        x = self.input_proj(bits)  #                                      (B, N, D)
        x = torch.cat((x, self.class_emb(condition)), dim=1)  #           (B, N + M, D)
        x = self.first_layer(x + self.pos_emb[:, : x.shape[1]])
        for layer in self.transformer.layers:
            for part in layer:
                if self.pre_norm:
                    x = x + self.drop(part(part.norm(x)))
                else:
                    x = part.norm(x + self.drop(part(x)))
        if self.pre_norm:
            x = self.norm_after_transformer(x)
        x = self.last_layer(x[:, : parts.shape[1]])
        return self.prediction_layer(x).unflatten(-1, (self.groups, self.group_size))  # (B, N, G, V)
