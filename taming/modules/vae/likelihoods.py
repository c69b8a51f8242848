"""How likely an image is, given what a decoder says of its pixels: p(x | z).

B batch, C channels, H W pixels. Images x are in [-1, 1]. All likelihoods are sums over the pixels of an
image, in nats, computed in float32 whatever autocast says.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vae.gaussian import gaussian_log_prob

LEVELS = 256  # of a pixel in a file


class PixelLikelihood(nn.Module):
    """The contract: parameters (B, n_params(C), H, W) of a decoder stand for a distribution of images.

    Attributes:
        is_discrete: `log_prob` is the probability of the pixels as 8-bit numbers, not a density.
    """

    is_discrete = False

    def n_params(self, channels: int) -> int:
        """Return the channels that a decoder must have."""
        return channels

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """Return log p(x | z) of each image, (B,)."""
        with torch.autocast(x.device.type, enabled=False):
            return self._log_prob(x.float(), params.float())

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """Return the expected images (B, C, H, W)."""
        return params.float()

    def sample(self, params: Tensor) -> Tensor:
        """Return random images (B, C, H, W)."""
        raise NotImplementedError


class Gaussian(PixelLikelihood):
    """Pixels are normal around the decoder's output, with one deviation for all.

    Args:
        sigma: the deviation, on the scale of [-1, 1].
        learned: train it; it begins there.
    """

    def __init__(self, sigma: float = 1.0, learned: bool = False):
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)), requires_grad=learned)

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        return gaussian_log_prob(x, params, 2.0 * self.log_sigma)

    def sample(self, params: Tensor) -> Tensor:
        """Return random images (B, C, H, W)."""
        return params.float() + self.log_sigma.exp() * torch.randn_like(params, dtype=torch.float32)


class Bernoulli(PixelLikelihood):
    """Pixels are black or white, with the decoder's logits; gray ones count as their share of both."""

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        shares = 0.5 * (x + 1.0)  # of white
        return -F.binary_cross_entropy_with_logits(params, shares, reduction="none").flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """Return the expected images (B, C, H, W)."""
        return 2.0 * torch.sigmoid(params.float()) - 1.0

    def sample(self, params: Tensor) -> Tensor:
        """Return random black and white images (B, C, H, W)."""
        return 2.0 * torch.bernoulli(torch.sigmoid(params.float())) - 1.0


class DiscretizedLogistic(PixelLikelihood):
    """The probability of 8-bit pixels: a logistic distribution, cut into bins.

    Source: Kingma et al. 2016, "Improving variational inference with inverse autoregressive flow".
    The decoder gives a mean and a log-scale for each value. Bins are 2/255 wide; the outermost reach to
    infinity, so that the 256 probabilities of a value have the sum 1.
    """

    is_discrete = True

    def n_params(self, channels: int) -> int:
        """Return the channels that a decoder must have."""
        return 2 * channels

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        mean, log_scale = self._split(params)
        half = 1.0 / (LEVELS - 1)
        x = ((x + 1.0) / (2.0 * half)).round() * (2.0 * half) - 1.0  # the level that a file would hold
        inverse = torch.exp(-log_scale)
        upper, lower = inverse * (x - mean + half), inverse * (x - mean - half)  # of the bin, in scales
        # log(s(u) - s(l)) = log(1 - exp(l - u)) + log s(u) + log s(-l), exact also far from the mean
        within = torch.log(-torch.expm1(lower - upper)) + F.logsigmoid(upper) + F.logsigmoid(-lower)
        lowest, highest = x < half - 1.0, x > 1.0 - half
        log_p = torch.where(lowest, F.logsigmoid(upper), torch.where(highest, F.logsigmoid(-lower), within))
        return log_p.flatten(1).sum(1)

    def mean(self, params: Tensor) -> Tensor:
        """Return the mean of the distribution before it is cut into bins, within [-1, 1]."""
        return self._split(params)[0].clamp(-1.0, 1.0)

    def sample(self, params: Tensor) -> Tensor:
        """Return random images (B, C, H, W) of 256 levels."""
        mean, log_scale = self._split(params)
        uniform = torch.rand_like(mean).clamp(1e-5, 1.0 - 1e-5)
        x = (mean + log_scale.exp() * torch.logit(uniform)).clamp(-1.0, 1.0)
        return ((x + 1.0) * 0.5 * (LEVELS - 1)).round() * (2.0 / (LEVELS - 1)) - 1.0

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = params.float().chunk(2, dim=1)
        return mean, log_scale.clamp(-7.0, 7.0)  # a scale of 1e-3 is a quarter of a bin


def make_likelihood(name: str, sigma: float = 1.0) -> PixelLikelihood:
    """Make a likelihood by its name.

    Raises:
        ValueError: an unknown name; the message lists those that there are.
    """
    if name in ("gaussian", "gaussian_learned"):
        return Gaussian(sigma, learned=name == "gaussian_learned")
    kinds = {"bernoulli": Bernoulli, "disc_logistic": DiscretizedLogistic}
    if name not in kinds:
        known = ", ".join(("gaussian", "gaussian_learned", *kinds))
        raise ValueError(f"likelihood: {name!r} is unknown; choose one of {known}")
    return kinds[name]()
