"""The first-stage losses of latent diffusion, with the arguments that its configs give.

B batch, C channels, H W pixels. Images are in [-1, 1].
"""

from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.losses import vqperceptual
from taming.modules.vae.gaussian import DiagonalGaussian
from taming.parameters import NonNegativeFloat, PositiveInt


class VQLPIPSWithDiscriminator(vqperceptual.VQLPIPSWithDiscriminator):
    """The VQGAN's loss, with two arguments that latent diffusion added.

    Args:
        n_classes: number of codes, without effect: validation always measures their perplexity.
        perceptual_loss: must be "lpips".
        args, kwargs: see `taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator`.

    Raises:
        ValueError: another `perceptual_loss`.
    """

    def __init__(
        self, *args: Any, n_classes: int | None = None, perceptual_loss: str = "lpips", **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.n_classes = n_classes
        if perceptual_loss != "lpips":
            raise ValueError(f"perceptual_loss: {perceptual_loss!r} is unknown; choose 'lpips'")


class LPIPSWithDiscriminator(vqperceptual.VQLPIPSWithDiscriminator):
    """The loss of a KL autoencoder: the VQGAN's, with the KL divergence in place of the codebook's term.

        L = sum over pixels (|x - x_rec| + LPIPS) / exp(s) + s, plus kl_weight * KL, plus the adversarial term

    Sums are per image, averaged over the batch; s, the log-variance of the reconstruction, is a parameter of
    this loss, `logvar`.

    Args:
        disc_start, pixelloss_weight, perceptual_weight, ...: see
            `taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator`.
        logvar_init: s at the beginning.
        kl_weight: weight of the divergence; 1e-6 in published models, whose latents are hardly regularized.
    """

    def __init__(
        self, disc_start: NonNegativeFloat, logvar_init: float = 0.0, kl_weight: NonNegativeFloat = 1.0,
        pixelloss_weight: NonNegativeFloat = 1.0, disc_num_layers: PositiveInt = 3,
        disc_in_channels: PositiveInt = 3, disc_factor: NonNegativeFloat = 1.0,
        disc_weight: NonNegativeFloat = 1.0, perceptual_weight: vqperceptual.Weights = 1.0,
        use_actnorm: bool = False, disc_conditional: bool = False, disc_loss: str = "hinge", **kwargs: Any,
    ):
        super().__init__(
            disc_start, pixelloss_weight=pixelloss_weight, disc_num_layers=disc_num_layers,
            disc_in_channels=disc_in_channels, disc_factor=disc_factor, disc_weight=disc_weight,
            perceptual_weight=perceptual_weight, use_actnorm=use_actnorm, disc_conditional=disc_conditional,
            disc_loss=disc_loss, **kwargs,
        )
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.ones(()) * logvar_init)
        renamed = {"quant_loss": "kl_loss"}
        self.terms = (*(renamed.get(name, name) for name in self.terms), "logvar")

    def forward(  # type: ignore[override]  # another order than the VQGAN's loss
        self, inputs: Tensor, reconstructions: Tensor, posteriors: DiagonalGaussian, optimizer_idx: int,
        global_step: int, last_layer: Tensor | None = None, cond: Tensor | None = None, split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss of the generator (`optimizer_idx` 0) or discriminator (1), and its terms to log.

        Args:
            posteriors: of the latents.
            inputs, reconstructions, global_step, last_layer, cond, split: see the parent.
        """
        return super().forward(
            posteriors.kl(), inputs, reconstructions, optimizer_idx, global_step, last_layer, cond, split
        )

    def _reconstruction(
        self, kl: Tensor, inputs: Tensor, reconstructions: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss, its part that compares the images, and the terms to log; kl: (B,)."""
        rec_loss, p_loss = self._distances(inputs, reconstructions)
        logvar = self.logvar.float()
        nll_loss = (rec_loss * torch.exp(-logvar) + logvar).flatten(1).sum(1).mean()
        kl = kl.mean()
        log = {
            "kl_loss": kl.detach(), "nll_loss": nll_loss.detach(), "rec_loss": rec_loss.detach().mean(),
            "p_loss": p_loss.detach().mean(), "logvar": logvar.detach(),
        }
        return nll_loss + self.kl_weight * kl, nll_loss, log
