"""Label maps as a condition without a network: one label for each cell of the latent grid.

B batch, L labels, H W pixels, h w latent grid (H and W over the downsampling factor).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.conditioners.base import Encoded
from taming.modules.conditioners.label_map import LabelMapConditioner
from taming.parameters import NonNegativeInt, PositiveFloat, PositiveInt


class LabelGrid(LabelMapConditioner, nn.Module):
    """A segmentation as tokens: each cell of `down_factor` x `down_factor` pixels is its most common label.

    It needs no training; a `VQSegmentationModel` keeps more of the shapes within a cell.

    Args:
        n_labels: number of labels, and so of token ids.
        down_factor: pixels per token, in each direction.
        favor: factors by which pixels of some labels count more than those of others, `{1: 4}` for instance;
            without it small and thin objects get no cell.

    Raises:
        ValueError: a label in `favor` that does not exist.
    """

    weights: Tensor

    def __init__(
        self, n_labels: PositiveInt, down_factor: PositiveInt,
        favor: Mapping[NonNegativeInt, PositiveFloat] | None = None,
    ):
        super().__init__()
        self.n_labels, self.factor = n_labels, down_factor
        weights = torch.ones(n_labels, 1, 1)
        for label, factor in (favor or {}).items():
            if label >= n_labels:
                raise ValueError(f"favor: there is no label {label}, they are 0 to {n_labels - 1}")
            weights[label] = factor
        self.register_buffer("weights", weights, persistent=False)

    @property
    def vocab_size(self) -> int:
        """Highest token + 1."""
        return self.n_labels

    def encode(self, c: Tensor) -> Encoded:
        """Turn one-hot maps (B, L, H, W) into (shares (B, L, h, w), None, (None, None, tokens (B, h, w))).

        Raises:
            ValueError: another number of labels, or a side that is not a multiple of `down_factor`.
        """
        if c.ndim != 4 or c.shape[1] != self.n_labels:
            wanted = f"(B, {self.n_labels}, H, W)"
            raise ValueError(f"label maps must have the shape {wanted}, got {tuple(c.shape)}")
        height, width = c.shape[2:]
        if height % self.factor or width % self.factor:
            crop = [max(1, side // self.factor) * self.factor for side in (height, width)]
            raise ValueError(
                f"label maps of {height} x {width} pixels do not divide by down_factor {self.factor}: "
                f"{crop[0]} x {crop[1]} would do"
            )
        shares = F.avg_pool2d(c.float(), self.factor)
        return shares, None, (None, None, (shares * self.weights).argmax(1))

    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens (B, h, w) into one-hot maps (B, L, H, W), constant over each cell."""
        return F.interpolate(self.one_hot(tokens), scale_factor=float(self.factor), mode="nearest")

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Turn tokens (B, h, w) into one-hot maps (B, L, H, W)."""
        return self.decode(tokens)
