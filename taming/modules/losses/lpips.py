"""Learned perceptual similarity: how different two images look, in the features of an ImageNet network.

B batch, C channels, H W pixels; c h w those of a feature map. Images are in [-1, 1].
Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
version 0.1 of its weights.
"""

import logging
import re
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models as tv

from taming.checkpoint import read_checkpoint
from taming.modules.features.lpips_layers import NetLinLayer, ScalingLayer, spatial_average
from taming.modules.frozen import Frozen
from taming.util import lpips_heads

logger = logging.getLogger(__name__)

SECONDS = 10  # that a server may take to answer
REMEDY = "or set perceptual_weight: 0 in lossconfig, which leaves the perceptual loss out"

VggOutputs = namedtuple("VggOutputs", ["relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"])


class MissingWeights(FileNotFoundError):
    """The weights of LPIPS are not on disk.

    Args:
        reason: what is missing, and where it was looked for.
        remedy: how to get it.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}: {remedy}, {REMEDY}")
        self.reason, self.remedy = reason, remedy


class Trunk(NamedTuple):
    """An ImageNet network: builder, weights, the layers to compare, and the smallest side in pixels."""

    build: Callable[..., nn.Module]
    url: str
    taps: tuple[int, ...]  # indices into `features`; each is a ReLU or ends in one
    channels: tuple[int, ...]
    smallest: int

    @property
    def filename(self) -> str:
        """Name of the weights in the torch hub cache."""
        return self.url.rsplit("/", 1)[1]


TRUNKS = {
    "vgg": Trunk(
        tv.vgg16, tv.VGG16_Weights.IMAGENET1K_V1.url, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16
    ),
    "alex": Trunk(
        tv.alexnet, tv.AlexNet_Weights.IMAGENET1K_V1.url, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31
    ),
    "squeeze": Trunk(
        tv.squeezenet1_1, tv.SqueezeNet1_1_Weights.IMAGENET1K_V1.url, (1, 4, 7, 9, 10, 11, 12),
        (64, 128, 256, 384, 384, 512, 512), 17,
    ),
}

# Names as in torchvision ("features.0.weight") or in checkpoints of 2021 ("net.slice1.0.weight",
# "lin0.model.1.weight"), after any prefix; both number the layers alike.
_TRUNK_KEY = re.compile(r"(?:^|\.)(?:features|net\.slice\d)\.(\d+\.(?:\w+\.)*(?:weight|bias))$")
_HEAD_KEY = re.compile(r"(?:^|\.)lin(\d)\.model\.\d\.weight$")


def normalize_tensor(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Scale features (B, c, h, w) to length 1 at each position.

    `eps` is inside the root: outside, as in 2021, the gradient is NaN where all features are 0.
    """
    return x / torch.sqrt(x.square().sum(dim=1, keepdim=True) + eps)


