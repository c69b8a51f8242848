"""Losses of a discriminator and of its opponent, and the penalties on a discriminator's gradient.

B batch, C channels, H W pixels. Logits have any shape; all is computed in float32, also under autocast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["wgangp", "hinge", "logistic"]


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (Lim and Ye 2017): real patches above 1, generated below -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the discriminator's cross-entropy (Goodfellow et al. 2014) on logits, in nats."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def non_saturating_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the cross-entropy of one logit (B, ...) per image, the mean over its patches, in nats."""
    return vanilla_d_loss(_of_images(logits_real), _of_images(logits_fake))


def wasserstein_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return E D(fake) - E D(real) (Arjovsky, Chintala and Bottou 2017, "Wasserstein GAN")."""
    return logits_fake.mean() - logits_real.mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wgangp": wasserstein_d_loss, "hinge": hinge_d_loss, "logistic": vanilla_d_loss,
}
# of a tokenizer: "vanilla" is that of 2021, whose generator maximizes the logit
PATCH_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_d_loss, "vanilla": vanilla_d_loss, "non_saturating": non_saturating_d_loss,
}


GENERATOR_LOSSES = ("linear", "non_saturating")  # of a tokenizer; see `generator_loss`


def generator_loss(kind: str, logits_fake: Tensor) -> Tensor:
    """Return -E D(fake), or, of "logistic" and "non_saturating", the cross-entropy of D(fake), in nats.

    It does not saturate where the discriminator is sure (Goodfellow et al. 2014, section 3). The logits of
    the patches of an image are averaged before.
    """
    is_entropy = kind in ("logistic", "non_saturating")
    return F.softplus(-_of_images(logits_fake)).mean() if is_entropy else -logits_fake.mean()


def _of_images(logits: Tensor) -> Tensor:
    """Average the logits (B, ...) of each image: (B,)."""
    return logits.reshape(len(logits), -1).mean(1)


_state = {"twice": False}


def differentiated_twice() -> bool:
    """Tell whether the network that runs now will be differentiated twice; compiled ones cannot be."""
    return _state["twice"]


@contextmanager
def _differentiating_twice() -> Iterator[None]:
    _state["twice"] = True
    try:
        yield
    finally:
        _state["twice"] = False


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, phi: float = 1.0
) -> Tensor:
    """Return E (|grad D(y)| - phi)^2 / phi^2 at points y between images (B, C, H, W), a random one per pair.

    The result has gradients: `discriminator` is differentiated twice, which fused attention kernels do not
    support. Source: Gulrajani et al. 2017, "Improved training of Wasserstein GANs",
    eq. 3; phi as in Karras et al. 2018, "Progressive growing of GANs".
    """
    with torch.autocast(real.device.type, enabled=False), torch.enable_grad():
        real, fake = real.detach().float(), fake.detach().float()
        a = torch.rand(len(real), 1, 1, 1, device=real.device)
        between = (a * real + (1.0 - a) * fake).requires_grad_()  # (B, C, H, W)
        with _differentiating_twice():
            logits = discriminator(between)
        (gradient,) = torch.autograd.grad(logits.sum(), between, create_graph=True)
        norm = gradient.flatten(1).norm(dim=1)  # (B,)
        return ((norm - phi) / phi).square().mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Return 1/2 E |grad D(x)|^2 at real images x (B, C, H, W); the logits of an image are averaged.

    The result has gradients: `discriminator` is differentiated twice. Source: Mescheder, Geiger and Nowozin
    2018, "Which training methods for GANs do actually converge?", eq. 9.
    """
    with torch.autocast(real.device.type, enabled=False), torch.enable_grad():
        real = real.detach().float().requires_grad_()
        with _differentiating_twice():
            logits = discriminator(real)
        total = _of_images(logits).sum()
        (gradient,) = torch.autograd.grad(total, real, create_graph=True)
        return 0.5 * gradient.square().sum((1, 2, 3)).mean()


def not_twice_differentiable() -> ValueError:
    """Make the error of a discriminator that R1 cannot be used with."""
    return ValueError(
        "r1_weight: R1 differentiates the discriminator twice, and this one cannot be: fused attention has "
        "no second derivative. Set r1_weight: 0, or name another discriminator in disc_config"
    )
