"""Perceptual distances by name: LPIPS, ST-LPIPS, features, Gram matrices or logits of a frozen classifier.

B batch, C channels, H W pixels, c h w of a feature map. Images are in [-1, 1]; a distance is (B, 1, 1, 1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from taming.modules.features import published
from taming.modules.features.maps import SIDE, FrozenFeatures
from taming.modules.features.shift_tolerant_lpips import NETS, ShiftTolerantLPIPS
from taming.modules.frozen import Frozen
from taming.modules.losses.lpips import LPIPS, TRUNKS, normalize_tensor
from taming.parameters import did_you_mean

CLASSIFIERS = ("efflite0", "resnet50", "convnext_small")
NAMES = (
    *TRUNKS, *(f"st-lpips-{net}" for net in NETS), "efflite0", "efflite0_gram", "resnet50", "resnet50_gram",
    *(f"{name}_logits" for name in CLASSIFIERS),
)


class LogitsDistance(FrozenFeatures):
    """Mean squared difference of a classifier's logits, which sees what an image shows rather than where.

    Source: Weber et al. 2024, "MaskBit: Embedding-free image generation via bit tokens", section 3.1.

    Args:
        name: "efflite0", which needs no download, "resnet50" or "convnext_small".
        weights, random_weights, side: see `FrozenFeatures`.
    """

    def __init__(
        self, name: str, weights: str | None = None, *, random_weights: bool = False, side: int = SIDE
    ):
        super().__init__(name, weights, random_weights=random_weights, side=side, wanted="logits")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Return the distance (B, 1, 1, 1) of images (B, 1 or 3, H, W)."""
        difference = self.logits(input) - self.logits(target)  # (B, classes)
        return difference.square().mean(1)[:, None, None, None]


class FeatureDistance(FrozenFeatures):
    """Mean squared difference of feature maps, each of length 1 at every position, averaged over layers.

    With `gram` it is that of their Gram matrices, C x C, which know textures but no places (Gatys, Ecker and
    Bethge 2016, "Image style transfer using convolutional neural networks", eq. 4).

    Args:
        name: "efflite0", which needs no download, "resnet50", "dinov2_small", ...; see `FrozenFeatures`.
        weights, random_weights, side: see `FrozenFeatures`.
        gram: compare Gram matrices.
    """

    def __init__(
        self, name: str, weights: str | None = None, *, gram: bool = False, random_weights: bool = False,
        side: int = SIDE,
    ):
        super().__init__(name, weights, random_weights=random_weights, side=side)
        self.gram = gram

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Return the distance (B, 1, 1, 1) of images (B, 1 or 3, H, W)."""
        with torch.autocast(input.device.type, enabled=False):
            pairs = zip(super().forward(input), super().forward(target), strict=True)
            return torch.stack([self._distance(a, b) for a, b in pairs]).mean(0)[:, None, None, None]

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare maps (B, c, h, w): (B,)."""
        a, b = (normalize_tensor(x).flatten(2) for x in (a, b))  # (B, c, h * w)
        if self.gram:
            a, b = (x @ x.transpose(1, 2) / x.shape[2] for x in (a, b))  # (B, c, c)
        return (a - b).square().sum(1).mean(1)


class ShiftTolerantDistance(Frozen):
    """ST-LPIPS as a loss; its weights need no download.

    Args:
        net: "vgg" or "alex".
        weights: file of the weights, or a folder with it.
        random_weights: a random network, always the same, for tests.
    """

    def __init__(self, net: str = "vgg", weights: str | None = None, *, random_weights: bool = False):
        super().__init__()
        if net not in NETS:
            raise ValueError(f"ST-LPIPS has no network {net!r}; choose one of {', '.join(NETS)}")
        self.net, self.weights, self.random_weights = net, weights, random_weights

    def load(self) -> nn.Module:
        """Return the network with its weights."""
        if self.random_weights:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(0)
                network = ShiftTolerantLPIPS(self.net)
            for name, weight in network.named_parameters():
                if name.startswith("lin"):
                    weight.data.abs_()  # of the heads, as learned ones are
            return network
        source = published.ST_LPIPS[self.net]
        path = source.ensure(self.weights)
        source.verify(path)
        return source.load(lambda: ShiftTolerantLPIPS(self.net), path)

    def ensure_weights(self, download: bool = True) -> None:
        """Make sure that the file is on disk."""
        if not self.random_weights:
            published.ST_LPIPS[self.net].ensure(self.weights)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the distance (B, 1, 1, 1) of images (B, 1 or 3, H, W)."""
        self._device = input.device
        with torch.autocast(input.device.type, enabled=False):
            pair = (x.float().expand(-1, 3, -1, -1) for x in (input, target))
            return self.network()(*pair)[:, None, None, None]


class WeightedSum(nn.Module):
    """A sum of several distances."""

    def __init__(self, parts: Sequence[nn.Module], weights: Sequence[float]):
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), list(weights)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the sum (B, 1, 1, 1) of the distances of images, each times its weight."""
        pairs = zip(self.parts, self.weights, strict=True)
        terms = [weight * part(input, target) for part, weight in pairs if weight > 0]
        return torch.stack(terms).sum(0)


def perceptual_distance(name: str, path: str | None = None) -> nn.Module:
    """Return the distance of a name.

    Args:
        name: of NAMES: "vgg", "alex", "squeeze" (LPIPS); "st-lpips-vgg", "st-lpips-alex"; "efflite0" or
            "resnet50" (features), with "_gram" behind it (their Gram matrices); "efflite0_logits",
            "resnet50_logits", "convnext_small_logits" (VQGAN+'s).
        path: file of the network's weights; None looks in the usual places, and downloads it otherwise.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in NAMES:
        near = did_you_mean(str(name), NAMES)
        raise ValueError(f"perceptual_net: {name!r} is unknown{near}; choose one of {', '.join(NAMES)}")
    if name in TRUNKS:
        return LPIPS(net=name, trunk_path=path)
    if name.startswith("st-lpips-"):
        return ShiftTolerantDistance(name.removeprefix("st-lpips-"), path)
    if name.endswith("_logits"):
        return LogitsDistance(name.removesuffix("_logits"), path)
    return FeatureDistance(name.removesuffix("_gram"), path, gram=name.endswith("_gram"))


def build_perceptual(
    net: str | Sequence[str], weight: float | Sequence[float], path: str | None,
    make: Callable[[], nn.Module] | None,
) -> tuple[nn.Module, float]:
    """Return the distance that a loss names, or what `make` makes, and its weight; see `VQLPIPS`.

    Raises:
        ValueError: names and weights do not go together, or a name is unknown.
    """
    if make is not None:
        if net != "vgg" or path is not None:
            raise ValueError("perceptual_config goes without perceptual_net and perceptual_path: drop these")
        net, distances = ["perceptual_config"], [make()]
    else:
        net = [net] if isinstance(net, str) else list(net)
        if path is not None and len(net) != 1:
            raise ValueError(f"perceptual_path: {path} is one file, but there are {len(net)} networks")
        distances = [perceptual_distance(name, path) for name in net]
    weights = [float(w) for w in weight] if isinstance(weight, Sequence) else [float(weight)] * len(net)
    if not net or len(weights) != len(net):
        raise ValueError(f"perceptual_weight: {weight}, but perceptual_net: {net}: give as many weights")
    if len(net) == 1:
        return distances[0], weights[0]
    return WeightedSum(distances, weights), float(any(w > 0 for w in weights))
