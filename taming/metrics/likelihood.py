"""Likelihoods per code and per pixel, with their standard errors. B images."""

import math
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A mean over images, and its standard error."""

    mean: float
    standard_error: float


def nats_per_code(nll: Tensor, num_codes: int) -> Estimate:
    """Return the mean negative log-likelihood of a code, from that of images (B,) in nats."""
    return _estimate(nll / num_codes)


def bits_per_dim(nll: Tensor, dims: int) -> Estimate:
    """Return bits per dimension, from the nats of images (B,) of `dims` = C * H * W values each."""
    return _estimate(nll / (dims * math.log(2)))


def _estimate(values: Tensor) -> Estimate:
    values = values.double().flatten()
    if not len(values):
        raise ValueError("there are no images to average over")
    error = math.nan if len(values) < 2 else float(values.std()) / math.sqrt(len(values))
    return Estimate(float(values.mean()), error)
