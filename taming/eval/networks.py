"""The networks behind the metrics: images in, features or distances out, with the file's hash for the result.

B batch, H W pixels, D features. A result is named after the network that it was computed with: FID is only
what the Inception network of 2015 gives; EfficientNet-Lite0, which an extra installs, gives FD-EffLite0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torchvision
from torch import Tensor, nn

from taming.checkpoint.published_weights import PublishedWeights, sha256_of
from taming.modules.features import dinov2, efficientnet_lite, inception
from taming.modules.features.folding import fold_norms
from taming.modules.features.published import DINOV2, EFFICIENTNET_LITE0, ST_LPIPS
from taming.modules.features.resize import resize_bicubic, resize_bilinear_tf1
from taming.modules.features.shift_tolerant_lpips import ShiftTolerantLPIPS
from taming.modules.losses.lpips import LPIPS, TRUNKS

Entry = TypeVar("Entry")

CHUNK = 8  # images at a time on a CPU: their feature maps are in the cache, and memory is bounded
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Features:
    """What a network says about B images.

    Attributes:
        features: (B, D) float32, what distributions of images are compared in.
        spatial: (B, 2023) float32, of sFID; None unless the network is FID's.
        logits: (B, classes) float32, what a score like the Inception score is computed from, or None.
    """

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class _FrozenNetwork(nn.Module):
    """A network in evaluation mode, without gradients.

    Attributes:
        file: the file that the weights are from.
        sha256: its hash, 64 hexadecimal digits.
    """

    def __init__(self, network: nn.Module, file: str, sha256: str):
        super().__init__()
        self.network, self.file, self.sha256 = network.eval(), file, sha256
        fold_norms(network)
        # Convolutions are faster where the channels of a pixel are adjacent
        self.to(memory_format=torch.channels_last).requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "_FrozenNetwork":
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device


class FeatureNetwork(_FrozenNetwork):
    """A network that describes images by features: `network(images).features`.

    Args:
        network: with its weights.
        file, sha256: where they are from.

    Attributes:
        name: in FEATURE_NETWORKS.
        distance_name: what a Frechet distance of its features is called.
        score_name: what an Inception score of its logits is called; None if it has no logits.
        input_description: the resize and the scale of its input, for results.
        num_features: D.
    """

    name: ClassVar[str]
    distance_name: ClassVar[str]
    score_name: ClassVar[str | None] = None
    input_description: ClassVar[str]
    num_features: ClassVar[int]
    weights: ClassVar[PublishedWeights]

    def forward(self, images: Tensor) -> Features:
        """Compute the features of 8-bit images, (B, 3, H, W) uint8 of any size; in float32, without gradient.

        Raises:
            ValueError: the images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(
                f"{self.name} takes images (B, 3, H, W) of type uint8, got {tuple(images.shape)} of type "
                f"{str(images.dtype).removeprefix('torch.')}"
            )
        count = CHUNK if self.device.type == "cpu" else len(images)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            found = [self.describe(chunk) for chunk in images.split(count)]
        # Concatenated outside of inference mode, whose own tensors could not be changed in place
        spatial, logits = (
            None if getattr(found[0], name) is None else torch.cat([getattr(part, name) for part in found])
            for name in ("spatial", "logits")
        )
        return Features(torch.cat([part.features for part in found]), spatial, logits)

    def describe(self, images: Tensor) -> Features:
        """Resize and scale images (B, 3, H, W), uint8 on any device, and apply the network."""
        raise NotImplementedError

    @classmethod
    def build(cls) -> nn.Module:
        """Return the network, to be filled from the file."""
        raise NotImplementedError


class EffLite0Features(FeatureNetwork):
    """EfficientNet-Lite0: pooled features, and logits of ImageNet's 1000 classes."""

    name = "efflite0"
    distance_name = "FD-EffLite0"
    score_name = "IS-EffLite0"
    input_description = "224x224, bicubic as Pillow's, 8 bits; (x - 127) / 128"
    num_features = efficientnet_lite.NUM_FEATURES
    weights = EFFICIENTNET_LITE0

    def describe(self, images: Tensor) -> Features:
        x = resize_bicubic(images, efficientnet_lite.SIDE).to(self.device)
        x = x.to(torch.float32, memory_format=torch.channels_last)
        features, logits = self.network(x.sub_(127).div_(128))
        return Features(features, logits=logits)

    @classmethod
    def build(cls) -> nn.Module:
        return efficientnet_lite.EfficientNetLite0()


class InceptionFeatures(FeatureNetwork):
    """FID's Inception: 2048 features, sFID's 2023, and logits without bias, as the Inception score of ADM."""

    name = "inception"
    distance_name = "FID"
    score_name = "IS"
    input_description = "299x299, bilinear as TensorFlow 1's, without antialias; (x - 128) / 128"
    num_features = inception.NUM_FEATURES
    weights = PublishedWeights(
        "FID's Inception",
        ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
        "6726825d",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
    )

    def describe(self, images: Tensor) -> Features:
        x = resize_bilinear_tf1(images.to(self.device), inception.SIDE)
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        found = self.network(x)
        return Features(found.features, found.spatial, found.logits_without_bias)

    @classmethod
    def build(cls) -> nn.Module:
        return inception.FIDInception()


