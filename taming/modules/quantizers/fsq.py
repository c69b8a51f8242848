"""Finite scalar quantization: each channel is rounded to a few levels.

Mentzer et al. 2023, "Finite scalar quantization: VQ-VAE made simple". B batch, D channels of latents and of
results, C = number of `levels`, h w latent grid, K = product of `levels`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from taming.modules.quantizers.base import Quantizer, QuantizerInfo, projection
from taming.modules.quantizers.bits import digits_to_indices, indices_to_digits, num_bits
from taming.modules.quantizers.estimators import estimate
from taming.parameters import PositiveInt

MARGIN = 1e-3  # by which the bounds of a channel lie beyond its outer levels, so that these are reached


class FSQ(Quantizer):
    """Channels bounded by tanh and rounded, with a straight-through gradient; no codebook and no loss.

    Channel i has the values j / floor(L / 2), L = levels[i], with j from -floor(L / 2) to ceil(L / 2) - 1
    (section 3.1), and the digit j + floor(L / 2) of the index; the first channel is the lowest digit: see
    `taming.modules.quantizers.bits`. There are no weights but those of a projection.

    Args:
        levels: number of levels of each channel, 2 or more.
        dim: channels D of the latents, and of the result; others than C need a linear map to levels and one
            back. None: C.
        symmetric: values 2 j / (L - 1) - 1, j from 0 to L - 1, the same on both sides of 0 also if L is
            even (Parker et al. 2024, "Scaling transformers for low-bitrate high-quality speech coding").

    Raises:
        ValueError: fewer than two levels of a channel.
    """

    steps: Tensor  # (C,), levels of each channel; it knows the module's dtype and device

    def __init__(
        self, levels: Sequence[PositiveInt], dim: PositiveInt | None = None, *, symmetric: bool = False
    ):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(
                f"levels: {list(levels)}: give two or more for each channel, for instance [8, 5, 5, 5]"
            )
        self.levels, self.dim, self.symmetric = tuple(levels), dim or len(levels), symmetric
        self.register_buffer("steps", torch.tensor(self.levels, dtype=torch.float32), persistent=False)
        self.project_in = projection(self.dim, len(levels))
        self.project_out = projection(len(levels), self.dim)

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return math.prod(self.levels)

    @property
    def code_dim(self) -> int:
        """Channels D of the result."""
        return self.dim

    @property
    def num_bits(self) -> int:
        """Bits of an index; ValueError if K is not a power of two."""
        return num_bits(self.codebook_size)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Quantize z (B, D, h, w): (z_q (B, D, h, w), 0 (), (None, None, indices (B, h, w)))."""
        dtype = self.steps.dtype
        with torch.autocast(z.device.type, enabled=False):
            z = self.project_in(z.to(dtype).movedim(1, -1)).float()  #    (B, h, w, C)
            bounded = self.bound(z)  #                                    (B, h, w, C), one apart
            digits = bounded.detach().round()
            z_q = self.to_values(estimate(bounded, digits))
            z_q = self.project_out(z_q.to(dtype)).movedim(-1, 1)  #       (B, D, h, w)
            indices = digits_to_indices(digits, self.levels)  #           (B, h, w)
        return z_q, z.new_zeros(()), QuantizerInfo(None, None, indices)

    def bound(self, z: Tensor) -> Tensor:
        """Map latents (..., C) to numbers whose nearest integer is the digit, from 0 to L - 1."""
        steps = self.steps.float()
        if self.symmetric:
            return (steps - 1) * (z.tanh() + 1) / 2
        half = (steps - 1) * (1 + MARGIN) / 2
        offset = 0.5 * (steps % 2 == 0)  # an even number of levels has one more below 0 than above
        return (z + (offset / half).atanh()).tanh() * half - offset + steps.div(2, rounding_mode="floor")

    def to_values(self, digits: Tensor) -> Tensor:
        """Return the values (..., C), from -1 to 1, of digits (..., C)."""
        steps = self.steps.to(digits.dtype)
        if self.symmetric:
            return digits * 2 / (steps - 1) - 1
        half = steps.div(2, rounding_mode="floor")
        return (digits - half) / half

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes (B, D, ...) of indices (B, ...)."""
        digits = indices_to_digits(indices, self.levels).to(self.steps.dtype)
        return self.project_out(self.to_values(digits)).movedim(-1, 1)
