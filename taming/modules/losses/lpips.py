"""Learned perceptual similarity: how different two images look, in the features of an ImageNet network.

B batch, C channels, H W pixels; c h w the same of a feature map. Images are in [-1, 1].
Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
version 0.1 of its weights.
"""

import importlib.util
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models as tv

from taming.checkpoint.legacy_pickle import read_pickled

logger = logging.getLogger(__name__)

REMEDY = "or set perceptual_weight: 0 in lossconfig, which leaves the perceptual loss out"


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
# "lin0.model.1.weight"), below any prefix; both number the layers alike.
_TRUNK_KEY = re.compile(r"(?:^|\.)(?:features|net\.slice\d)\.(\d+\.(?:\w+\.)*(?:weight|bias))$")
_HEAD_KEY = re.compile(r"(?:^|\.)lin(\d)\.model\.\d\.weight$")


class ScalingLayer(nn.Module):
    """Turn [-1, 1] into what the ImageNet networks saw: mean 0 and deviation 1 per colour."""

    def __init__(self):
        super().__init__()
        # (2 * mean - 1) and (2 * deviation) of ImageNet, rounded as the heads were trained with.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, input: Tensor) -> Tensor:
        """Scale images (B, 3, H, W)."""
        return (input - self.shift) / self.scale


class NetLinLayer(nn.Module):
    """A head: one weight per feature channel, as a 1x1 convolution; dropout acted in its training only."""

    def __init__(self, chn_in: int, chn_out: int = 1, use_dropout: bool = False):
        super().__init__()
        dropout = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*dropout, nn.Conv2d(chn_in, chn_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Weigh and add up feature differences (B, c, h, w): (B, 1, h, w)."""
        return self.model(x)


def normalize_tensor(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Scale features (B, c, h, w) to length 1 at each place.

    `eps` is inside the root: outside, as it was, the gradient is not a number where all features are 0.
    """
    return x / torch.sqrt(x.square().sum(dim=1, keepdim=True) + eps)


def spatial_average(x: Tensor, keepdim: bool = True) -> Tensor:
    """Average over the places of (B, c, h, w)."""
    return x.mean((2, 3), keepdim=keepdim)


class _FrozenNetwork(nn.Module):
    """The trunk and the heads, with weights, frozen, in float32."""

    def __init__(self, name: str, use_dropout: bool):
        super().__init__()
        trunk = TRUNKS[name]
        self.taps = trunk.taps
        # Built without memory: the classifier behind the features is far larger, and its making draws from
        # the global generator.
        with torch.device("meta"):
            self.features = trunk.build(weights=None).features[: trunk.taps[-1] + 1]
            self.heads = nn.ModuleList(NetLinLayer(c, use_dropout=use_dropout) for c in trunk.channels)
        self.to_empty(device="cpu")
        with torch.device("cpu"):
            self.scaling_layer = ScalingLayer()
        self.float().eval().requires_grad_(False)

    def randomize(self, seed: int = 0) -> None:
        """Draw the trunk's weights (He et al. 2015), without touching the global generator."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.normal_(layer.bias, std=0.01, generator=generator)

    def load_trunk(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take the trunk's weights from a state dict that may hold more."""
        found = {match[1]: value for key, value in state.items() if (match := _TRUNK_KEY.search(key))}
        _copy_all(self.features.state_dict(), found, source, "features.")

    def load_heads(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take the heads' weights from a state dict that may hold more."""
        found = {match[1]: value for key, value in state.items() if (match := _HEAD_KEY.search(key))}
        _copy_all({str(i): head.model[-1].weight for i, head in enumerate(self.heads)}, found, source, "lin")

    def extract(self, images: Tensor) -> list[Tensor]:
        """Give the normalised features of images (B, 3, H, W): a list of (B, c, h, w), one per tap."""
        x = self.scaling_layer(images)
        features = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                features.append(normalize_tensor(x))
        return features

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Sum the weighted squared differences, averaged over places, of all layers (eq. 1): (B, 1, 1, 1)."""
        pairs = zip(self.heads, self.extract(input), self.extract(target), strict=True)
        return sum(spatial_average(head((a - b).square())) for head, a, b in pairs)


class LPIPS(nn.Module):
    """Perceptual distance of two batches of images; frozen, and invisible to its owner.

    Nothing is read when it is built: trunk and heads are loaded by the first forward. The trunk comes from
    `trunk_path`, else from the torch hub cache, else torchvision's server; the heads from the same file if it
    holds them, as first-stage checkpoints of 2021 do, else from the `lpips` package. The network is held
    outside of PyTorch's registry, so that no optimiser, no state dict and no distributed wrapper sees it, and
    no cast reaches it: it always computes in float32, on the device of its input, in evaluation mode. The
    weights that checkpoints of 2021 hold for it are passed over when such a file is loaded;
    `load_trunk_state` takes them.

    Args:
        net: "vgg", "alex" or "squeeze".
        use_dropout: there for old configs; dropout never acts in evaluation mode.
        trunk_path: file with the trunk's weights, in the names of torchvision or of 2021; the checkpoint of a
            first stage trained in 2021 will do: `loss.perceptual_loss.*` in it is this network.
        random_trunk: a random trunk, always the same, for tests; needs no file but the heads'.
    """

    def __init__(
        self, net: str = "vgg", use_dropout: bool = True, *, trunk_path: str | Path | None = None,
        random_trunk: bool = False,
    ):
        super().__init__()
        if net not in TRUNKS:
            raise ValueError(f"LPIPS has no trunk {net!r}; choose one of {', '.join(TRUNKS)}")
        self.net_name = net
        self.use_dropout = use_dropout
        self.trunk_path = trunk_path
        self.random_trunk = random_trunk
        self._loaded: list[_FrozenNetwork] = []  # a list, since an attribute would be registered
        self.eval()

    def extra_repr(self) -> str:
        """Say what the perceptual network is, since it is not among the submodules."""
        return f"net={self.net_name!r}, loaded={bool(self._loaded)}"

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Measure the distance of each pair of images.

        Args:
            input, target: (B, C, H, W) in [-1, 1], C = 3, or 1 which is repeated.

        Returns:
            (B, 1, 1, 1) float32, 0 for equal images.

        Raises:
            ValueError: shapes that differ, another number of channels, or images too small for the trunk.
            FileNotFoundError: the weights are nowhere to be found.
        """
        self._check(input, target)
        network = self._network_on(input.device)
        with torch.autocast(input.device.type, enabled=False):
            return network(input.float().expand(-1, 3, -1, -1), target.float().expand(-1, 3, -1, -1))

    def load_trunk_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the trunk's weights from `state`, and the heads' too if it holds them, in place of the files'.

        Args:
            state: names of torchvision (`features.0.weight`) or of 2021 (`net.slice1.0.weight`,
                `lin0.model.1.weight`), below any prefix; a whole first-stage checkpoint's state dict will do.
                Other keys are passed over.

        Raises:
            ValueError: a weight is missing or has another shape.
        """
        with torch.inference_mode(False):
            network = self._loaded[0] if self._loaded else _FrozenNetwork(self.net_name, self.use_dropout)
            network.load_trunk(state, "the given state")
            if _has_heads(state):
                network.load_heads(state, "the given state")
            elif not self._loaded:
                network.load_heads(*_read_heads(self.net_name))
            self._loaded[:] = [network]

    def _check(self, input: Tensor, target: Tensor) -> None:
        if input.ndim != 4 or input.shape != target.shape:
            raise ValueError(
                f"LPIPS compares two batches (B, C, H, W) of one shape, got {tuple(input.shape)} and "
                f"{tuple(target.shape)}"
            )
        _, channels, height, width = input.shape
        if channels not in (1, 3):
            raise ValueError(
                f"LPIPS knows images of 1 or 3 channels, got {channels}: give it three of them, {REMEDY}"
            )
        smallest = TRUNKS[self.net_name].smallest
        if min(height, width) < smallest:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for LPIPS with net={self.net_name!r}, "
                f"which needs {smallest}: use larger ones, {REMEDY}"
            )

    def _network_on(self, device: torch.device) -> _FrozenNetwork:
        # Validation may come first, in inference mode; tensors made there could not be used in training.
        with torch.inference_mode(False):
            if not self._loaded:
                self._loaded.append(self._load())
            return self._loaded[0].to(device)

    def _load(self) -> _FrozenNetwork:
        network = _FrozenNetwork(self.net_name, self.use_dropout)
        state: Mapping[str, Tensor] = {}
        if self.random_trunk:
            network.randomize()
        else:
            state, source = _read_trunk(self.net_name, self.trunk_path)
            network.load_trunk(state, source)
        network.load_heads(*((state, source) if _has_heads(state) else _read_heads(self.net_name)))
        return network

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:
        """Pass over the network's weights of 2021; anything else below this prefix is unexpected, as ever."""
        historic = re.compile(r"net\.slice\d\.|lin\d\.model\.|scaling_layer\.(shift|scale)$")
        names = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
        if strict:
            unexpected_keys += [prefix + name for name in names if not historic.match(name)]


def _has_heads(state: Mapping[str, Tensor]) -> bool:
    return any(_HEAD_KEY.search(key) for key in state)


def _copy_all(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str, prefix: str) -> None:
    if not found:
        raise ValueError(
            f"{source} holds no {prefix}*: it is no file of the network that LPIPS compares in, and no "
            f"checkpoint of 2021 with loss.perceptual_loss.*: name another file as perceptual_path, {REMEDY}"
        )
    for name, parameter in wanted.items():
        if name not in found:
            raise ValueError(f"{source} holds no {prefix}{name}: is it of another network?")
        if found[name].shape != parameter.shape:
            raise ValueError(
                f"{source}: {prefix}{name} has the shape {tuple(found[name].shape)}, not "
                f"{tuple(parameter.shape)}: is it of another network?"
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def _read_heads(name: str) -> tuple[dict[str, Tensor], str]:
    """Read the heads out of the installed `lpips` package, without importing it: (state dict, where from)."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"LPIPS takes its heads from the package lpips: pip install lpips, {REMEDY}")
    path = Path(spec.origin).parent / "weights" / "v0.1" / f"{name}.pth"
    if not path.is_file():
        raise FileNotFoundError(f"{path}, the heads of LPIPS, is missing: install lpips anew, {REMEDY}")
    return _read(path), str(path)


def _read_trunk(name: str, trunk_path: str | Path | None) -> tuple[dict[str, Tensor], str]:
    """Find the trunk's weights: the given file, else the torch hub cache, else a download into it."""
    if trunk_path is not None:
        path = Path(trunk_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"trunk_path: there is no file {path}: correct the path, {REMEDY}")
        return _read(path), str(path)
    trunk = TRUNKS[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / trunk.filename
    if path.is_file():
        return _read(path), str(path)
    logger.info("fetching %s, the trunk of LPIPS, into %s", trunk.url, path.parent)
    try:
        return torch.hub.load_state_dict_from_url(trunk.url, map_location="cpu", check_hash=True), trunk.url
    except (OSError, RuntimeError) as error:  # no network, no place to write, or a wrong hash
        raise FileNotFoundError(
            f"LPIPS needs {trunk.filename}, which is not in {path.parent} and could not be fetched "
            f"({error}): put the file from {trunk.url} there, give its place as trunk_path, {REMEDY}"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """Read a state dict: a whole checkpoint's too, of which no more than what is asked for is loaded."""
    if zipfile.is_zipfile(path):
        content = read_pickled(path)
    else:  # torchvision's own files are in the format of torch before 1.6
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} is no readable file of weights, perhaps an incomplete download: delete it"
            ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