class FeatureNet(nn.Module):
    """An ImageNet network up to its last compared layer, cut into `slice1`, `slice2`, ... after each of them.

    Its weights are uninitialized until `load` or `randomize`.
    """

    def __init__(self, name: str):
        super().__init__()
        trunk = TRUNKS[name]
        self.name, self.N_slices = name, len(trunk.taps)
        # Built without memory: the classifier after the features is far larger, and building it would draw
        # from the global random generator.
        with torch.device("meta"):
            layers = [*trunk.build(weights=None).get_submodule("features").named_children()]
        start = 0
        for number, tap in enumerate(trunk.taps, start=1):
            self.add_module(f"slice{number}", nn.Sequential(OrderedDict(layers[start : tap + 1])))
            start = tap + 1
        self.to_empty(device="cpu").float()

    def forward(self, X: Tensor) -> tuple[Tensor, ...]:
        """Map scaled images (B, 3, H, W) to the features (B, c, h, w) after each slice."""
        features = []
        for part in self.children():
            X = part(X)
            features.append(X)
        return VggOutputs(*features) if self.name == "vgg" else tuple(features)

    def randomize(self, seed: int = 0) -> None:
        """Initialize the weights (He et al. 2015) without the global random generator."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.normal_(layer.bias, std=0.01, generator=generator)

    def load(self, state: Mapping[str, Tensor], source: str) -> None:
        """Copy the weights from a state dict that may hold more; `source` is named in errors."""
        found = {match[1]: value for key, value in state.items() if (match := _TRUNK_KEY.search(key))}
        own = {key.split(".", 1)[1]: value for key, value in self.state_dict().items()}
        _copy_all(own, found, source, "features.")


class vgg16(FeatureNet):
    """The convolutions of VGG-16, in five slices that end at relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.

    Args:
        requires_grad: leave the weights trainable.
        pretrained: weights of ImageNet, from the torch hub cache or torchvision's server; else random ones.
    """

    def __init__(self, requires_grad: bool = False, pretrained: bool = True):
        super().__init__("vgg")
        if pretrained:
            self.load(*_read_trunk("vgg", None))
        else:
            self.randomize()
        self.requires_grad_(requires_grad)


class _FrozenNetwork(nn.Module):
    """The network and the heads, frozen, in float32, under the names of 2021."""

    def __init__(self, name: str, use_dropout: bool):
        super().__init__()
        with torch.device("cpu"):
            self.scaling_layer = ScalingLayer()
        self.net = FeatureNet(name)
        with torch.device("meta"):
            heads = [NetLinLayer(c, use_dropout=use_dropout) for c in TRUNKS[name].channels]
        self.names = [f"lin{i}" for i in range(len(heads))]
        for head_name, head in zip(self.names, heads, strict=True):
            self.add_module(head_name, head.to_empty(device="cpu"))
        self.float().eval().requires_grad_(False)

    def load_heads(self, state: Mapping[str, Tensor], source: str) -> None:
        """Copy the heads' weights from a state dict that may hold more."""
        own, found = (
            {match[1]: value for key, value in weights.items() if (match := _HEAD_KEY.search(key))}
            for weights in (self.state_dict(), state)
        )
        _copy_all(own, found, source, "lin")

    def forward(self, input: Tensor, target: Tensor, bfloat16: bool = False) -> Tensor:
        """Return the sum over layers of the mean weighted squared difference (eq. 1): (B, 1, 1, 1).

        The convolutions compute in bfloat16 if asked, all else in float32.
        """
        total = input.new_zeros(1)
        pair = [self.scaling_layer(x) for x in (input, target)]
        for part, name in zip(self.net.children(), self.names, strict=True):
            with torch.autocast(input.device.type, torch.bfloat16, enabled=bfloat16):
                pair = [part(x) for x in pair]
            a, b = (normalize_tensor(x.float()) for x in pair)
            total = total + spatial_average(self.get_submodule(name)((a - b).square()))
        return total


def _part(name: str) -> property:
    """Return an attribute of the network, which is loaded when it is first read."""
    return property(lambda self: getattr(self.network(), name))


