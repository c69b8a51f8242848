"""Feature maps and logits of images in frozen networks, through which gradients pass.

B batch, C channels, H W pixels, c h w of a feature map. Images are in [-1, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from taming.checkpoint.published_weights import PublishedWeights
from taming.modules.features import efficientnet_lite, published
from taming.modules.features.dinov2 import PATCH, SIZES, DINOv2
from taming.modules.features.folding import fold_norms
from taming.modules.frozen import Frozen

SIDE = 224  # pixels that the networks were trained with
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """A published network: where its file is, how it is built, and what it gives.

    Attributes:
        weights: the file.
        build: makes the network.
        maps: returns the feature maps of scaled images.
        channels: of these maps.
        logits: returns the logits (B, classes) of scaled images; None if it is not a classifier.
        tensorflow: pixels are scaled as (x - 127) / 128, else by ImageNet's mean and deviation.
        multiple: what the sides of its input must be multiples of, in pixels.
        twice_differentiable: whether its gradient has a gradient.
    """

    weights: PublishedWeights
    build: Callable[[], nn.Module]
    maps: Callable[[Any, Tensor], list[Tensor]] | None
    channels: tuple[int, ...] = ()
    logits: Callable[[Any, Tensor], Tensor] | None = None
    tensorflow: bool = False
    multiple: int = 1
    twice_differentiable: bool = True


def _efficientnet_maps(network: efficientnet_lite.EfficientNetLite0, x: Tensor) -> list[Tensor]:
    """Return the maps after the stages with strides 4, 8, 16 and 32."""
    last = {2: 24, 4: 40, 10: 112, 15: 320}  # block -> channels
    x = F.relu6(network._bn0(network._conv_stem(x)))
    maps = []
    for number, block in enumerate(network._blocks):
        x = block(x.clone() if number - 1 in last else x)  # a block may work in place
        if number in last:
            maps.append(x)
    return maps


def _resnet_maps(network: torchvision.models.ResNet, x: Tensor) -> list[Tensor]:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    maps = []
    for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = layer(x)
        maps.append(x)
    return maps


def _dinov2(size: str) -> Source:
    depth, width, _ = SIZES[size]
    blocks = tuple(depth * k // 4 - 1 for k in (1, 2, 3, 4))
    return Source(
        published.DINOV2[size], lambda: DINOv2(size), lambda network, x: network.maps(x, blocks),
        (width,) * 4, multiple=PATCH, twice_differentiable=False,  # fused attention has no second derivative
    )


SOURCES = {
    "efflite0": Source(
        published.EFFICIENTNET_LITE0, efficientnet_lite.EfficientNetLite0, _efficientnet_maps,
        (24, 40, 112, 320), lambda network, x: network(x)[1], tensorflow=True,
    ),
    "resnet50": Source(
        published.RESNET50, torchvision.models.resnet50, _resnet_maps, (256, 512, 1024, 2048),
        lambda network, x: network(x),
    ),
    "convnext_small": Source(
        published.CONVNEXT_SMALL, torchvision.models.convnext_small, None,
        logits=lambda network, x: network(x),
    ),
    **{f"dinov2_{size}": _dinov2(size) for size in SIZES},
}


class FrozenFeatures(Frozen):
    """Feature maps, or logits, of images in a frozen network; see `Frozen`.

    Images are resized to `side` pixels, bilinearly and without aliasing.

    Args:
        name: of SOURCES: "efflite0", which needs no download, "resnet50", "convnext_small", "dinov2_small",
            "dinov2_base" or "dinov2_large".
        weights: the file, or a folder with it; None looks in the torch hub cache and in the packages of the
            extra `metrics-offline`, and downloads the file otherwise.
        random_weights: a random network, always the same, for tests.
        side: pixels of the network's input.
        wanted: "maps" or "logits".

    Attributes:
        channels: c of each map.

    Raises:
        ValueError: there is no such network, it does not give what is wanted, or `side` does not fit it.
    """

    def __init__(
        self, name: str, weights: str | Path | None = None, *, random_weights: bool = False, side: int = SIDE,
        wanted: str = "maps",
    ):
        super().__init__()
        able = [key for key, source in SOURCES.items() if getattr(source, wanted) is not None]
        if name not in able:
            raise ValueError(f"there is no network {name!r} for {wanted}; choose one of {', '.join(able)}")
        self.name, self.weights, self.random_weights, self.side = name, weights, random_weights, side
        if side < 1 or side % self.source.multiple:
            raise ValueError(f"side: {side} must be a multiple of {self.source.multiple} pixels for {name}")
        self.channels = self.source.channels

    @property
    def source(self) -> Source:
        """What the network is."""
        return SOURCES[self.name]

    def extra_repr(self) -> str:
        """Describe the network, since it is not among the submodules."""
        return f"{self.name!r}, loaded={bool(self._loaded)}"

    def load(self) -> nn.Module:
        """Return the network with its weights."""
        if self.random_weights:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(0)
                network = self.source.build().eval()
        else:
            path = self.source.weights.ensure(self.weights)
            self.source.weights.verify(path)
            network = self.source.weights.load(self.source.build, path).eval()
        fold_norms(network)
        return network

    def ensure_weights(self, download: bool = True) -> None:
        """Make sure that the file is on disk; without `download`, a file with an address may be missing."""
        weights = self.source.weights
        if not self.random_weights and (download or weights.url is None):
            weights.ensure(self.weights)

    def scaled(self, images: Tensor) -> Tensor:
        """Resize images (B, 1 or 3, H, W) and scale their pixels: (B, 3, side, side), float32.

        Raises:
            ValueError: another number of channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"{self.name} takes images of 1 or 3 channels, got {tuple(images.shape)}")
        self._device = images.device
        x = images.float()
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        x = (x.expand(-1, 3, -1, -1) + 1.0) / 2.0  # pixels in [0, 1]
        if self.source.tensorflow:
            return (255.0 * x - 127.0) / 128.0
        mean, deviation = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        return (x - mean) / deviation

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return feature maps (B, c, h, w) of images (B, 1 or 3, H, W), float32 also under autocast."""
        maps: Any = self.source.maps
        with torch.autocast(images.device.type, enabled=False):
            x = self.scaled(images)
            return maps(self.network(), x)

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, 1 or 3, H, W), float32 also under autocast."""
        logits: Any = self.source.logits
        with torch.autocast(images.device.type, enabled=False):
            x = self.scaled(images)
            return logits(self.network(), x)
