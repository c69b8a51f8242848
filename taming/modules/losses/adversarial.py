"""Losses of a discriminator with one logit per image, and the gradient penalty.

B batch, C channels, H W pixels. All is computed in float32, also under autocast.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.losses.vqperceptual import hinge_d_loss, vanilla_d_loss

Kind = Literal["wgangp", "hinge", "logistic"]


def wasserstein_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return E D(fake) - E D(real) (Arjovsky, Chintala and Bottou 2017, "Wasserstein GAN")."""
    return logits_fake.mean() - logits_real.mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wgangp": wasserstein_d_loss, "hinge": hinge_d_loss, "logistic": vanilla_d_loss,
}


def generator_loss(kind: Kind, logits_fake: Tensor) -> Tensor:
    """Return -E D(fake), or, of "logistic", its cross-entropy that does not saturate, in nats."""
    return F.softplus(-logits_fake).mean() if kind == "logistic" else -logits_fake.mean()


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, phi: float = 1.0
) -> Tensor:
    """Return E (|grad D(y)| - phi)^2 / phi^2 at points y between images (B, C, H, W), a random one per pair.

    The result has gradients: `discriminator` is differentiated twice, which fused attention kernels and
    compiled modules do not support. Source: Gulrajani et al. 2017, "Improved training of Wasserstein GANs",
    eq. 3; phi as in Karras et al. 2018, "Progressive growing of GANs".
    """
    with torch.autocast(real.device.type, enabled=False), torch.enable_grad():
        real, fake = real.detach().float(), fake.detach().float()
        a = torch.rand(len(real), 1, 1, 1, device=real.device)
        between = (a * real + (1.0 - a) * fake).requires_grad_()  # (B, C, H, W)
        logits = discriminator(between)
        (gradient,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
        norm = gradient.flatten(1).norm(dim=1)  # (B,)
        return ((norm - phi) / phi).square().mean()
