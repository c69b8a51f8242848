"""Several codes at each place of a grid: as one index with several digits, or as grids of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taming.modules.quantizers.base import Quantizer
from taming.modules.quantizers.bits import digits_to_indices, indices_to_digits

MAX_COMBINED = 1 << 24  # combined indices whose use can still be counted, and which a prior can still model


class StackedQuantizer(Quantizer):
    """What quantizers share that choose several codes at each place.

    Attributes:
        size: number of codes K to choose from.
        count: number of codes at a place.
        combined: there is one index at each place, in [0, K^count), whose lowest digit is the first code.
            Otherwise there is a grid of codes for each, that is `count` levels.
    """

    size: int
    count: int
    combined: bool

    def stack(self, size: int, count: int, combined: bool) -> None:
        """Set the attributes.

        Raises:
            ValueError: more combined indices than can be counted.
        """
        if combined and size**count > MAX_COMBINED:
            raise ValueError(
                f"combined: {size} codes, {count} at each place, are {size}^{count} indices, more than "
                f"{MAX_COMBINED}: set combined=False, or choose fewer codes"
            )
        self.size, self.count, self.combined = size, count, combined
        self.num_levels = 1 if combined else count

    @property
    def codebook_size(self) -> int:
        """Number of different indices, of each level."""
        return self.size**self.count if self.combined else self.size

    def pack(self, codes: Sequence[Tensor]) -> Tensor:
        """Return indices (B, h, w), or (B, count * h * w) of several levels, of grids of codes (B, h, w)."""
        if self.combined:
            return digits_to_indices(torch.stack([*codes], dim=-1), [self.size] * self.count)
        return torch.cat([grid.flatten(1) for grid in codes], dim=1)

    def unpack(self, indices: Any) -> Sequence[Tensor]:
        """Return the grids of codes (B, ...) of indices (B, ...), or of a list of grids.

        Raises:
            ValueError: another number of grids.
        """
        if self.combined:
            return indices_to_digits(indices, [self.size] * self.count).unbind(-1)
        if isinstance(indices, Tensor) or len(indices) != self.count:
            found = "one grid" if isinstance(indices, Tensor) else f"{len(indices)} grids"
            name = type(self).__name__
            raise ValueError(f"{name} takes a list of {self.count} grids of codes, not {found}")
        return indices
