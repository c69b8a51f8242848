"""Numbers from tensors: how good images and reconstructions are, and how much of a codebook is used."""

from taming.metrics.codebook import CodebookUsage
from taming.metrics.frechet import FeatureStatistics, frechet_distance
from taming.metrics.images import psnr, ssim
from taming.metrics.inception_score import inception_scores
from taming.metrics.kernel import kernel_distance, kernel_distances
from taming.metrics.likelihood import bits_per_dim, nats_per_code
from taming.metrics.manifold import manifold_metrics
from taming.metrics.wasserstein import sliced_wasserstein

__all__ = [
    "CodebookUsage", "FeatureStatistics", "bits_per_dim", "frechet_distance", "inception_scores",
    "kernel_distance", "kernel_distances", "manifold_metrics", "nats_per_code", "psnr", "sliced_wasserstein",
    "ssim",
]
