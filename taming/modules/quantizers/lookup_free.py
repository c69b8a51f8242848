"""Lookup-free quantization: a code is a row of signs, and its index the number with those bits.

B batch, D channels of latents and of results, C bits of an index, h w latent grid, K = 2^C codes, N = B h w.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.quantizers.base import Quantizer, QuantizerInfo, projection
from taming.modules.quantizers.bits import (
    BitOrder,
    bits_to_indices,
    check_order,
    indices_to_bits,
    num_bits,
)
from taming.modules.quantizers.entropy import EPS, bit_entropies
from taming.modules.quantizers.estimators import Estimator, check_estimator, estimate
from taming.parameters import NonNegativeFloat, PositiveFloat, PositiveInt


class LFQ(Quantizer):
    """Signs of the latents (Yu et al. 2023, "Language model beats diffusion: tokenizer is key", section 3.1).

    L = beta |z - sg[e]|^2 + w (mean_n H(p_n) - diversity H(mean_n p_n)), with e = sign(z), +1 or -1, and p_n
    the softmax over all codes of -|z_n - e|^2 / temperature. The entropies are exact and take 2^C + 2 N
    2^(C/2) values, not N 2^C: see `bit_entropies`. There are no weights but those of a projection; the
    buffers that checkpoints of others have in this place are not needed.

    Args:
        codebook_size: number of codes K, a power of two.
        dim: channels D of the latents, and of the result; others than C need a linear map to bits and one
            back. None: C.
        bit_order: whether the first channel is the lowest bit of an index or the highest.
        estimator: "straight_through", "rotation" or "diveq".
        beta: weight of the commitment.
        entropy_weight: w; 0 leaves the entropies out. They are of training only.
        entropy_temperature: temperature of the softmax.
        diversity: weight of the batch's entropy against that of each vector.
        entropy_eps: added to mean_n p_n in its logarithm.

    Raises:
        ValueError: a size that is not a power of two.
    """

    scale: Tensor  # (), size of each channel of a code; it knows the module's dtype and device

    def __init__(
        self, codebook_size: PositiveInt, dim: PositiveInt | None = None, *,
        bit_order: BitOrder = "lowest_first", estimator: Estimator = "straight_through",
        beta: NonNegativeFloat = 0.25, entropy_weight: NonNegativeFloat = 0.1,
        entropy_temperature: PositiveFloat = 0.01, diversity: NonNegativeFloat = 1.0,
        entropy_eps: NonNegativeFloat = EPS,
    ):
        super().__init__()
        self.num_bits = num_bits(codebook_size)
        self.dim = dim or self.num_bits
        self.bit_order, self.estimator = check_order(bit_order), check_estimator(estimator)
        self.beta, self.entropy_weight, self.diversity = beta, entropy_weight, diversity
        self.entropy_temperature, self.entropy_eps = entropy_temperature, entropy_eps
        self.register_buffer("scale", torch.tensor(self.size_of_channel()), persistent=False)
        self.project_in = projection(self.dim, self.num_bits)
        self.project_out = projection(self.num_bits, self.dim)
        self.register_load_state_dict_pre_hook(_drop_buffers)

    def size_of_channel(self) -> float:
        """Return the size of each channel of a code."""
        return 1.0

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return 2**self.num_bits

    @property
    def code_dim(self) -> int:
        """Channels D of the result."""
        return self.dim

    def to_sphere(self, z: Tensor) -> Tensor:
        """Return latents (..., C) as they are compared with codes."""
        return z

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Quantize z (B, D, h, w): (z_q (B, D, h, w), loss (), (None, None, indices (B, h, w)))."""
        dtype = self.scale.dtype
        with torch.autocast(z.device.type, enabled=False):
            z = self.project_in(z.to(dtype).movedim(1, -1)).float()  #    (B, h, w, C)
            z = self.to_sphere(z)
            bits = z > 0  #                                               (B, h, w, C)
            codes = self.bits_to_codes(bits).float()
            loss = torch.stack([*self.loss_terms(z, codes).values()]).sum()
            z_q = estimate(z, codes, self.estimator, self.training)
            z_q = self.project_out(z_q.to(dtype)).movedim(-1, 1)  #       (B, D, h, w)
        return z_q, loss, QuantizerInfo(None, None, bits_to_indices(bits, self.bit_order))

    def loss_terms(self, z: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the loss by name, for latents and their codes (B, h, w, C)."""
        terms = {"commitment": self.beta * F.mse_loss(z, codes)}
        if self.training and self.entropy_weight > 0:
            sample, batch = self.entropies(z)
            terms["entropy"] = self.entropy_weight * (sample - self.diversity * batch)
        return terms

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean entropy of the choice of each latent (..., C), and that of the batch, in nats."""
        rows = z.flatten(0, -2)
        return bit_entropies(rows, self.entropy_temperature, self.size_of_channel(), self.entropy_eps)

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """Return the codes (..., C), + or - `scale`, of bits (..., C), in the order of channels."""
        return (2 * bits.to(self.scale.dtype) - 1) * self.scale

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Return the codes (B, D, ...) of indices (B, ...)."""
        codes = self.bits_to_codes(indices_to_bits(indices, self.num_bits, self.bit_order))
        return self.project_out(codes).movedim(-1, 1)


class BSQ(LFQ):
    """Signs of latents on the unit sphere (Zhao et al. 2024, "Image and video tokenization with binary
    spherical quantization").

    As `LFQ`, with z / |z| in place of z, and channels of a code of size 1 / sqrt(C), so that its length is 1.
    """

    def size_of_channel(self) -> float:
        """Return the size of each channel of a code."""
        return self.num_bits**-0.5

    def to_sphere(self, z: Tensor) -> Tensor:
        """Return latents (..., C) as they are compared with codes: of unit length."""
        return F.normalize(z, dim=-1)


def _drop_buffers(
    module: LFQ, state: dict[str, Any], prefix: str, _metadata: dict[str, Any], _strict: bool,
    _missing: list[str], _unexpected: list[str], errors: list[str],
) -> None:
    """Drop what other projects store for a quantizer without weights, and check the order of bits by it.

    This is a load hook of torch.
    """
    one_bit = torch.eye(module.num_bits, dtype=torch.int64)
    values = bits_to_indices(one_bit, module.bit_order).tolist()  # of each channel's bit
    for name in ("mask", "bits_to_indices"):
        stored = state.pop(prefix + name, None)
        if stored is not None and stored.long().tolist() != values:
            errors.append(
                f"{prefix}{name}: bits with the values {stored.long().tolist()}, but the quantizer has "
                f"{values}: set codebook_size and bit_order to those of the checkpoint"
            )
    state.pop(prefix + "codebook", None)
