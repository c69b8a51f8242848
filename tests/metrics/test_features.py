"""Distances between sets of features: against an independent implementation, and their properties."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming.metrics import (
    FeatureStatistics,
    bits_per_dim,
    frechet_distance,
    inception_scores,
    kernel_distance,
    kernel_distances,
    manifold,
    manifold_metrics,
    nats_per_code,
    sliced_wasserstein,
)

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "metrics.safetensors")
REAL, FAKE = GOLDEN["in/real_64"], GOLDEN["in/fake_64"]
FEW_REAL, FEW_FAKE = GOLDEN["in/real_2048"], GOLDEN["in/fake_2048"]  # 40 samples


def golden(name):
    return pytest.approx(float(GOLDEN[f"out/{name}"]), rel=1e-6)


def test_frechet_distance():
    real = FeatureStatistics.of(REAL)
    assert frechet_distance(real, FeatureStatistics.of(FAKE)) == golden("fid_64")
    assert abs(frechet_distance(real, real)) < 1e-10


def test_frechet_distance_of_fewer_samples_than_features_is_exact_and_warned_of():
    with pytest.warns(UserWarning, match="40 and 40 samples of 2048 features"):
        found = frechet_distance(FeatureStatistics.of(FEW_REAL), FeatureStatistics.of(FEW_FAKE))
    assert found == pytest.approx(float(GOLDEN["out/fid_2048"]), rel=1e-9)  # of the singular values


@pytest.mark.parametrize("sizes", [[500], [1, 499], [7] * 71 + [3], [250, 0, 250]])
def test_statistics_of_parts_merge_to_those_of_the_whole(sizes):
    whole, merged, batched = FeatureStatistics.of(REAL), FeatureStatistics(64), FeatureStatistics(64)
    for part in REAL.split(sizes):
        batched.update(part)
        merged.merge(FeatureStatistics.of(part))
    for other in (batched, merged):
        assert other.count == 500
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.covariance, whole.covariance, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole.covariance, REAL.double().T.cov())


def test_features_that_are_not_finite_are_named():
    statistics, features = FeatureStatistics.of(REAL[:10]), REAL[10:20].clone()
    features[3, 5] = torch.nan
    with pytest.raises(ValueError, match="1 samples are not finite, the first is sample 13"):
        statistics.update(features)
    with pytest.raises(ValueError, match=r"must be \(N, 64\), got \(40, 2048\)"):
        statistics.update(FEW_REAL)


def test_kernel_distance(monkeypatch):
    assert kernel_distance(REAL, FAKE) == golden("mmd2_unbiased_full")
    assert kernel_distance(FEW_REAL, FEW_FAKE) == golden("mmd2_unbiased_full_2048")
    rows = zip(GOLDEN["in/kid_real_indices"], GOLDEN["in/kid_fake_indices"], strict=True)
    found = torch.tensor([kernel_distance(REAL[i], FAKE[j]) for i, j in rows], dtype=torch.float64)
    torch.testing.assert_close(found, GOLDEN["out/kid_subsets"], rtol=1e-6, atol=1e-9)
    whole = kernel_distance(REAL, FAKE)
    monkeypatch.setattr("taming.metrics.kernel.BLOCK", 33)
    assert kernel_distance(REAL, FAKE) == pytest.approx(whole, rel=1e-12)


def test_kernel_distances_of_subsets():
    values = kernel_distances(REAL, FAKE, subsets=50, size=100, seed=3)
    assert torch.equal(values, kernel_distances(REAL, FAKE, subsets=50, size=100, seed=3))
    assert values.mean() == pytest.approx(kernel_distance(REAL, FAKE), rel=0.2)
    with pytest.raises(ValueError, match="subsets of 501, but there are 500 and 500 samples"):
        kernel_distances(REAL, FAKE, size=501)


def test_inception_scores():
    scores = inception_scores(GOLDEN["in/logits"])
    torch.testing.assert_close(scores, GOLDEN["out/is_splits"], rtol=1e-6, atol=0)
    assert float(scores.mean()) == golden("is_mean") and float(scores.std(correction=0)) == golden("is_std")
    assert float(inception_scores(GOLDEN["in/logits"], splits=1)) == golden("is_1_split")
    assert not torch.equal(inception_scores(GOLDEN["in/logits"], seed=0), scores)
    with pytest.raises(ValueError, match="splits is 501: give 1 to 500"):
        inception_scores(GOLDEN["in/logits"], splits=501)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("memory", [2**28, 8 * 500 * 7])
def test_manifold_metrics(k, memory, monkeypatch):
    monkeypatch.setattr(manifold, "MEMORY", memory)
    for real, fake, name in ((REAL, FAKE, ""), (FEW_REAL, FEW_FAKE, "_2048")):
        found = manifold_metrics(real, fake, k=k)
        for metric in ("precision", "recall", "density", "coverage"):
            assert getattr(found, metric) == golden(f"{metric}_k{k}{name}")
    with pytest.raises(ValueError, match="k is 40: give 1 to 39"):
        manifold_metrics(FEW_REAL, FEW_FAKE, k=40)


def test_sliced_wasserstein():
    shifted = REAL + 1.0
    # a shift by s moves each projection by s . direction, whose mean square is |s|^2 / D
    assert sliced_wasserstein(REAL, shifted, projections=4000) == pytest.approx(1.0, rel=0.05)
    assert sliced_wasserstein(REAL, REAL[torch.randperm(500)]) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(REAL, shifted[:400]) == pytest.approx(1.0, rel=0.2)


def test_likelihoods_have_standard_errors():
    nll = torch.tensor([10.0, 14.0])
    assert nats_per_code(nll, 4) == (3.0, pytest.approx(0.5))
    assert bits_per_dim(nll, 12).mean == pytest.approx(1 / math.log(2))
    assert math.isnan(nats_per_code(nll[:1], 4).standard_error)
