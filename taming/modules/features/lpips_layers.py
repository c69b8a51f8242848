"""Layers of LPIPS, for all networks that it can compare in.

B batch, c h w of a feature map. Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features
as a Perceptual Metric".
"""

import torch
from torch import Tensor, nn


class ScalingLayer(nn.Module):
    """Map images from [-1, 1] to the range of the ImageNet networks: mean 0 and deviation 1 per color."""

    shift: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        # (2 * mean - 1) and (2 * deviation) of ImageNet, rounded as the heads were trained with
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, inp: Tensor) -> Tensor:
        """Scale images (B, 3, H, W)."""
        return (inp - self.shift) / self.scale


class NetLinLayer(nn.Module):
    """A head: one weight per feature channel, as a 1x1 convolution; dropout acted in its training only."""

    def __init__(self, chn_in: int, chn_out: int = 1, use_dropout: bool = False):
        super().__init__()
        dropout = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*dropout, nn.Conv2d(chn_in, chn_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Weigh and add up feature differences (B, c, h, w): (B, 1, h, w)."""
        return self.model(x)


def spatial_average(x: Tensor, keepdim: bool = True) -> Tensor:
    """Average over the positions of (B, c, h, w)."""
    return x.mean((2, 3), keepdim=keepdim)
