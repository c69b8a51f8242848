"""Residual vector quantization: each code adds what the ones before it left out, at the same place.

Zeghidour et al. 2021, "SoundStream: an end-to-end neural audio codec", algorithm 1; for images Lee et al.
2022, "Autoregressive image generation using residual quantization". B batch, C channels, h w latent grid,
K codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.quantizers.base import QuantizerInfo
from taming.modules.quantizers.stacked import StackedQuantizer
from taming.modules.quantizers.vector import VQ
from taming.parameters import PositiveInt


class ResidualVQ(StackedQuantizer):
    """A sum of codes, one from each of several codebooks: r_1 = z, r_{i+1} = r_i - sg[e_i], z_q = sum_i e_i.

    The loss is the sum of those of all codebooks. Each has the gradient estimator of its own choice, as in
    vector-quantize-pytorch: with D codes, a latent has D times the gradient of a single one.

    Args:
        codebook_size, dim: codes K of each codebook; channels C.
        num_quantizers: codes at each place.
        shared: one codebook for all.
        combined: see `StackedQuantizer`.
        **options: of each codebook: see `VQ`.
    """

    OPTIONS = VQ

    def __init__(
        self, codebook_size: PositiveInt, dim: PositiveInt, *, num_quantizers: PositiveInt,
        shared: bool = False, combined: bool = False, **options: Any,
    ):
        super().__init__()
        self.stack(codebook_size, num_quantizers, combined)
        self.dim = dim
        books = [VQ(codebook_size, dim, **options) for _ in range(1 if shared else num_quantizers)]
        self.codebooks = nn.ModuleList(books)

    @property
    def code_dim(self) -> int:
        """Channels C of the result."""
        return self.dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Quantize z (B, C, h, w): (z_q (B, C, h, w), loss (), (None, None, indices)); see `pack`."""
        rest, parts, losses, indices, used = z, [], [], [], []
        for book in self._books():
            (part, loss, info), *chosen = book.choose(rest)  #  (B, C, h, w), ()
            rest = rest - part.detach()
            parts.append(part)
            losses.append(loss)
            indices.append(info.indices)
            used.append(chosen)
        if self.training:  # only now: in a batch, a shared codebook is the same for all
            each = self.count // len(self.codebooks)  # codes from one codebook
            for number, book in enumerate(self._books()[::each]):
                book.learn(used[number * each:(number + 1) * each])
        z_q = torch.stack(parts).sum(0)
        return z_q, torch.stack(losses).sum(), QuantizerInfo(None, None, self.pack(indices))

    def indices_to_codes(self, indices: Any) -> Tensor:
        """Return the codes (B, C, ...) of indices (B, ...), or of a list of grids."""
        grids = zip(self._books(), self.unpack(indices), strict=True)
        return torch.stack([book.indices_to_codes(grid) for book, grid in grids]).sum(0)

    def _books(self) -> list[Any]:
        """Return the codebook of each code."""
        return [*self.codebooks] * (self.count // len(self.codebooks))
