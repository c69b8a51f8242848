"""Product quantization: groups of channels, each with a codebook of its own.

Jegou et al. 2011, "Product quantization for nearest neighbor search". B batch, C channels, G groups,
h w latent grid, K codes of each group.
"""

from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.quantizers.base import QuantizerInfo
from taming.modules.quantizers.stacked import StackedQuantizer
from taming.modules.quantizers.vector import VQ
from taming.parameters import PositiveInt


class GroupedVQ(StackedQuantizer):
    """Codes of C / G channels side by side: K^G combinations for G K C / G numbers.

    The loss is the mean of those of all groups.

    Args:
        codebook_size, dim: codes K of each group; channels C.
        groups: number of groups G, which divides C.
        combined: see `StackedQuantizer`.
        **options: of each codebook: see `VQ`.

    Raises:
        ValueError: groups that do not divide the channels.
    """

    OPTIONS = VQ

    def __init__(
        self, codebook_size: PositiveInt, dim: PositiveInt, *, groups: PositiveInt, combined: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.stack(codebook_size, groups, combined)
        if dim % groups:
            raise ValueError(f"groups: {groups} do not divide dim: {dim} channels: choose others")
        self.dim = dim
        self.groups = nn.ModuleList(VQ(codebook_size, dim // groups, **options) for _ in range(groups))

    @property
    def code_dim(self) -> int:
        """Channels C of the result."""
        return self.dim

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Quantize z (B, C, h, w): (z_q (B, C, h, w), loss (), (None, None, indices)); see `pack`."""
        chunks = z.chunk(self.count, dim=1)
        results = [group(chunk) for group, chunk in zip(self.groups, chunks, strict=True)]
        z_q = torch.cat([result[0] for result in results], dim=1)
        loss = torch.stack([result[1] for result in results]).mean()
        return z_q, loss, QuantizerInfo(None, None, self.pack([result[2].indices for result in results]))

    def indices_to_codes(self, indices: Any) -> Tensor:
        """Return the codes (B, C, ...) of indices (B, ...), or of a list of grids."""
        grids: Any = zip(self.groups, self.unpack(indices), strict=True)
        return torch.cat([group.indices_to_codes(grid) for group, grid in grids], dim=1)