class LPIPS(Frozen):
    """Perceptual distance of two batches of images; frozen, and not part of its owner's state.

    Nothing is read when it is built: network and heads are loaded by the first forward, or when one of their
    attributes is read; see `Frozen`. The network comes from `trunk_path`, else from the torch hub cache,
    else from torchvision's server; the heads from the same file if it holds them, as first-stage checkpoints
    of 2021 do, else from the `lpips` package. Weights that checkpoints of 2021 hold for it are skipped when
    such a file is loaded; `load_trunk_state` takes them.

    Args:
        use_dropout: there for old configs; dropout never acts in evaluation mode.
        net: "vgg", "alex" or "squeeze".
        trunk_path: file with the network's weights, in the names of torchvision or of 2021; the checkpoint of
            a first stage trained in 2021 will do: `loss.perceptual_loss.*` in it is this network.
        random_trunk: a random network, always the same, for tests; needs no file but the heads'.

    Attributes:
        net, scaling_layer, lin0, ..., lin4: the parts of the network, as in 2021; `net(scaling_layer(x))`
            gives the features of images x.
        chns: channels of these features.
    """

    net = _part("net")
    scaling_layer = _part("scaling_layer")
    lin0, lin1, lin2, lin3, lin4 = (_part(f"lin{i}") for i in range(5))

    def __init__(
        self, use_dropout: bool = True, net: str = "vgg", *, trunk_path: str | Path | None = None,
        random_trunk: bool = False,
    ):
        super().__init__()
        if not isinstance(use_dropout, bool):  # it was `net` that came first for a while
            raise ValueError(f"use_dropout must be True or False, got {use_dropout!r}: give net=... by name")
        if net not in TRUNKS:
            raise ValueError(f"LPIPS has no network {net!r}; choose one of {', '.join(TRUNKS)}")
        self.net_name = net
        self.use_dropout = use_dropout
        self.trunk_path = trunk_path
        self.random_trunk = random_trunk
        self.chns = list(TRUNKS[net].channels)

    @classmethod
    def from_pretrained(cls, name: str = "vgg_lpips") -> "LPIPS":
        """Return one with its weights loaded; `name` must be "vgg_lpips"."""
        model = cls()
        model.load_from_pretrained(name)
        return model

    def load_from_pretrained(self, name: str = "vgg_lpips") -> None:
        """Load the weights now instead of at the first forward; `name` must be "vgg_lpips"."""
        if name != "vgg_lpips":
            raise ValueError(f'unknown weights {name!r}: there is "vgg_lpips"')
        self.network()

    def extra_repr(self) -> str:
        """Describe the network, since it is not among the submodules."""
        return f"net={self.net_name!r}, loaded={bool(self._loaded)}"

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Measure the distance of each pair of images, in float32.

        Only where gradients are needed under autocast to bfloat16, the convolutions of the network compute in
        bfloat16 as well; the range of float16 is too small for them.

        Args:
            input, target: (B, C, H, W) in [-1, 1], C = 3, or 1 which is repeated.

        Returns:
            (B, 1, 1, 1) float32, 0 for equal images.

        Raises:
            ValueError: shapes that differ, another number of channels, or images too small for the network.
            FileNotFoundError: the weights are nowhere to be found.
        """
        self._check(input, target)
        self._device = input.device
        network, device = self.network(), input.device.type
        trains = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        with torch.autocast(device, enabled=False):
            pair = (x.float().expand(-1, 3, -1, -1) for x in (input, target))
            return network(*pair, bfloat16=trains and autocast)

    def load_trunk_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the network's weights from `state` instead of files, and the heads' too if it holds them.

        Args:
            state: names of torchvision (`features.0.weight`) or of 2021 (`net.slice1.0.weight`,
                `lin0.model.1.weight`), after any prefix; a whole first-stage checkpoint's state dict will do.
                Other keys are skipped.

        Raises:
            ValueError: a weight is missing or has another shape.
        """
        with torch.inference_mode(False):
            network = self._loaded[0] if self._loaded else _FrozenNetwork(self.net_name, self.use_dropout)
            network.net.load(state, "the given state")
            if _has_heads(state):
                network.load_heads(state, "the given state")
            elif not self._loaded:
                network.load_heads(*_read_heads(self.net_name))
            self._loaded[:] = [network]

    def ensure_weights(self, download: bool = True) -> None:
        """Make sure that the files of the weights are on disk; nothing is read.

        With `download` a missing network is fetched, else only the server is asked for it.

        Raises:
            MissingWeights: a file is missing, and the server cannot be reached.
        """
        _heads_file(self.net_name)
        if not self.random_trunk and not _trunk_file(self.net_name, self.trunk_path).is_file():
            _download(TRUNKS[self.net_name], only_ask=not download)

    def _check(self, input: Tensor, target: Tensor) -> None:
        if input.ndim != 4 or input.shape != target.shape:
            raise ValueError(
                f"LPIPS compares two batches (B, C, H, W) of one shape, got {tuple(input.shape)} and "
                f"{tuple(target.shape)}"
            )
        _, channels, height, width = input.shape
        if channels not in (1, 3):
            raise ValueError(
                f"LPIPS takes images of 1 or 3 channels, got {channels}: give it three of them, {REMEDY}"
            )
        smallest = TRUNKS[self.net_name].smallest
        if min(height, width) < smallest:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for LPIPS with net={self.net_name!r}, "
                f"which needs {smallest}: use larger ones, {REMEDY}"
            )

    def use_random_weights(self) -> None:
        """See `Frozen`; the heads are those of the package."""
        self.random_trunk = True

    def load(self) -> nn.Module:
        """Return the network and the heads, with their weights."""
        network = _FrozenNetwork(self.net_name, self.use_dropout)
        state: Mapping[str, Tensor] = {}
        source = ""
        if self.random_trunk:
            network.net.randomize()
        else:
            state, source = _read_trunk(self.net_name, self.trunk_path)
            network.net.load(state, source)
        network.load_heads(*((state, source) if _has_heads(state) else _read_heads(self.net_name)))
        return network

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:
        """Skip the network's weights of 2021; any other key with this prefix is unexpected."""
        historic = re.compile(r"net\.slice\d\.|lin\d\.model\.|scaling_layer\.(shift|scale)$")
        names = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
        if strict:
            unexpected_keys += [prefix + name for name in names if not historic.match(name)]


