"""Gradients through the choice of a code, which has none of its own.

Each estimator takes latents z (..., C) and the codes z_q (..., C) chosen for them and returns the codes, with
a gradient to z. Codes keep their own gradient only where the text says so.
"""

from typing import Literal, cast

import torch
from torch import Tensor

Estimator = Literal["straight_through", "rotation", "diveq"]
ESTIMATORS = ("straight_through", "rotation", "diveq")
DIVEQ_STD = 1e-3**0.5  # of the noise on a direction: variance 1e-3 for each channel
TINY = 1e-6  # the smallest length that divides


def estimate(
    z: Tensor, z_q: Tensor, estimator: Estimator = "straight_through", training: bool = False
) -> Tensor:
    """Return the codes z_q (..., C) with a gradient to the latents z (..., C).

    Where nothing needs a gradient, these are the codes themselves, bit for bit. Without `training`, DiVeQ has
    no noise.
    """
    if not (torch.is_grad_enabled() and (z.requires_grad or z_q.requires_grad)):
        return z_q
    if estimator == "diveq":
        return diveq(z, z_q, DIVEQ_STD if training else 0.0)
    return rotate(z, z_q) if estimator == "rotation" else straight_through(z, z_q)


def check_estimator(estimator: str) -> Estimator:
    """Return the estimator, or raise ValueError for one that does not exist."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: {estimator!r}: give one of {', '.join(ESTIMATORS)}")
    return cast(Estimator, estimator)


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """Copy the gradient of the code to the latent (Bengio et al. 2013, "Estimating or propagating")."""
    return z + (z_q - z).detach()


def rotate(z: Tensor, z_q: Tensor) -> Tensor:
    """Turn and scale the latent onto its code, with the turn and the scale taken as constants.

    z_q = (|z_q| / |z|) R z, R z = z - 2 (r.z) r + 2 (u.z) q, for u, q the directions of z and z_q and r
    that of u + q (Fifty et al. 2024, "Restructuring vector quantization with the rotation trick", section
    4.2). The gradient then keeps its angle to the code as it moves to the latent.
    """
    length, length_q = _length(z), _length(z_q)
    u, q = (z / length).detach(), (z_q / length_q).detach()
    r = (u + q).detach()
    r = r / _length(r)
    turned = z - 2 * (z * r).sum(-1, keepdim=True) * r + 2 * (z * u).sum(-1, keepdim=True) * q
    return turned * (length_q / length).detach()


def diveq(z: Tensor, z_q: Tensor, std: float) -> Tensor:
    """Go from the latent to its code by a distance with a gradient, in a noisy constant direction.

    z + |z_q - z| d, d the direction of z_q - z + std * noise (Vali et al. 2025, "DiVeQ: differentiable
    vector quantization using the reparameterization trick"). Latent and code both have a gradient, so that
    the codebook learns from the loss of the decoder.
    """
    step = (z_q - z).detach()
    direction = step + std * torch.randn_like(step)
    return z + _length(z_q - z) * (direction / _length(direction))


def _length(x: Tensor) -> Tensor:
    """Return the lengths (..., 1) of vectors (..., C), at least TINY."""
    return x.square().sum(-1, keepdim=True).clamp_min(TINY**2).sqrt()
