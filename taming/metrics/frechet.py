"""Frechet distance between two sets of features: FID on Inception features (Heusel et al. 2017).

N samples, D features.
"""

import warnings

import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of features, gathered over batches and merged over processes, in float64.

    Batches and parts are combined by Chan et al. 1983, so that their order changes roundings only.

    Attributes:
        count: samples N.
        mean: (D,).
        scatter: sum of outer products of the deviations from the mean, (D, D).
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Return the statistics of features (N, D)."""
        statistics = cls(features.shape[1], features.device)
        statistics.update(features)
        return statistics

    @classmethod
    def from_moments(
        cls, mean: Tensor, covariance: Tensor, count: int | None = None
    ) -> "FeatureStatistics":
        """Return the statistics with mean (D,) and unbiased covariance (D, D).

        Args:
            mean, covariance: of the samples.
            count: number of samples; None, where it is not known, stands for enough: more than D.
        """
        statistics = cls(len(mean), mean.device)
        statistics.count = len(mean) + 1 if count is None else count
        statistics.mean += mean
        statistics.scatter += covariance * (statistics.count - 1)
        return statistics

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add features (N, D).

        Raises:
            ValueError: another shape, or a row with a value that is not finite, which is named.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (N, {len(self.mean)}), got {tuple(features.shape)}")
        bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"features of {len(bad)} samples are not finite, the first is sample {self.count + bad[0]}"
            )
        part = FeatureStatistics(0)
        part.count, rows = len(features), features.to(self.mean)
        part.mean = rows.mean(0) if part.count else self.mean
        part.scatter = (rows - part.mean).T @ (rows - part.mean)
        self.merge(part)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the samples of another part."""
        total = self.count + other.count
        if not other.count:
            return
        delta = other.mean.to(self.mean) - self.mean
        weight = self.count * other.count / total
        self.scatter += other.scatter.to(self.mean) + weight * torch.outer(delta, delta)
        self.mean += delta * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples at least, there are {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), 0 for equal statistics.

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2). Of a set with
    N <= D samples, N - 1 eigenvalues are not 0; only so many are taken, since the roots of roundings around 0
    would add up.

    Raises:
        ValueError: another number of features, or a set with one sample.

    Warns:
        UserWarning: a set has fewer samples than features: the distance then depends on their number.
    """
    dim = len(a.mean)
    if len(b.mean) != dim:
        raise ValueError(f"the sets have {dim} and {len(b.mean)} features: they are of different networks")
    if min(a.count, b.count) < dim:
        warnings.warn(
            f"Frechet distance of {a.count} and {b.count} samples of {dim} features: below {dim} samples it "
            "depends strongly on their number", stacklevel=2,
        )
    covariance_a, covariance_b = a.covariance, b.covariance.to(a.mean)
    values, vectors = torch.linalg.eigh(covariance_a)
    rank_a, rank = min(a.count - 1, dim), min(a.count - 1, b.count - 1, dim)
    values, vectors = values[-rank_a:].clamp_min(0), vectors[:, -rank_a:]
    root = vectors * values.sqrt()  # (D, r): S_a = root root^T
    products = torch.linalg.eigvalsh(root.T @ covariance_b @ root)[-rank:]
    traces = covariance_a.trace() + covariance_b.trace() - 2 * products.clamp_min(0).sqrt().sum()
    return float((a.mean - b.mean.to(a.mean)).square().sum() + traces)
