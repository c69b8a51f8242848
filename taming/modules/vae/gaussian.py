"""The posterior of a variational autoencoder: a Gaussian with a diagonal covariance.

B batch; the other dimensions are those of the latents, (d,) or (C, h, w).
"""

import math

import torch
from torch import Tensor

LOGVAR = (-30.0, 20.0)  # beyond these the variance overflows or vanishes in float32


class DiagonalGaussian:
    """N(mean, diag(exp(logvar))) for each item of a batch, in float32.

    Args:
        moments: mean and log-variance, one half of dimension 1 each: (B, 2 d) or (B, 2 C, h, w).

    Attributes:
        mean, logvar, std: (B, d) or (B, C, h, w).
    """

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return mean + std * noise: gradients reach both (Kingma and Welling 2014, section 2.4)."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Return the most likely latents: the mean."""
        return self.mean

    def kl_by_dimension(self) -> Tensor:
        """Return KL(N(mean, std^2) || N(0, 1)) of each dimension, in nats, 0 or more; the shape of `mean`."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)

    def kl(self) -> Tensor:
        """Return KL(N(mean, std^2) || N(0, I)), (B,), in nats per item."""
        return self.kl_by_dimension().flatten(1).sum(1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density (B,) of latents, in nats per item."""
        return gaussian_log_prob(z, self.mean, self.logvar)


def gaussian_log_prob(x: Tensor, mean: Tensor | float, logvar: Tensor | float) -> Tensor:
    """Return log N(x; mean, exp(logvar)) of each item, (B,), summed over all other dimensions."""
    logvar = torch.as_tensor(logvar, device=x.device)
    terms = (x - mean).square() * torch.exp(-logvar) + logvar + math.log(2.0 * math.pi)
    return -0.5 * terms.flatten(1).sum(1)
