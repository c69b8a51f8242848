"""ST-LPIPS: a learned perceptual distance that hardly notices a shift by a pixel.

B batch, C channels, H W pixels; c h w those of a feature map. Images are in [-1, 1].
Source: Ghildyal and Liu 2022, "Shift-tolerant Perceptual Similarity Metric"; the blurred subsampling is that
of Zhang 2019, "Making Convolutional Networks Shift-Invariant Again". Networks and heads were trained together
on human judgements, from random weights; the distance is not on the scale of LPIPS.
"""

from collections import OrderedDict
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.features.lpips_layers import NetLinLayer, ScalingLayer, spatial_average


class BlurDownsample(nn.Module):
    """Blur with the binomial 3x3 filter and keep every second position, with 2 mirrored pixels around."""

    filt: Tensor

    def __init__(self, channels: int):
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", torch.outer(line, line).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c, h, w) to (B, c, (h + 3) // 2, (w + 3) // 2)."""
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=len(self.filt))


def _conv(channels_in: int, channels_out: int, kernel: int, padding: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, kernel, padding=padding), nn.ReLU(inplace=True)]


def _vgg() -> list[list[nn.Module]]:
    """Return the five slices of VGG-16, each after the first begun by a pooling of stride 1 and a blur."""
    slices: list[list[nn.Module]] = []
    channels = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers: list[nn.Module] = [nn.MaxPool2d(2, 1), BlurDownsample(channels)] if slices else []
        for _ in range(convolutions):
            layers += _conv(channels, width, 3, 1)
            channels = width
        slices.append(layers)
    return slices


def _alex() -> list[list[nn.Module]]:
    """Return the five slices of AlexNet, with stride 1 and a blur wherever it had a larger stride."""

    def pool(channels: int) -> list[nn.Module]:
        return [nn.MaxPool2d(3, 1), BlurDownsample(channels)]

    return [
        [nn.Conv2d(3, 64, 11, padding=2), BlurDownsample(64), nn.ReLU(inplace=True)],
        [*pool(64), *_conv(64, 192, 5, 2)],
        [*pool(192), *_conv(192, 384, 3, 1)],
        _conv(384, 256, 3, 1),
        _conv(256, 256, 3, 1),
    ]


# network -> its slices, the channels that each ends with, and the smallest side of an image in pixels
NETS = {"vgg": (_vgg, (64, 128, 256, 512, 512), 18), "alex": (_alex, (64, 192, 384, 256, 256), 21)}


class ShiftTolerantLPIPS(nn.Module):
    """The distance, with the names of the published weights, `vgg_shift_tolerant.pth` and `alex_...`.

    Args:
        net: "vgg" or "alex".
    """

    def __init__(self, net: str = "vgg"):
        super().__init__()
        if net not in NETS:
            raise ValueError(f"ST-LPIPS has no network {net!r}; choose one of {', '.join(NETS)}")
        build, channels, self.smallest = NETS[net]
        self.scaling_layer = ScalingLayer()
        numbers = count()  # layers are numbered through all slices
        self.net = nn.ModuleDict({
            f"slice{i}": nn.Sequential(OrderedDict((str(next(numbers)), layer) for layer in layers))
            for i, layers in enumerate(build(), start=1)
        })
        self.heads = [f"lin{i}" for i in range(len(channels))]
        for name, width in zip(self.heads, channels, strict=True):
            self.add_module(name, NetLinLayer(width, use_dropout=True))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance (B,) of images (B, 3, H, W) in [-1, 1]; 0 for equal ones.

        Raises:
            ValueError: shapes differ or are others, or the images are too small for the network.
        """
        if a.ndim != 4 or a.shape != b.shape or a.shape[1] != 3:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ValueError(f"ST-LPIPS compares two batches (B, 3, H, W) of one shape, got {shapes}")
        height, width = a.shape[2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for ST-LPIPS, which needs {self.smallest}"
            )
        x, y = self.scaling_layer(a), self.scaling_layer(b)
        total = x.new_zeros(len(x))
        for part, name in zip(self.net.values(), self.heads, strict=True):
            x, y = part(x), part(y)  # (B, c, h, w)
            difference = (_unit_length(x) - _unit_length(y)).square()
            total = total + spatial_average(self.get_submodule(name)(difference), keepdim=False)[:, 0]
        return total


def _unit_length(x: Tensor) -> Tensor:
    """Scale features (B, c, h, w) to length 1 at each position, and 0 where they are 0."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
