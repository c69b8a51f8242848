"""Images as a condition: depth, edges, the limbs of a figure, a low resolution.

B batch, C channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from taming.modules.conditioners.base import Conditioner, Size, check_condition_size


class ImageConditioner(Conditioner):
    """What an autoencoder of images is as a condition stage: its codes are the tokens.

    Attributes:
        channels: C of the images that it encodes.
    """

    kind = "image"
    remedy = "give an image of it, or take it from a data set (scripts/make_samples.py)"
    channels: int = 3

    def to_rgb(
        self, x: Tensor, size: Size | None = None, *, names: Sequence[str] = (),
        plot: Callable[[Tensor, Size], Tensor] | None = None,
    ) -> Tensor | None:
        """Return images of one or three channels (B, 1 or 3, H, W) as they are; None for others."""
        return x if x.shape[1] in (1, 3) else None

    def from_user(self, value: Any, size: Size) -> Tensor:
        """Take an image (C, H, W) in [-1, 1] of that size."""
        if value is None:
            raise ValueError(self.remedy)
        check_condition_size(value.shape, size, "the image of the condition")
        if value.shape[0] != self.channels:
            raise ValueError(f"the image of the condition has {value.shape[0]} channels, not {self.channels}")
        return value[None]

    def resize(self, c: Tensor, size: Size) -> Tensor:
        """Resize images (B, C, H, W) by bicubic interpolation with antialiasing, within [-1, 1]."""
        return F.interpolate(c, size, mode="bicubic", antialias=True).clamp(-1.0, 1.0)
