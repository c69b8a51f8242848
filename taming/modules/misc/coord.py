"""Coordinates as a condition: where in the large image a training crop lies.

B batch, H W pixels, h w latent grid (H and W over the downsampling factor).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.conditioners.base import AbstractEncoder, Encoded, Size
from taming.parameters import PositiveInt


class CoordStage(AbstractEncoder):
    """Quantize a map of coordinates in [0, 1] into `n_embed` steps on the latent grid, like a first stage.

    Source: Esser, Rombach and Ommer 2021, "Taming Transformers", its sliding-window models.

    Args:
        n_embed: number of steps, and so of token ids.
        down_factor: pixels per latent, in each direction.
    """

    kind = "coordinates"
    remedy = "coordinates are set by the size of the image: leave them out"

    def __init__(self, n_embed: PositiveInt, down_factor: PositiveInt):
        super().__init__()
        self.n_embed = n_embed
        self.factor = self.down_factor = down_factor

    @property
    def vocab_size(self) -> int:
        """Highest token + 1."""
        return self.n_embed

    def validate(self, value: Tensor) -> None:
        """Raise ValueError for a coordinate outside [0, 1]."""
        if value.device.type == "cpu" and value.numel():
            lowest, highest = torch.stack(value.aminmax()).tolist()
            if not (0.0 <= lowest and highest <= 1.0):
                raise ValueError(
                    f"coordinates must lie in [0, 1], got values from {lowest:g} to {highest:g}"
                )

    def encode(self, c: Tensor) -> Encoded:
        """Turn coordinates (B, 1, H, W) in [0, 1] into steps (B, 1, h, w), as floats and as long indices.

        Raises:
            ValueError: more than one channel, a side below `down_factor`, or, on the CPU, a value outside
                [0, 1].
        """
        if c.ndim != 4 or c.shape[1] != 1:
            raise ValueError(f"coordinates must have the shape (B, 1, H, W), got {tuple(c.shape)}")
        height, width = c.shape[2:]
        size = height // self.down_factor, width // self.down_factor  # rounded down, as in 2021
        if min(size) == 0:
            raise ValueError(
                f"coordinates of {height} x {width} pixels are smaller than down_factor {self.down_factor}: "
                f"give at least {self.down_factor} x {self.down_factor}"
            )
        self.validate(c)
        steps = self.n_embed * F.interpolate(c.float(), size=size, mode="area")
        # Only a coordinate within half a step of 1 would round up to n_embed, which is not a token id.
        quant = steps.round().clamp(0, self.n_embed - 1)
        return quant, None, (None, None, quant.long())

    def decode(self, c: Tensor) -> Tensor:
        """Turn steps (B, 1, h, w) back into coordinates (B, 1, H, W), constant over each latent's pixels."""
        return F.interpolate(c / self.n_embed, scale_factor=float(self.down_factor), mode="nearest")

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Turn steps (B, h, w) into coordinates (B, 1, H, W)."""
        return self.decode(tokens[:, None].float())

    def to_rgb(
        self, x: Tensor, size: Size | None = None, *, names: Sequence[str] = (),
        plot: Callable[[Tensor, Size], Tensor] | None = None,
    ) -> Tensor:
        """Return coordinates (B, 1, H, W) as they are: gray images in 0..1."""
        return x

    def default(self, size: Size) -> Tensor:
        """Return coordinates of an image that is not part of a larger one: (1, 1, H, W) in raster order."""
        height, width = size
        return (torch.arange(height * width) / (height * width)).view(1, 1, height, width)

    def resize(self, c: Tensor, size: Size) -> Tensor:
        """Resize coordinates (B, 1, H, W) by bilinear interpolation, which stays within their range."""
        return F.interpolate(c, size, mode="bilinear")
