"""The VQGAN's loss: pixels, perceptual distance, codebook and patch discriminator.

B batch, C channels, H W pixels. Images are in [-1, 1]; everything here but the discriminator's convolutions
runs in float32, also under autocast. Steps are batches, counted by the model. Source: Esser et al. 2021,
equations 4 to 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.distributed import all_reduce_mean
from taming.modules.losses.lpips import LPIPS
from taming.parameters import NonNegativeFloat, PositiveFloat, PositiveInt

__all__ = [  # losses of other code bases build on `from ... import *`, torch's names among them
    "DummyLoss", "F", "LPIPS", "NLayerDiscriminator", "VQLPIPS", "VQLPIPSWithDiscriminator", "adopt_weight",
    "hinge_d_loss", "nn", "torch", "vanilla_d_loss", "weights_init",
]

PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class DummyLoss(nn.Module):
    """No loss, for a model that is used but not trained."""


def adopt_weight(weight: float, global_step: int, threshold: float = 0, value: float = 0.0) -> float:
    """Return `weight` from batch `threshold` on, `value` before it."""
    return value if global_step < threshold else weight


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (Lim and Ye 2017): real patches above 1, generated below -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the discriminator's cross-entropy (Goodfellow et al. 2014) on logits, in nats."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


class VQLPIPS(nn.Module):
    """Pixels, perceptual distance and codebook, without a discriminator: the loss of `VQNoDiscModel`.

    Args:
        codebook_weight: weight of the quantizer's loss.
        pixelloss_weight: weight of the distance of pixels.
        perceptual_weight: weight of LPIPS; 0 leaves it out, and its network is never loaded.
        perceptual_net, perceptual_path: network of LPIPS ("vgg", "alex", "squeeze"), and a file of its
            weights.
        pixel_loss: distance of pixels: "l1" as in the paper, or "l2" (squared), for images that are mostly
            background, such as edges, where the median that minimizes L1 is the background alone.

    Raises:
        ValueError: `pixel_loss` is unknown.
    """

    def __init__(
        self, codebook_weight: NonNegativeFloat = 1.0, pixelloss_weight: NonNegativeFloat = 1.0,
        perceptual_weight: NonNegativeFloat = 1.0, *,
        perceptual_net: str = "vgg", perceptual_path: str | None = None, pixel_loss: str = "l1",
    ):
        super().__init__()
        if pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f'pixel_loss: {pixel_loss!r} is unknown; choose "l1" or "l2"')
        self.terms: tuple[str, ...] = ("total_loss", "quant_loss", "nll_loss", "rec_loss", "p_loss")  # logged
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.codebook_weight, self.pixel_weight = codebook_weight, pixelloss_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = LPIPS(net=perceptual_net, trunk_path=perceptual_path)

    def forward(
        self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images (B, C, H, W) in [-1, 1] and reconstructions, and its terms to log."""
        loss, _, log = self._reconstruction(codebook_loss, inputs, reconstructions)
        log = {"total_loss": loss.detach(), **log}
        return loss, {f"{split}/{name}": value for name, value in log.items()}

    def _reconstruction(
        self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss (eq. 4 with LPIPS), its part that compares the images, and the terms to log."""
        rec_loss, p_loss = self._distances(inputs, reconstructions)
        nll_loss, codebook_loss = rec_loss.mean(), codebook_loss.float().mean()
        log = {
            "quant_loss": codebook_loss.detach(), "nll_loss": nll_loss.detach(),
            "rec_loss": rec_loss.detach().mean(), "p_loss": p_loss.detach().mean(),
        }
        return nll_loss + self.codebook_weight * codebook_loss, nll_loss, log

    def _distances(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of both distances, (B, C, H, W), and LPIPS alone, (B, 1, 1, 1) or (1,)."""
        with torch.autocast(inputs.device.type, enabled=False):
            inputs, rec = inputs.float(), reconstructions.float()
            rec_loss = self.pixel_weight * self.pixel_loss(rec, inputs, reduction="none")  # (B, C, H, W)
            p_loss = rec.new_zeros(1)
            if self.perceptual_weight > 0:
                p_loss = self.perceptual_loss(inputs, rec)  # (B, 1, 1, 1)
                rec_loss = rec_loss + self.perceptual_weight * p_loss
        return rec_loss, p_loss


class VQLPIPSWithDiscriminator(VQLPIPS):
    """Losses of the generator and the discriminator; `optimizer_idx` chooses between them.

    Args:
        disc_start: batch from which the discriminator is trained.
        codebook_weight, pixelloss_weight, perceptual_weight, perceptual_net, perceptual_path,
            pixel_loss: see `VQLPIPS`.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: see `NLayerDiscriminator`.
        disc_factor: factor of both adversarial losses.
        disc_weight: factor of the generator's adversarial loss, in addition to the adaptive weight.
        disc_conditional: the discriminator also sees `cond`, as further channels.
        disc_loss: "hinge" or "vanilla".
        gen_start: batch from which the generator's loss has its adversarial term; `disc_start` when None.
        gen_ramp: batches over which that term then grows linearly to its full weight.
        disc_adaptive: scale the adversarial gradient to that of the reconstruction at the decoder's last
            layer (eq. 7); False uses `disc_weight` alone, as most later work does.
        disc_adaptive_sync: compare the gradients of the batch of all processes together, so that several
            train as one would with that batch; False compares each process's own, as in 2021.
        disc_weight_max: upper bound of the adaptive weight.

    Raises:
        ValueError: `disc_loss` or `pixel_loss` is unknown, or `gen_start` is before `disc_start`.
    """

    def __init__(
        self, disc_start: NonNegativeFloat, codebook_weight: NonNegativeFloat = 1.0,
        pixelloss_weight: NonNegativeFloat = 1.0, disc_num_layers: PositiveInt = 3,
        disc_in_channels: PositiveInt = 3, disc_factor: NonNegativeFloat = 1.0,
        disc_weight: NonNegativeFloat = 1.0, perceptual_weight: NonNegativeFloat = 1.0,
        use_actnorm: bool = False, disc_conditional: bool = False, disc_ndf: PositiveInt = 64,
        disc_loss: str = "hinge", *, gen_start: NonNegativeFloat | None = None,
        gen_ramp: NonNegativeFloat = 0, disc_adaptive: bool = True, disc_adaptive_sync: bool = True,
        disc_weight_max: PositiveFloat = 1e4, perceptual_net: str = "vgg",
        perceptual_path: str | None = None, pixel_loss: str = "l1",
    ):
        super().__init__(
            codebook_weight, pixelloss_weight, perceptual_weight, perceptual_net=perceptual_net,
            perceptual_path=perceptual_path, pixel_loss=pixel_loss,
        )
        if disc_loss not in ("hinge", "vanilla"):
            raise ValueError(f'disc_loss: {disc_loss!r} is unknown; choose "hinge" or "vanilla"')
        self.discriminator = NLayerDiscriminator(
            input_nc=disc_in_channels, n_layers=disc_num_layers, use_actnorm=use_actnorm, ndf=disc_ndf
        ).apply(weights_init)
        self.channels = disc_in_channels
        self.terms += ("disc_factor", "d_weight", "g_loss", "disc_loss", "logits_real", "logits_fake")
        self.discriminator_iter_start = disc_start
        self.gen_start = disc_start if gen_start is None else gen_start
        if self.gen_start < disc_start:
            raise ValueError(
                f"gen_start: {gen_start} is before disc_start: {disc_start}, but the generator cannot learn "
                "from an untrained discriminator: raise gen_start or lower disc_start"
            )
        self.gen_ramp = gen_ramp
        self.disc_loss = hinge_d_loss if disc_loss == "hinge" else vanilla_d_loss
        self.disc_factor, self.discriminator_weight = disc_factor, disc_weight
        self.disc_adaptive, self.disc_adaptive_sync = disc_adaptive, disc_adaptive_sync
        self.disc_weight_max = disc_weight_max
        self.disc_conditional = disc_conditional

    def generator_factor(self, global_step: int) -> float:
        """Return the factor of the generator's adversarial loss: 0 before batch `gen_start`, then a ramp."""
        ramp = min(1.0, (global_step - self.gen_start + 1) / self.gen_ramp) if self.gen_ramp > 0 else 1.0
        return adopt_weight(self.disc_factor * ramp, global_step, threshold=self.gen_start)

    def calculate_adaptive_weight(
        self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None = None
    ) -> Tensor:
        """Return `disc_weight` x |grad nll| / (|grad g| + 1e-4), the gradients being at `last_layer` (eq. 7).

        A scalar without gradient; the fraction is at most `disc_weight_max`.
        """
        if last_layer is None:
            raise ValueError("the adaptive weight needs last_layer, the weight of the decoder's last layer")
        nll_grad = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)[0].float()
        g_grad = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0].float()
        if self.disc_adaptive_sync:  # those of the joined batch
            nll_grad, g_grad = all_reduce_mean(nll_grad), all_reduce_mean(g_grad)
        weight = nll_grad.norm() / (g_grad.norm() + 1e-4)
        return weight.clamp(0.0, self.disc_weight_max) * self.discriminator_weight

    def forward(  # type: ignore[override]  # another call than that of VQLPIPS
        self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor, optimizer_idx: int,
        global_step: int, last_layer: Tensor | None = None, cond: Tensor | None = None, split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss of the generator (`optimizer_idx` 0) or discriminator (1), and its terms to log.

        Terms without effect at `global_step` are neither computed nor logged.

        Args:
            codebook_loss: of the quantizer, any shape.
            inputs, reconstructions: (B, C, H, W) in [-1, 1].
            global_step: batches seen.
            last_layer: the parameter at which the adaptive weight compares gradients.
            cond: a condition (B, C', H, W) for the discriminator.
            split: prefix of the names to log.

        Raises:
            ValueError: `cond` is missing though `disc_conditional` is True, or given though it is False.
        """
        if self.disc_conditional != (cond is not None):
            given = "missing" if cond is None else "given"
            raise ValueError(f"disc_conditional is {self.disc_conditional}, but cond is {given}")
        if optimizer_idx == 0:
            loss, log = self._generator(codebook_loss, inputs, reconstructions, global_step, last_layer, cond)
        else:
            loss, log = self._discriminator(inputs, reconstructions, global_step, cond)
        return loss, {f"{split}/{name}": value for name, value in log.items()}

    def _generator(
        self, codebook_loss: Tensor, inputs: Tensor, reconstructions: Tensor, global_step: int,
        last_layer: Tensor | None, cond: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, nll_loss, terms = self._reconstruction(codebook_loss, inputs, reconstructions)
        factor = self.generator_factor(global_step)
        log: dict[str, Tensor | float] = {"disc_factor": factor}
        if factor > 0:
            # constants instead of the discriminator's parameters: this pass must not train it
            constants = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            logits_fake = functional_call(self.discriminator, constants, (self._seen(reconstructions, cond),))
            g_loss = -logits_fake.float().mean()
            d_weight = loss.new_tensor(self.discriminator_weight)
            if self.disc_adaptive and g_loss.requires_grad:  # there are no gradients in validation
                d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
            loss = loss + d_weight * factor * g_loss
            log |= {"d_weight": d_weight, "g_loss": g_loss.detach()}
        return loss, log | {"total_loss": loss.detach(), **terms}

    def _discriminator(
        self, inputs: Tensor, reconstructions: Tensor, global_step: int, cond: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        factor = adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)
        if factor == 0:
            return inputs.new_zeros((), dtype=torch.float32), {}
        logits_real = self.discriminator(self._seen(inputs.detach(), cond)).float()
        logits_fake = self.discriminator(self._seen(reconstructions.detach(), cond)).float()
        loss = factor * self.disc_loss(logits_real, logits_fake)
        log = {
            "disc_loss": loss.detach(), "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }
        return loss, log

    def _seen(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """Return the discriminator's input: the images, with the condition as further channels if given."""
        return images if cond is None else torch.cat((images, cond), dim=1)
