"""The Inception network that FID, the Inception score and sFID are defined with.

B batch, C channels, h w positions of a feature map. It is Inception-v3 as released for TensorFlow on
2015-12-05, with 1008 classes, under the names of torchvision; its pools differ from torchvision's: averages
leave the padding out, and the last block takes the maximum.
Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision"; Heusel et al. 2017
(FID); Nash et al. 2021, "Generating Images with Sparse Representations" (sFID).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.features.folding import NormalizedConvolutions

SIDE = 299  # pixels
NUM_FEATURES = 2048
NUM_SPATIAL = 2023  # 17 * 17 positions of 7 channels, about as many as features
NUM_CLASSES = 1008  # of which 1000 are in use

Kernel = int | tuple[int, int]


class Conv(NamedTuple):
    """A convolution in a branch, by the name of its module."""

    name: str
    channels: int
    kernel: Kernel
    stride: int = 1


Step = str | Conv | tuple[Conv, Conv]  # a pool, a convolution, or two whose results are concatenated


class InceptionOutputs(NamedTuple):
    """What metrics take from the network.

    Attributes:
        features: (B, 2048), averaged over positions: of FID, precision and recall.
        spatial: (B, 2023), of sFID; positions row by row, then channels.
        logits: (B, 1008).
        logits_without_bias: (B, 1008), which the usual Inception score is computed from.
    """

    features: Tensor
    spatial: Tensor
    logits: Tensor
    logits_without_bias: Tensor


class ConvNormReLU(NormalizedConvolutions):
    """A convolution without bias, batch normalization and ReLU; padded unless it has a stride."""

    norms = {"conv": "bn"}

    def __init__(
        self, channels_in: int, channels_out: int, kernel: Kernel, stride: int = 1, padded: bool = True
    ):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels_in, channels_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h', w')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Mixed(nn.Module):
    """A block of parallel branches, whose results are concatenated in order.

    Args:
        channels_in: of the input.
        branches: the steps of each branch.
    """

    def __init__(self, channels_in: int, *branches: list[Step]):
        super().__init__()
        self.branches: list[list[str | tuple[str, ...]]] = []  # names of pools and modules
        for steps in branches:
            channels = channels_in
            names: list[str | tuple[str, ...]] = []
            for step in steps:
                if isinstance(step, str):
                    names.append(step)
                    continue
                convolutions = (step,) if isinstance(step, Conv) else step
                for name, width, kernel, stride in convolutions:
                    self.add_module(name, ConvNormReLU(channels, width, kernel, stride))
                names.append(tuple(conv.name for conv in convolutions))
                channels = sum(conv.channels for conv in convolutions)
            self.branches.append(names)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C', h', w')."""
        results = []
        for names in self.branches:
            y = x
            for name in names:
                if isinstance(name, str):
                    y = POOLS[name](y)
                else:
                    parts = [self.get_submodule(part)(y) for part in name]
                    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            results.append(y)
        return torch.cat(results, 1)


def _mixed_5(channels_in: int, pooled: int) -> Mixed:
    return Mixed(
        channels_in,
        [Conv("branch1x1", 64, 1)],
        [Conv("branch5x5_1", 48, 1), Conv("branch5x5_2", 64, 5)],
        [Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)],
        ["average", Conv("branch_pool", pooled, 1)],
    )


def _mixed_6a(channels_in: int) -> Mixed:
    return Mixed(
        channels_in,
        [Conv("branch3x3", 384, 3, 2)],
        [Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, 2)],
        ["halve"],
    )


def _mixed_6(channels_in: int, inner: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    return Mixed(
        channels_in,
        [Conv("branch1x1", 192, 1)],
        [Conv("branch7x7_1", inner, 1), Conv("branch7x7_2", inner, row), Conv("branch7x7_3", 192, column)],
        [
            Conv("branch7x7dbl_1", inner, 1),
            Conv("branch7x7dbl_2", inner, column), Conv("branch7x7dbl_3", inner, row),
            Conv("branch7x7dbl_4", inner, column), Conv("branch7x7dbl_5", 192, row),
        ],
        ["average", Conv("branch_pool", 192, 1)],
    )


def _mixed_7a(channels_in: int) -> Mixed:
    return Mixed(
        channels_in,
        [Conv("branch3x3_1", 192, 1), Conv("branch3x3_2", 320, 3, 2)],
        [
            Conv("branch7x7x3_1", 192, 1), Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)), Conv("branch7x7x3_4", 192, 3, 2),
        ],
        ["halve"],
    )


def _mixed_7(channels_in: int, pool: str) -> Mixed:
    row, column = (1, 3), (3, 1)
    return Mixed(
        channels_in,
        [Conv("branch1x1", 320, 1)],
        [Conv("branch3x3_1", 384, 1), (Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column))],
        [
            Conv("branch3x3dbl_1", 448, 1), Conv("branch3x3dbl_2", 384, 3),
            (Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column)),
        ],
        [pool, Conv("branch_pool", 192, 1)],
    )


class FIDInception(nn.Module):
    """The network, with the names of the published weights, `pt_inception-2015-12-05-6726825d.pth`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNormReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNormReLU(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNormReLU(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNormReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNormReLU(80, 192, 3, padded=False)
        self.Mixed_5b = _mixed_5(192, 32)
        self.Mixed_5c = _mixed_5(256, 64)
        self.Mixed_5d = _mixed_5(288, 64)
        self.Mixed_6a = _mixed_6a(288)
        self.Mixed_6b = _mixed_6(768, 128)
        self.Mixed_6c = _mixed_6(768, 160)
        self.Mixed_6d = _mixed_6(768, 160)
        self.Mixed_6e = _mixed_6(768, 192)
        self.Mixed_7a = _mixed_7a(768)
        self.Mixed_7b = _mixed_7(1280, "average")
        self.Mixed_7c = _mixed_7(2048, "maximum")
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> InceptionOutputs:
        """Compute features and logits of images (B, 3, 299, 299).

        Args:
            x: (pixel - 128) / 128, for pixels 0..255 after `resize_bilinear_tf1`.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = POOLS["halve"](x)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = POOLS["halve"](x)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)  # (B, 768, 17, 17), called mixed_6 in TensorFlow; it begins with branch1x1
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 2023), in TensorFlow's order of dimensions
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        features = x.mean((2, 3))  # (B, 2048)
        logits = features @ self.fc.weight.T  # (B, 1008)
        return InceptionOutputs(features, spatial, logits + self.fc.bias, logits)
