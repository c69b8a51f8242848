"""Coordinates as a condition: where in the large picture a training crop lies.

B batch, H W pixels, h w latent grid (H and W over the downsampling factor).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.util import AbstractEncoder


class CoordStage(AbstractEncoder):
    """Quantize a map of coordinates in [0, 1] into `n_embed` steps on the latent grid, like a first stage.

    Source: Esser, Rombach and Ommer 2021, "Taming Transformers", its sliding-window models.

    Args:
        n_embed: number of steps, and so of token ids.
        down_factor: pixels per latent, in each direction.
    """

    def __init__(self, n_embed: int, down_factor: int):
        super().__init__()
        self.n_embed = n_embed
        self.down_factor = down_factor

    @property
    def n_tokens(self) -> int:
        """Highest token id + 1."""
        return self.n_embed

    @property
    def factor(self) -> int:
        """Pixels per token, in each direction."""
        return self.down_factor

    def token_count(self, height: int, width: int) -> int:
        """One token per latent: h * w."""
        return (height // self.down_factor) * (width // self.down_factor)

    def encode(self, c: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Turn coordinates (B, 1, H, W) in [0, 1] into steps (B, 1, h, w), as floats and as long indices.

        Raises:
            ValueError: not one channel, a side no multiple of `down_factor`, or a value outside [0, 1].
        """
        if c.ndim != 4 or c.shape[1] != 1:
            raise ValueError(f"coordinates must have the shape (B, 1, H, W), got {tuple(c.shape)}")
        height, width = c.shape[2:]
        size = height // self.down_factor, width // self.down_factor
        if min(size) == 0 or (height % self.down_factor, width % self.down_factor) != (0, 0):
            crop = tuple(max(1, n) * self.down_factor for n in size)
            raise ValueError(
                f"coordinates of {height} x {width} pixels do not divide by down_factor {self.down_factor}: "
                f"{crop[0]} x {crop[1]} would do"
            )
        lowest, highest = torch.stack(c.aminmax()).tolist()
        if not (0.0 <= lowest and highest <= 1.0):
            raise ValueError(f"coordinates must lie in [0, 1], got values from {lowest:g} to {highest:g}")
        steps = self.n_embed * F.interpolate(c.float(), size=size, mode="area")
        # Only a coordinate within half a step of 1 would round up to n_embed, which is no token id.
        quant = steps.round().clamp(0, self.n_embed - 1)
        return quant, None, (None, None, quant.long())

    def decode(self, c: Tensor) -> Tensor:
        """Turn steps (B, 1, h, w) back into coordinates (B, 1, H, W), constant over each latent's pixels."""
        return F.interpolate(c / self.n_embed, scale_factor=float(self.down_factor), mode="nearest")


def whole_picture(height: int, width: int) -> Tensor:
    """Coordinates of a picture that is not part of a larger one: (1, 1, H, W) in [0, 1), in raster order."""
    return (torch.arange(height * width) / (height * width)).view(1, 1, height, width)
