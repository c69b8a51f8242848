"""Files of the networks that metrics and losses use: find, download, verify and read them.

A number is worth as much as the file of its network is known, so each file is compared with the SHA-256 that
its publishers named, and read without running anything in it.
"""

import hashlib
import importlib.util
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from taming.checkpoint.deferred_init import DeferredInit
from taming.checkpoint.read import read_checkpoint
from taming.checkpoint.state_dict import load_weights
from taming.util import download, open_file

MAX_BYTES = 2 << 30  # of a file that is downloaded
EXTRA = 'pip install "taming[metrics-offline]"'

# A key that tells what network a file is of
_SIGNS = {
    "Mixed_7c.branch_pool.conv.weight": "an Inception-v3",
    "_blocks.0._depthwise_conv.weight": "an EfficientNet",
    "blocks.0.ls1.gamma": "a DINOv2",
    "net.slice2.5.filt": "ST-LPIPS with VGG",
    "net.slice1.1.filt": "ST-LPIPS with AlexNet",
    "features.28.weight": "torchvision's VGG",
    "features.10.weight": "torchvision's AlexNet",
    "features.12.expand3x3.weight": "torchvision's SqueezeNet",
    "layer4.0.conv1.weight": "a ResNet",
    "lin4.model.1.weight": "the heads of LPIPS without a network",
    "quantize.embedding.weight": "a VQGAN",
}


@dataclass(frozen=True)
class PublishedWeights:
    """The file of a network, as its authors published it.

    Attributes:
        network: what it is, for messages.
        names: names that the file goes by; the first is that of the download.
        sha256: the hash, or its first digits; empty if none was published.
        url: where it can be downloaded.
        package: package that brings the file, and the path in it; it is not imported.
    """

    network: str
    names: tuple[str, ...]
    sha256: str = ""
    url: str | None = None
    package: tuple[str, str] | None = None

    def find(self, weights: str | Path | None = None) -> Path | None:
        """Return the file if it is on this machine.

        Args:
            weights: the file, or a folder with it; None looks in the torch hub cache, then in the package.

        Raises:
            FileNotFoundError: `weights` does not exist, or is a folder without the file.
        """
        if weights is not None:
            return self._given(Path(weights).expanduser())
        places = [Path(torch.hub.get_dir()) / "checkpoints" / name for name in self.names]
        if self.package is not None:
            module, path = self.package
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.origin is not None:
                places.append(Path(spec.origin).parent / path)
        return next((place for place in places if place.is_file()), None)

    def ensure(self, weights: str | Path | None = None) -> Path:
        """Return the file, downloaded into the torch hub cache if it is not on this machine.

        Raises:
            FileNotFoundError: it is not here, and cannot be downloaded; the message says how to get it.
        """
        path = self.find(weights)
        if path is not None:
            return path
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        missing = f"{self.network} needs {' or '.join(self.names)}, which is not in {folder}"
        if self.url is None:
            raise FileNotFoundError(f"{missing}: {EXTRA}, or give the file or its folder as weights")
        path = folder / self.names[0]
        try:
            download(self.url, path, 1 << 20, max_bytes=MAX_BYTES)
        except OSError as error:
            raise FileNotFoundError(
                f"{missing} and cannot be downloaded ({error}): put the file from {self.url} there, or give "
                "it or its folder as weights"
            ) from error
        return path

    def verify(self, path: Path) -> str:
        """Return the SHA-256 of a file, 64 hexadecimal digits, which must be the published one.

        Raises:
            ValueError: it is another; the message shows it, and says what network the file seems to be of.
        """
        found = sha256_of(path)
        if not found.startswith(self.sha256):
            raise ValueError(
                f"{path} is not the file of {self.network}: its SHA-256 is {found}, not {self.sha256}"
                f"{'...' if len(self.sha256) < 64 else ''}, and {_description(path)}; give {self._source()}"
            )
        return found

    def load(self, build: Callable[[], nn.Module], path: Path) -> nn.Module:
        """Build a network and fill it with the tensors of a file.

        Raises:
            ValueError: the file is damaged, asks for code, or holds another network.
        """
        state = read_checkpoint(path, tensors=("state_dict",))["state_dict"]
        deferred = DeferredInit()
        with deferred:
            network = build()
        counters = r".*\.num_batches_tracked"  # of batches in training; files of early versions have none
        load_weights(network, state, source=path, optional=(counters,), assign=True)
        deferred.finish(network)
        return network

    def _given(self, path: Path) -> Path:
        if path.is_dir():
            found = next((path / name for name in self.names if (path / name).is_file()), None)
            if found is None:
                names = " and no ".join(self.names)
                raise FileNotFoundError(f"{path} has no {names}: put {self._source()} there")
            return found
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}: correct the path, or give {self._source()}")
        return path

    def _source(self) -> str:
        where = f"from {self.url}" if self.url else f"which this installs: {EXTRA}"
        return f"{self.names[0]}, {where}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open_file(path, "file of weights") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _description(path: Path) -> str:
    """Phrase what a file seems to be, from its names and shapes; no tensor is read."""
    if _is_torchscript(path):
        return "it is a TorchScript archive, whose weights come with a program that is not executed here"
    try:
        state: Mapping[str, Tensor] = read_checkpoint(path, tensors=())["state_dict"]
    except ValueError:
        return "it cannot be read as a file of weights"
    label = next((label for key, label in _SIGNS.items() if key in state), None)
    if label is None:
        label = f"a network with {', '.join(list(state)[:3])}, ..."
    heads = (state[key] for key in ("fc.weight", "_fc.weight", "classifier.6.weight") if key in state)
    classes = next((f" with {len(head)} classes" for head in heads), "")
    return f"it looks like {label}{classes} ({len(state)} entries)"


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