def imagenet_input(images: Tensor, device: torch.device) -> Tensor:
    """Resize images (B, 3, H, W), uint8, to 224x224 and scale them by ImageNet's mean and deviation."""
    x = resize_bicubic(images, dinov2.SIDE).to(device).float() / 255
    mean, deviation = (x.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return (x - mean) / deviation


class DINOv2Features(FeatureNetwork):
    """DINOv2 ViT-L/14: the output of the class token."""

    name = "dinov2"
    distance_name = "FD-DINOv2"
    input_description = "224x224, bicubic as Pillow's, 8 bits; ImageNet's mean and deviation"
    num_features = dinov2.SIZES["large"][1]
    weights = DINOV2["large"]

    def describe(self, images: Tensor) -> Features:
        return Features(self.network(imagenet_input(images, self.device)))

    @classmethod
    def build(cls) -> nn.Module:
        return dinov2.DINOv2("large")


class ResNet101Features(FeatureNetwork):
    """torchvision's ResNet-101: the classifier of rejection sampling in the paper's Table 4."""

    name = "resnet101"
    distance_name = "FD-ResNet101"
    score_name = "IS-ResNet101"
    input_description = "224x224, bicubic as Pillow's, 8 bits; ImageNet's mean and deviation"
    num_features = 2048
    weights = PublishedWeights(
        "torchvision's ResNet-101", ("resnet101-63fe2227.pth",), "63fe2227",
        "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    )

    def describe(self, images: Tensor) -> Features:
        network: Any = self.network
        x = imagenet_input(images, self.device)
        x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = layer(x)
        features = network.avgpool(x).flatten(1)
        return Features(features, logits=network.fc(features))

    @classmethod
    def build(cls) -> nn.Module:
        return torchvision.models.resnet101()


FEATURE_NETWORKS: dict[str, type[FeatureNetwork]] = {
    cls.name: cls for cls in (EffLite0Features, InceptionFeatures, DINOv2Features, ResNet101Features)
}


def load_feature_network(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """Load a network of FEATURE_NETWORKS.

    Args:
        name: "efflite0", "inception", "dinov2" or "resnet101".
        weights: the file, or a folder with it. None looks in the torch hub cache and in the package of the
            extra `metrics-offline`, and downloads the file otherwise.
        device: where to put the network.

    Raises:
        FileNotFoundError: the file is not here and cannot be downloaded; the message says how to get it.
        ValueError: an unknown name, or the file is of another network; the message shows its hash.
    """
    cls = _choose(FEATURE_NETWORKS, name, "network for features")
    path = cls.weights.ensure(weights)
    digest = cls.weights.verify(path)
    return cls(cls.weights.load(cls.build, path), str(path), digest).to(device)


class PerceptualDistance(_FrozenNetwork):
    """A network that says how different two images look: `distance(a, b)`.

    Attributes:
        name: what the number is called.
    """

    def __init__(self, network: nn.Module, name: str, file: str, sha256: str):
        super().__init__(network, file, sha256)
        self.name = name

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance (B,) of images (B, 3, H, W) in [-1, 1]; float32, without gradient.

        Raises:
            ValueError: shapes differ or are others, or the images are too small for the network.
        """
        if a.shape != b.shape:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ValueError(f"{self.name} compares images in pairs, got {shapes}")
        count = CHUNK if a.device.type == "cpu" else max(len(a), 1)
        pairs = zip(a.split(count), b.split(count), strict=True)
        with torch.inference_mode(), torch.autocast(a.device.type, enabled=False):
            found = [self.network(x.float(), y.float()).flatten() for x, y in pairs]
        return torch.cat(found)  # outside of inference mode: an ordinary tensor


# name -> what the number is called, the network in it, and the file
PERCEPTUAL_DISTANCES: dict[str, tuple[str, str, PublishedWeights]] = {
    "st-lpips-vgg": ("ST-LPIPS-VGG", "vgg", ST_LPIPS["vgg"]),
    "st-lpips-alex": ("ST-LPIPS-Alex", "alex", ST_LPIPS["alex"]),
    "lpips": (
        "LPIPS-VGG", "vgg",
        PublishedWeights("LPIPS", (TRUNKS["vgg"].filename,), "397923af", TRUNKS["vgg"].url),
    ),
}


def load_perceptual_distance(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> PerceptualDistance:
    """Load a distance of PERCEPTUAL_DISTANCES.

    Args:
        name: "st-lpips-vgg", "st-lpips-alex" or "lpips", which is LPIPS 0.1 with VGG-16.
        weights: as of `load_feature_network`; for "lpips" a first-stage checkpoint of 2021 will do as well.
        device: where to put the network.

    Raises:
        FileNotFoundError, ValueError: as `load_feature_network`.
    """
    label, net, published = _choose(PERCEPTUAL_DISTANCES, name, "perceptual distance")
    path = published.ensure(weights)
    if name == "lpips":
        # Checkpoints hold the same network, which LPIPS takes out of them
        digest = published.verify(path) if path.name in published.names else sha256_of(path)
        lpips = LPIPS(net=net, trunk_path=path)
        lpips.network()  # read now, not at the first pair of images
        return PerceptualDistance(lpips, label, str(path), digest).to(device)
    digest = published.verify(path)
    network = published.load(lambda: ShiftTolerantLPIPS(net), path)
    return PerceptualDistance(network, label, str(path), digest).to(device)


def default_networks(weights: str | Path | None = None) -> tuple[str, str]:
    """Choose a network for features and a perceptual distance that need no download: their names.

    They are FID's Inception and LPIPS where their files are, else those that the extra `metrics-offline`
    installs.

    Args:
        weights: a folder to look into; None looks in the torch hub cache.
    """

    def is_here(published: PublishedWeights) -> bool:
        try:
            return published.find(weights) is not None
        except FileNotFoundError:
            return False

    return (
        "inception" if is_here(InceptionFeatures.weights) else "efflite0",
        "lpips" if is_here(PERCEPTUAL_DISTANCES["lpips"][2]) else "st-lpips-vgg",
    )


def _choose(entries: Mapping[str, Entry], name: str, what: str) -> Entry:
    if name not in entries:
        raise ValueError(f"there is no {what} {name!r}; choose one of {', '.join(entries)}")
    return entries[name]
