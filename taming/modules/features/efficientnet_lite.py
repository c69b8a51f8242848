"""EfficientNet-Lite0: a small ImageNet classifier, whose published weights need no download.

B batch, C channels, h w positions of a feature map.
Source: Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", in the
variant without squeeze-and-excitation and with ReLU6 that Google released for mobile devices in 2020.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.features.folding import NormalizedConvolutions

# Stages of the network: blocks, kernel, stride of the first block, expansion, channels
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SIDE = 224  # pixels that the network was trained with
NUM_FEATURES = 1280
NUM_CLASSES = 1000
_EPS = 1e-3  # of batch normalization


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded like TensorFlow's "SAME": an odd pixel is at right and bottom."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1):
        symmetric = kernel // 2 if stride == 1 else 0
        super().__init__(channels_in, channels_out, kernel, stride, symmetric, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', ceil(h / stride), ceil(w / stride))."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        if stride > 1:
            height, width = (max(kernel - stride + -size % stride, 0) for size in x.shape[2:])
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class InvertedResidual(NormalizedConvolutions):
    """A block that expands the channels, filters each, and projects (Sandler et al. 2018)."""

    norms = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = channels_in * expansion
        self.expands = expansion > 1
        self.is_residual = stride == 1 and channels_in == channels_out
        if self.expands:
            self._expand_conv = SameConv2d(channels_in, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, _EPS)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, _EPS)
        self._project_conv = SameConv2d(inner, channels_out, 1)
        self._bn2 = nn.BatchNorm2d(channels_out, _EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h / stride, w / stride)."""
        y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return y.add_(x) if self.is_residual else y


class EfficientNetLite0(NormalizedConvolutions):
    """The classifier, with the names of the published weights, `efficientnet-lite0-57934424.pth`."""

    norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self._conv_stem = SameConv2d(3, channels, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(channels, _EPS)
        blocks = []
        for count, kernel, stride, expansion, channels_out in STAGES:
            for i in range(count):
                blocks.append(
                    InvertedResidual(channels, channels_out, kernel, stride if i == 0 else 1, expansion)
                )
                channels = channels_out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(channels, NUM_FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(NUM_FEATURES, _EPS)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features (B, 1280) and logits (B, 1000) of images (B, 3, 224, 224).

        Args:
            x: (pixel - 127) / 128, for 8-bit pixels.
        """
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)  # (B, 32, 112, 112)
        x = self._blocks(x)  # (B, 320, 7, 7)
        x = F.relu6(self._bn1(self._conv_head(x)), inplace=True)  # (B, 1280, 7, 7)
        features = x.mean((2, 3))  # (B, 1280)
        return features, self._fc(features)
