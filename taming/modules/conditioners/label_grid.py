"""Label maps as a condition without a network: the commonest label of each cell of the latent grid.

B batch, L labels, H W pixels, h w latent grid (H and W over the downsampling factor).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.colormap import label_colors
from taming.images import from_uint8
from taming.modules.conditioners.label_maps import one_hot_maps
from taming.modules.util import AbstractEncoder


class LabelGrid(AbstractEncoder):
    """A segmentation as tokens: each cell of `down_factor` x `down_factor` pixels is its commonest label.

    It needs no training, where a `VQSegmentationModel` keeps more of the shapes within a cell.

    Args:
        n_labels: number of labels, and so of token ids.
        down_factor: pixels per token, in each direction.
    """

    def __init__(self, n_labels: int, down_factor: int):
        super().__init__()
        self.n_labels, self.factor = n_labels, down_factor

    @property
    def n_tokens(self) -> int:
        """Highest token id + 1."""
        return self.n_labels

    def token_count(self, height: int, width: int) -> int:
        """One token per cell: h * w."""
        return (height // self.factor) * (width // self.factor)

    def encode(self, c: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """One-hot maps (B, L, H, W) to (shares of the labels (B, L, h, w), None, (_, _, tokens (B, h, w))).

        Raises:
            ValueError: another number of labels, or a side that is no multiple of `down_factor`.
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
        return shares, None, (None, None, shares.argmax(1))

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w) to one-hot maps (B, L, H, W), constant over each cell."""
        return F.interpolate(self.one_hot(tokens), scale_factor=float(self.factor), mode="nearest")

    def one_hot(self, ids: Tensor) -> Tensor:
        """Label ids (B, H, W) to maps (B, L, H, W); see `one_hot_maps`."""
        return one_hot_maps(ids, self.n_labels)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Label maps (B, L, H, W) in the colours of `label_colors`: (B, 3, H, W) in [-1, 1]."""
        colors = from_uint8(torch.tensor(label_colors(self.n_labels))).T  # (3, L)
        return F.conv2d(x.float(), colors[:, :, None, None].to(x.device))
