"""Residuals over scales: each grid of codes adds what the coarser ones left out.

Tian et al. 2024, "Visual autoregressive modeling: scalable image generation via next-scale prediction" (VAR),
algorithm 1. B batch, C channels, h w latent grid, h_k w_k grid of scale k, K codes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.quantizers.base import QuantizerInfo, is_finite
from taming.modules.quantizers.estimators import Estimator, check_estimator, estimate
from taming.modules.quantizers.search import nearest_code
from taming.modules.vqvae.quantize import VectorQuantizer2
from taming.parameters import NonNegativeFloat, NonNegativeInt, PositiveInt, Probability

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class MultiScaleResidualVQ(VectorQuantizer2):
    """One codebook for grids of codes of growing size, whose sum is the latent.

    With f_0 = 0 and r_k = z - f_{k-1}, scale k takes the codes nearest to r_k shrunk to its grid (mean of
    each area), enlarges them (bicubic) and passes them through a convolution phi:

        f_k = f_{k-1} + phi_k(enlarge(e_k)),    phi(x) = (1 - ratio) x + ratio conv(x)
        L = mean_k (|f_k - sg[z]|^2 + beta |sg[f_k] - z|^2)

    A tokenizer of these has a grid of codes for each scale; `info.indices` holds them one after the other,
    (B, sum_k h_k w_k). Keys are those of VAR's checkpoints: `embedding.weight` (K, C) and
    `quant_resi.qresi_ls.N` of the convolutions; its counter `ema_vocab_hit_SV` is not needed.

    Args:
        codebook_size, dim: codes K, and their channels C.
        scales: side of the grid of each scale, growing, for latents of the last side. For others, all grids
            are scaled with them.
        num_convolutions: convolutions phi; each scale takes the one that is next to its place in the list.
        ratio: of the convolution in phi.
        estimator: "straight_through", "rotation" or "diveq".
        beta: weight of the commitment.
        revive_after, kmeans_steps: see `VectorQuantizer2`.

    Raises:
        ValueError: scales that do not grow, or are so few that convolutions have none.
    """

    def __init__(
        self, codebook_size: PositiveInt, dim: PositiveInt, *, scales: Sequence[PositiveInt] = SCALES,
        num_convolutions: PositiveInt = 4, ratio: Probability = 0.5,
        estimator: Estimator = "straight_through", beta: NonNegativeFloat = 0.25,
        revive_after: PositiveInt | None = None, kmeans_steps: NonNegativeInt = 0,
    ):
        super().__init__(
            codebook_size, dim, beta, legacy=False, revive_after=revive_after, kmeans_steps=kmeans_steps
        )
        if list(scales) != sorted(set(scales)) or not scales:
            raise ValueError(
                f"scales: {list(scales)}: give growing sides, the coarsest first, for instance [1, 2, 4]"
            )
        self.scales, self.num_levels = tuple(scales), len(scales)
        self.ratio, self.estimator = ratio, check_estimator(estimator)
        used = len({self._convolution_of(level, num_convolutions) for level in range(len(scales))})
        if used < num_convolutions:  # weights without a gradient, which `ddp` does not allow
            raise ValueError(
                f"num_convolutions: {num_convolutions}, but {len(scales)} scales use {used} of them: set "
                f"num_convolutions={min(2, len(scales))}, or as many as there are scales"
            )
        convolutions = [nn.Conv2d(dim, dim, 3, padding=1) for _ in range(num_convolutions)]
        self.quant_resi = nn.ModuleDict({"qresi_ls": nn.ModuleList(convolutions)})
        self.register_load_state_dict_pre_hook(_drop_counter)

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return the grid (h_k, w_k) of each scale, for latents of `height` x `width`."""
        shares = [side / self.scales[-1] for side in self.scales]
        return [(max(1, int(height * x + 0.5)), max(1, int(width * x + 0.5))) for x in shares]

    def forward(  # type: ignore[override]  # no flags of 2021
        self, z: Tensor
    ) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Quantize z (B, C, h, w): (z_q (B, C, h, w), loss (), (None, None, indices (B, N)))."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.training and self._begins:
                self._begin(_as_rows(z.detach()))
            codes = self.embedding.weight.float()  #                          (K, C)
            total = torch.zeros_like(z)  #                                    (B, C, h, w)
            rows, indices, losses = [], [], []
            for level, grid in enumerate(self.grids(*z.shape[2:])):
                rest = F.interpolate((z - total).detach(), grid, mode="area")  # (B, C, h_k, w_k)
                rows.append(_as_rows(rest))  #                                (B h_k w_k, C)
                indices.append(nearest_code(rows[-1], codes).view(len(z), *grid))
                total = total + self._enlarge(F.embedding(indices[-1], codes), level, z.shape[2:])
                losses.append(self._loss(z, total))
            loss = torch.stack(losses).mean()
            channels_last = z.movedim(1, -1), total.movedim(1, -1)
            z_q = estimate(*channels_last, self.estimator, self.training).movedim(-1, 1)
            z_q = z_q.to(self.embedding.weight.dtype)
        if self.training:
            latents, chosen = torch.cat(rows), torch.cat([grid.flatten() for grid in indices])
            self._after_batch(latents, torch.where(is_finite(latents), chosen, self.n_e))
        return z_q, loss, QuantizerInfo(None, None, torch.cat([grid.flatten(1) for grid in indices], dim=1))

    def indices_to_codes(self, indices: Sequence[Tensor]) -> Tensor:  # type: ignore[override]  # several grids
        """Return the sum over scales (B, C, h, w) of grids of indices (B, h_k, w_k), the coarsest first.

        Raises:
            ValueError: grids that do not belong together.
        """
        found = [tuple(grid.shape[1:]) for grid in indices]
        size = found[-1] if found and len(found[-1]) == 2 else (1, 1)
        if found != self.grids(*size):
            raise ValueError(
                f"{type(self).__name__} takes {self.num_levels} grids of codes, "
                f"{self.grids(self.scales[-1], self.scales[-1])} for example, not {found}"
            )
        with torch.autocast(indices[0].device.type, enabled=False):
            codes = self.embedding.weight.float()
            total = codes.new_zeros(len(indices[0]), codes.shape[1], *size)
            for level, grid in enumerate(indices):
                total = total + self._enlarge(F.embedding(grid, codes), level, size)
        return total.to(self.embedding.weight.dtype)

    def _enlarge(self, codes: Tensor, level: int, size: Sequence[int]) -> Tensor:
        """Return phi of codes (B, h_k, w_k, C) at the size of the latents: (B, C, h, w)."""
        codes = codes.movedim(-1, 1)
        if codes.shape[2:] != tuple(size):
            codes = F.interpolate(codes, tuple(size), mode="bicubic")
        convolutions: Any = self.quant_resi["qresi_ls"]
        convolution = convolutions[self._convolution_of(level, len(convolutions))]
        weight, bias = convolution.weight.float(), convolution.bias.float()
        return (1 - self.ratio) * codes + self.ratio * F.conv2d(codes, weight, bias, padding=1)

    def _convolution_of(self, level: int, count: int) -> int:
        """Return which of the convolutions a scale takes: the one at the nearest place in [0, 1].

        Of VAR's ten scales, two lie halfway between two of four. The last bit of a float64 decides there, so
        that this computes what the authors' code does, in the same order.
        """
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        places = np.linspace(margin, 1 - margin, count)
        return int(np.abs(places - level / max(1, self.num_levels - 1)).argmin())


def _as_rows(z: Tensor) -> Tensor:
    """Return latents (B, C, h, w) as vectors (B h w, C)."""
    return z.movedim(1, -1).flatten(0, 2)


def _drop_counter(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Drop the usage counter of VAR's training from a state dict on its way in: a load hook of torch."""
    state.pop(prefix + "ema_vocab_hit_SV", None)