def _has_heads(state: Mapping[str, Tensor]) -> bool:
    return any(_HEAD_KEY.search(key) for key in state)


def _copy_all(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str, prefix: str) -> None:
    if not found:
        raise ValueError(
            f"{source} holds no {prefix}*: it is not a file of the network that LPIPS compares in, nor a "
            f"checkpoint of 2021 with loss.perceptual_loss.*: give another file as perceptual_path, {REMEDY}"
        )
    for name, parameter in wanted.items():
        if name not in found:
            raise ValueError(f"{source} holds no {prefix}{name}: is it the file of another network?")
        if found[name].shape != parameter.shape:
            raise ValueError(
                f"{source}: {prefix}{name} has the shape {tuple(found[name].shape)}, not "
                f"{tuple(parameter.shape)}: is it the file of another network?"
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def _heads_file(name: str) -> Path:
    """Return the file of the heads, in the installed `lpips` package."""
    try:
        return lpips_heads(name)
    except FileNotFoundError as error:
        raise MissingWeights(*str(error).split(": ")) from error


def _read_heads(name: str) -> tuple[dict[str, Tensor], str]:
    """Return the state dict of the heads, and its path."""
    path = _heads_file(name)
    return _read(path), str(path)


def _trunk_file(name: str, trunk_path: str | Path | None) -> Path:
    """Return the file of the network: the given one, which must exist, or its place in the cache."""
    if trunk_path is None:
        return Path(torch.hub.get_dir()) / "checkpoints" / TRUNKS[name].filename
    path = Path(trunk_path).expanduser()
    if not path.is_file():
        raise MissingWeights(f"trunk_path of LPIPS: there is no file {path}", "correct the path")
    return path


def _read_trunk(name: str, trunk_path: str | Path | None) -> tuple[dict[str, Tensor], str]:
    """Return the state dict of the network, downloaded if necessary, and where it is from."""
    path = _trunk_file(name, trunk_path)
    if not path.is_file():
        _download(TRUNKS[name])
    return _read(path), str(path)


def _download(trunk: Trunk, only_ask: bool = False) -> None:
    """Download the network's weights into the torch hub cache, or only ask whether the server has them."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / trunk.filename
    try:
        with torch.hub.urlopen(torch.hub.Request(trunk.url, method="HEAD"), timeout=SECONDS):
            pass
        if only_ask:
            return
        logger.info("downloading %s, the network of LPIPS, into %s", trunk.url, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(trunk.url, str(path), trunk.filename.rpartition("-")[2].split(".")[0])
    except (OSError, RuntimeError) as error:  # no network, no place to write, or a wrong hash
        raise MissingWeights(
            f"LPIPS needs {trunk.filename}, which is not in {path.parent} and cannot be downloaded ({error})",
            f"put the file from {trunk.url} there, give its path as trunk_path",
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file of weights or of a checkpoint; nothing in the file is executed."""
    try:
        state = read_checkpoint(path, tensors=("state_dict",))["state_dict"]
    except ValueError as error:
        raise ValueError(f"{error}; if it is an incomplete download, delete it") from error
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
