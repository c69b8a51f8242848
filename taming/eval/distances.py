"""All numbers that compare a set of generated images with a reference, from their features. N images."""

import warnings
from dataclasses import dataclass
from typing import Any

from taming.eval.networks import FeatureNetwork
from taming.eval.parts import Measured
from taming.eval.statistics import Reference
from taming.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_scores,
    kernel_distances,
    manifold_metrics,
    sliced_wasserstein,
)

Metrics = dict[str, float]


@dataclass(frozen=True)
class DistanceSettings:
    """How the distances are computed that leave a choice; part of the protocol.

    Attributes:
        splits: of the Inception score, in the order of the images (ADM).
        kid_subsets, kid_size: subsets of the kernel distance; smaller where there are fewer images.
        k: neighbours of precision and recall.
        k_coverage: neighbours of density and coverage.
        seed: of subsets and projections.
    """

    splits: int = 10
    kid_subsets: int = 100
    kid_size: int = 1000
    k: int = 3
    k_coverage: int = 5
    seed: int = 0


def distances(
    reference: Reference, generated: Measured, network: FeatureNetwork,
    settings: DistanceSettings | None = None,
) -> tuple[Metrics, dict[str, Any], list[str]]:
    """Compare generated images with a reference; return metrics, settings as they were used, and notes.

    Precision, recall, density, coverage, the kernel and the sliced Wasserstein distance need features of the
    reference; where it has moments alone, they are left out.

    Raises:
        ValueError: fewer than two images, or features that are not finite.
    """
    settings = settings or DistanceSettings()
    features, used, notes = generated["features"], dict[str, Any](), list[str]()
    metrics = {network.distance_name: frechet(reference.statistics, FeatureStatistics.of(features), notes)}
    if reference.spatial is not None and "spatial" in generated:
        metrics["sFID"] = frechet(reference.spatial, FeatureStatistics.of(generated["spatial"]), notes)
    if network.score_name is not None and "logits" in generated:
        splits = min(settings.splits, len(features))
        metrics[network.score_name] = float(inception_scores(generated["logits"], splits=splits).mean())
        used["splits"] = f"{splits}, in order"
    real = reference.features
    if real is None:
        return metrics, used, notes
    suffix = network.distance_name.removeprefix("FD").removeprefix("FID")  # "", "-EffLite0", ...
    fewest = min(len(real), len(features))
    size = min(settings.kid_size, fewest)
    subsets = settings.kid_subsets if size < fewest else 1
    kernel = kernel_distances(real, features, subsets=subsets, size=size, seed=settings.seed)
    metrics[f"KID{suffix}"] = float(kernel.mean())
    used["KID"] = f"{subsets} subsets of {size}, seed {settings.seed}"
    used["precision, recall, density, coverage"] = f"{len(real)} real images"
    for k, names in ((settings.k, ("precision", "recall")), (settings.k_coverage, ("density", "coverage"))):
        if k < fewest:
            found = manifold_metrics(real, features, k=k)
            metrics |= {f"{name}{suffix}": getattr(found, name) for name in names}
            used[" and ".join(names)] = f"k = {k}"
    metrics[f"SWD{suffix}"] = sliced_wasserstein(real, features, seed=settings.seed)
    return metrics, used, notes



def frechet(real: FeatureStatistics, fake: FeatureStatistics, notes: list[str]) -> float:
    """Return the Frechet distance; what it warns of is added to the notes of the result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distance = frechet_distance(real, fake)
    notes += [text for each in caught if (text := str(each.message)) not in notes]
    return distance
