"""Reference statistics: what a distance compares generated images with.

Reads what ADM (Dhariwal and Nichol 2021), MAR and MaskBit published, and writes files of the same layout that
also say of which images, network and sizes they are. N images, D features.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming.eval.networks import FeatureNetwork
from taming.eval.npz import NpzFile, write_npz
from taming.eval.parts import Measured, Parts, batches, joined
from taming.eval.sources import ImageSource, NpzImages, content_hash, hash_of_set
from taming.inference.distributed import rank_and_world_size
from taming.metrics import FeatureStatistics
from taming.util import atomic_write

KEPT = 10_000  # features in a file of statistics: precision and recall are measured against so many by ADM
NOTE = "taming"  # the array that holds the description, JSON


@dataclass
class Reference:
    """What is known of a set of images.

    Attributes:
        statistics: of the features.
        spatial: of the features of sFID, or None.
        features: (n, D) of some or all images, for the distances that need more than moments; or None.
        about: the network, its file's hash, and the images: count, hash, resizing.
    """

    statistics: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)


def network_about(network: FeatureNetwork) -> dict[str, Any]:
    """Say which network it is, for protocols."""
    return {"name": network.name, "sha256": network.sha256, "input": network.input_description}


@torch.inference_mode()
def measure_features(network: FeatureNetwork, images: Tensor, prefix: str = "") -> Measured:
    """Return features, and what else the network gives, of images uint8 (B, 3, H, W)."""
    found = network(images)
    named = {"features": found.features, "spatial": found.spatial, "logits": found.logits}
    return {prefix + name: value.float() for name, value in named.items() if value is not None}


def features_of(
    source: ImageSource, network: FeatureNetwork, root: Path, *, batch_size: int, device: torch.device,
    what: str = "reference",
) -> tuple[Measured, Parts]:
    """Extract the features of a source, part by part; return all of them, and the parts, to be removed.

    Processes other than the first get no features: nothing of theirs waits for parts that the first may
    have removed. Names: features, logits, spatial, hash, and the numbers of those that cannot be read, bad.

    Raises:
        ValueError: no image can be read.
    """
    parts = Parts(root, {"network": network_about(network), "images": source.identity()}, len(source))

    def compute(numbers: list[int]) -> Measured:
        found: list[Measured] = []
        for batch in batches(numbers, batch_size):
            good, images = source.read(batch)
            found.append({"bad": torch.tensor(sorted(set(batch) - set(good)), dtype=torch.int64)})
            if good:
                hashes = {"hash": content_hash(images)}
                found.append(measure_features(network, images.to(device)) | hashes)
        return joined(found)

    parts.measure(compute, what)
    if rank_and_world_size()[0] != 0:
        return {}, parts
    measured = parts.collect()
    if "features" not in measured:
        raise ValueError(f"none of {len(source)} images can be read: {source.why_bad(0)}")
    return measured, parts


def make_reference(measured: Measured, source: ImageSource, network: FeatureNetwork) -> Reference:
    """Make a reference of measured features.

    Raises:
        ValueError: features that are not finite; the image is named by its number.
    """
    return Reference(
        statistics=FeatureStatistics.of(measured["features"]),
        spatial=FeatureStatistics.of(measured["spatial"]) if "spatial" in measured else None,
        features=measured["features"],
        about={
            "network": network_about(network),
            "images": source.describe() | {
                "count": len(measured["features"]), "sha256": hash_of_set(measured["hash"]),
            },
        },
    )


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference: `mu`, `sigma`, `mu_s`, `sigma_s` as ADM does, `count`, `features`, a description."""
    moments = reference.statistics
    arrays = {
        "mu": moments.mean.numpy(),
        "sigma": moments.covariance.numpy(),
        "count": np.array(moments.count),
    }
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean.numpy(), "sigma_s": reference.spatial.covariance.numpy()}
    if reference.features is not None:
        step = max(1, -(-len(reference.features) // KEPT))
        arrays["features"] = reference.features[::step].numpy()
    arrays[NOTE] = np.frombuffer(json.dumps(reference.about, sort_keys=True).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        write_npz(partial, arrays)


def holds_statistics(path: Path) -> bool:
    """Tell whether a file is an .npz with statistics of features."""
    if not path.is_file() or path.suffix != ".npz":
        return False
    with NpzFile(path) as file:
        return {"mu", "sigma"} <= set(file.names)


def load_reference(
    path: Path, network: FeatureNetwork, root: Path, *, batch_size: int, device: torch.device
) -> tuple[Reference, list[Parts]]:
    """Read a file of statistics; of ADM's, which hold images too, also extract their features.

    Raises:
        ValueError: the statistics are of another network; both are named.
    """
    with NpzFile(path) as file:
        names = set(file.names)
        about = _about(file) if NOTE in names else {}
        _check_network(path, about, network)
        count = int(file.array("count")) if "count" in names else None
        moments = _moments(file, "mu", "sigma", count)
        spatial = _moments(file, "mu_s", "sigma_s", count) if {"mu_s", "sigma_s"} <= names else None
        features = torch.from_numpy(file.array("features")) if "features" in names else None
    if len(moments.mean) != network.num_features:
        raise ValueError(
            f"{path} holds statistics of {len(moments.mean)} features, but {network.name} has "
            f"{network.num_features}: they are of another network; make them with `taming statistics`"
        )
    if not about:  # a published file: it says nothing of its network, whose features are counted above
        about = {"network": "not stated by the file", "images": {"kind": "statistics", "name": path.name}}
    parts: list[Parts] = []
    if features is None and "arr_0" in names:
        measured, found = features_of(
            NpzImages(path),
            network,
            root,
            batch_size=batch_size,
            device=device,
            what="arr_0 of the reference",
        )
        features = measured.get("features")
        parts.append(found)
    about["sha256"] = _moments_hash(moments)
    return Reference(moments, spatial, features, about), parts


def _about(file: NpzFile) -> dict[str, Any]:
    try:
        about = json.loads(file.array(NOTE).tobytes())
    except ValueError as error:
        raise ValueError(f"{file.path}: its description is damaged: {error}") from error
    if not isinstance(about, dict) or not isinstance(about.get("network"), dict):
        raise ValueError(f"{file.path}: its description names no network")
    return about


def _check_network(path: Path, about: Mapping[str, Any], network: FeatureNetwork) -> None:
    made = about.get("network")
    if made is not None and made.get("sha256") != network.sha256:
        raise ValueError(
            f"{path} holds statistics of {made.get('name')} with the weights {str(made.get('sha256'))[:12]}, "
            f"but this evaluation uses {network.name} with {network.sha256[:12]}: make them again with "
            f"`taming statistics`, or choose the other network"
        )


def _moments(file: NpzFile, mean: str, covariance: str, count: int | None) -> FeatureStatistics:
    mu, sigma = (torch.from_numpy(file.array(name)).double() for name in (mean, covariance))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{file.path}: {mean} {tuple(mu.shape)} and {covariance} {tuple(sigma.shape)} do not fit"
        )
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{file.path}: {mean} or {covariance} holds values that are not finite")
    return FeatureStatistics.from_moments(mu, sigma, count)


def _moments_hash(moments: FeatureStatistics) -> str:
    return hashlib.sha256(moments.mean.numpy().tobytes() + moments.covariance.numpy().tobytes()).hexdigest()
