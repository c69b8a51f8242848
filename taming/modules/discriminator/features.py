"""A discriminator that looks at images through a frozen network: only its heads are trained.

Source: Sauer et al. 2021, "Projected GANs converge faster"; with heads on a vision transformer without labels
Sauer et al. 2023, "StyleGAN-T", section 4.1; for tokenizers Li et al. 2024, "ImageFolder".
B batch, C channels, H W pixels, c h w of a feature map.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from taming.modules.discriminator.blur import check_channels
from taming.modules.features.maps import SIDE, FrozenFeatures
from taming.parameters import PositiveInt


class Head(nn.Module):
    """Convolutions of a bounded norm over one feature map, to a logit per position.

    Args:
        channels: c of the map.
        width: features inside.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(channels, width, 1))
        self.norm1 = nn.GroupNorm(math.gcd(width, 8), width)
        self.second = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.norm2 = nn.GroupNorm(math.gcd(width, 8), width)
        self.logit = spectral_norm(nn.Conv2d(width, 1, 1))
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, c, h, w) to logits (B, h * w)."""
        x = self.act(self.norm1(self.first(x)))  # (B, width, h, w)
        x = (x + self.act(self.norm2(self.second(x)))) / math.sqrt(2.0)
        return self.logit(x).flatten(1)


class FeatureDiscriminator(nn.Module):
    """One head per layer of a frozen network; the network itself is in no state dict.

    Args:
        network: "efflite0", which needs no download, "resnet50", "dinov2_small", "dinov2_base" or
            "dinov2_large".
        weights: file of the network's weights, or a folder with it; None looks in the usual places, and
            downloads it otherwise.
        random_weights: a random network, always the same, for tests.
        input_nc: image channels, 3 or 1.
        width: features in a head.
        side: pixels to which images are resized for the network.

    Raises:
        ValueError: an unknown network, or a size that does not fit it.
    """

    def __init__(
        self, network: str = "dinov2_small", weights: str | None = None, *, random_weights: bool = False,
        input_nc: PositiveInt = 3, width: PositiveInt = 64, side: PositiveInt = SIDE,
    ):
        super().__init__()
        if input_nc not in (1, 3):
            raise ValueError(f"disc_in_channels: {input_nc}, but {network} takes images of 1 or 3 channels")
        self.input_nc = input_nc
        self.features = FrozenFeatures(network, weights, random_weights=random_weights, side=side)
        self.twice_differentiable = self.features.source.twice_differentiable
        self.heads = nn.ModuleList(Head(channels, width) for channels in self.features.channels)

    def forward(self, input: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to logits (B, N), one per position of each layer."""
        check_channels(input, self.input_nc)
        maps = self.features(input)  # (B, c, h, w) each
        with torch.autocast(input.device.type, enabled=False):  # for the norms of the weights
            return torch.cat([head(x) for head, x in zip(self.heads, maps, strict=True)], dim=1)
