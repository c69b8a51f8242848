"""The VQGAN's loss: pixels, perceptual distance, codebook and discriminator.

B batch, C channels, H W pixels. Images are in [-1, 1]; everything here but the convolutions of the
discriminator and of LPIPS runs in float32, also under autocast. Steps are batches, counted by the model.
Source: Esser et al. 2021, equations 4 to 7.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from taming.modules.discriminator.blur import gaussian_blur
from taming.modules.discriminator.diffaugment import DiffAugment
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.distributed import all_reduce_mean
from taming.modules.losses.adversarial import (
    GENERATOR_LOSSES,
    PATCH_LOSSES,
    generator_loss,
    hinge_d_loss,
    not_twice_differentiable,
    r1_penalty,
    vanilla_d_loss,
)
from taming.modules.losses.lecam import LeCam
from taming.modules.losses.lpips import LPIPS
from taming.modules.losses.perceptual import build_perceptual
from taming.parameters import (
    NonNegativeFloat,
    NonNegativeInt,
    ParametersOf,
    PositiveFloat,
    PositiveInt,
    Probability,
    did_you_mean,
)

__all__ = [  # losses of other code bases build on `from ... import *`, torch's names among them
    "DummyLoss", "F", "LPIPS", "NLayerDiscriminator", "VQLPIPS", "VQLPIPSWithDiscriminator", "adopt_weight",
    "hinge_d_loss", "nn", "torch", "vanilla_d_loss", "weights_init",
]

Weights = NonNegativeFloat | list[NonNegativeFloat]
Maker = dict | Callable[..., nn.Module]
PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class DummyLoss(nn.Module):
    """No loss, for a model that is used but not trained."""


def adopt_weight(weight: float, global_step: int, threshold: float = 0, value: float = 0.0) -> float:
    """Return `weight` from batch `threshold` on, `value` before it."""
    return value if global_step < threshold else weight


def _maker(name: str, config: Maker | None) -> Callable[..., nn.Module] | None:
    """Return what makes a network, if it is not None."""
    if isinstance(config, dict):
        raise ValueError(
            f"{name}: {config} is for a model, which builds it by taming.models.autoencoder.build_loss; in "
            "Python give the class of the network, or functools.partial of it"
        )
    return config


class VQLPIPS(nn.Module):
    """Pixels, perceptual distance and codebook, without a discriminator: the loss of `VQNoDiscModel`.

    Args:
        codebook_weight: weight of the quantizer's loss.
        pixelloss_weight: weight of the distance of pixels.
        perceptual_weight: weight of the perceptual distance; 0 leaves it out, and its network is never
            loaded. A list has a weight for each network.
        perceptual_net, perceptual_path: the distance, and a file of its weights: LPIPS with "vgg", "alex" or
            "squeeze", or another, or a list of several; see `perceptual.perceptual_distance`.
        perceptual_config: makes another distance, called as distance(inputs, rec) under the autocast of
            the run, with a result (B, 1, 1, 1). In a configuration `{target, params}`; see
            `taming.models.autoencoder.build_loss`.
        pixel_loss: distance of pixels: "l1" as in the paper, or "l2" (squared), for images that are mostly
            background, such as edges, where the median that minimizes L1 is the background alone.

    Raises:
        ValueError: `pixel_loss` or `perceptual_net` is unknown.
    """

    def __init__(
        self, codebook_weight: NonNegativeFloat = 1.0, pixelloss_weight: NonNegativeFloat = 1.0,
        perceptual_weight: Weights = 1.0, *,
        perceptual_net: str | list[str] = "vgg", perceptual_path: str | None = None, pixel_loss: str = "l1",
        perceptual_config: Maker | None = None,
    ):
        super().__init__()
        if pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f'pixel_loss: {pixel_loss!r} is unknown; choose "l1" or "l2"')
        self.terms: tuple[str, ...] = ("total_loss", "quant_loss", "nll_loss", "rec_loss", "p_loss")  # logged
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.codebook_weight, self.pixel_weight = codebook_weight, pixelloss_weight
        self.perceptual_loss, self.perceptual_weight = build_perceptual(
            perceptual_net, perceptual_weight, perceptual_path, _maker("perceptual_config", perceptual_config)
        )

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
        """Return the weighted sum of both distances, (B, C, H, W), and the perceptual one, (B, 1, 1, 1)."""
        with torch.autocast(inputs.device.type, enabled=False):
            inputs, rec = inputs.float(), reconstructions.float()
            rec_loss = self.pixel_weight * self.pixel_loss(rec, inputs, reduction="none")  # (B, C, H, W)
        p_loss = rec.new_zeros(1)
        if self.perceptual_weight > 0:
            p_loss = self.perceptual_loss(inputs, rec).float()  # (B, 1, 1, 1)
            rec_loss = rec_loss + self.perceptual_weight * p_loss
        return rec_loss, p_loss


class VQLPIPSWithDiscriminator(VQLPIPS):
    """Losses of the generator and the discriminator; `optimizer_idx` chooses between them.

    Args:
        disc_start: batch from which the discriminator is trained.
        codebook_weight, pixelloss_weight, perceptual_weight, perceptual_net, perceptual_path,
            perceptual_config, pixel_loss: see `VQLPIPS`.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: see `NLayerDiscriminator`.
        disc_factor: factor of both adversarial losses.
        disc_weight: factor of the generator's adversarial loss, in addition to the adaptive weight.
        disc_conditional: the discriminator also sees `cond`, as further channels.
        disc_loss: "hinge", "vanilla" (cross-entropy of each patch) or "non_saturating" (of each image).
        gen_loss: the generator's term: "linear", minus the mean logit, or "non_saturating", a cross-entropy;
            None: linear, but for the `disc_loss` "non_saturating".
        gen_start: batch from which the generator's loss has its adversarial term; `disc_start` when None.
        gen_ramp: batches over which that term then grows linearly to its full weight.
        disc_adaptive: scale the adversarial gradient to that of the reconstruction at the decoder's last
            layer (eq. 7); False uses `disc_weight` alone, as most later work does.
        disc_adaptive_sync: compare the gradients of the batch of all processes together, so that several
            train as one would with that batch; False compares each process's own, as in 2021.
        disc_weight_max: upper bound of the adaptive weight.
        disc_config: makes another discriminator, given `input_nc`, the channels of images. It is called
            with images (B, C, H, W), and gives logits of any shape that begins with B. In a configuration
            `{target, params}`; see `taming.models.autoencoder.build_loss`.
        disc_augment: arguments of `DiffAugment`, for what the discriminator sees in training; None: nothing.
        disc_blur: deviation in pixels of a blur of what the discriminator sees in training.
        disc_blur_batches: batches from `disc_start` on over which the blur goes to 0; 0: it stays.
        lecam_weight, lecam_decay: weight of the LeCam regularisation, and its running means; see `LeCam`.
        r1_weight: weight of the R1 penalty, 1/2 E |grad D|^2 at real images; see `r1_penalty`.
        r1_every: batches from one R1 penalty to the next; its weight is multiplied by that (Karras et al.
            2020, "Analyzing and improving the image quality of StyleGAN", appendix B).

    Raises:
        ValueError: a name is unknown, `gen_start` is before `disc_start`, or the discriminator cannot be
            differentiated twice, as R1 requires.
    """

    def __init__(
        self, disc_start: NonNegativeFloat, codebook_weight: NonNegativeFloat = 1.0,
        pixelloss_weight: NonNegativeFloat = 1.0, disc_num_layers: PositiveInt = 3,
        disc_in_channels: PositiveInt = 3, disc_factor: NonNegativeFloat = 1.0,
        disc_weight: NonNegativeFloat = 1.0, perceptual_weight: Weights = 1.0,
        use_actnorm: bool = False, disc_conditional: bool = False, disc_ndf: PositiveInt = 64,
        disc_loss: str = "hinge", *, gen_loss: str | None = None, gen_start: NonNegativeFloat | None = None,
        gen_ramp: NonNegativeFloat = 0, disc_adaptive: bool = True, disc_adaptive_sync: bool = True,
        disc_weight_max: PositiveFloat = 1e4, disc_config: Maker | None = None,
        disc_augment: Annotated[dict, ParametersOf(DiffAugment)] | None = None,
        disc_blur: NonNegativeFloat = 0.0, disc_blur_batches: NonNegativeInt = 0,
        lecam_weight: NonNegativeFloat = 0.0, lecam_decay: Probability = 0.999,
        r1_weight: NonNegativeFloat = 0.0, r1_every: PositiveInt = 16, **distances: Any,
    ):
        super().__init__(codebook_weight, pixelloss_weight, perceptual_weight, **distances)
        if disc_loss not in PATCH_LOSSES:
            near, known = did_you_mean(str(disc_loss), PATCH_LOSSES), ", ".join(PATCH_LOSSES)
            raise ValueError(f"disc_loss: {disc_loss!r} is unknown{near}; choose one of {known}")
        gen_loss = gen_loss or ("non_saturating" if disc_loss == "non_saturating" else "linear")
        if gen_loss not in GENERATOR_LOSSES:
            known = " or ".join(GENERATOR_LOSSES)
            raise ValueError(f"gen_loss: {gen_loss!r} is unknown; choose {known}")
        self.gen_start = disc_start if gen_start is None else gen_start
        if self.gen_start < disc_start:
            raise ValueError(
                f"gen_start: {gen_start} is before disc_start: {disc_start}, but the generator cannot learn "
                "from an untrained discriminator: raise gen_start or lower disc_start"
            )
        patches: dict[str, Any] = {"n_layers": disc_num_layers, "ndf": disc_ndf, "use_actnorm": use_actnorm}
        if disc_config and patches != {"n_layers": 3, "ndf": 64, "use_actnorm": False}:
            raise ValueError(
                "disc_num_layers, disc_ndf and use_actnorm are those of the patch discriminator: leave them "
                "out, or at 3, 64 and false, and give the arguments of another one as disc_config.params"
            )
        self._make_discriminator = _maker("disc_config", disc_config)
        self._disc_arguments: dict[str, Any] = {"input_nc": disc_in_channels, **patches}
        self.discriminator = self.build_discriminator()
        if r1_weight and not getattr(self.discriminator, "twice_differentiable", True):
            raise not_twice_differentiable()
        self.channels = disc_in_channels
        self.terms += ("disc_factor", "d_weight", "g_loss", "disc_loss", "logits_real", "logits_fake")
        self.discriminator_iter_start = disc_start
        self.gen_ramp = gen_ramp
        self.gen_loss, self.disc_loss = gen_loss, PATCH_LOSSES[disc_loss]
        self.disc_factor, self.discriminator_weight = disc_factor, disc_weight
        self.disc_adaptive, self.disc_adaptive_sync = disc_adaptive, disc_adaptive_sync
        self.disc_weight_max = disc_weight_max
        self.disc_conditional = disc_conditional
        self.augment = None if disc_augment is None else DiffAugment(**disc_augment)
        self.blur, self.blur_batches = disc_blur, disc_blur_batches
        self.lecam_weight = lecam_weight
        if lecam_weight:  # only then: its keys would be missing in checkpoints of 2021
            self.lecam = LeCam(lecam_decay)
        self.r1_weight, self.r1_every = r1_weight, r1_every

    def build_discriminator(self) -> Any:
        """Return a new discriminator, with weights as training begins."""
        if self._make_discriminator is None:
            return NLayerDiscriminator(**self._disc_arguments).apply(weights_init)
        return self._make_discriminator(input_nc=self._disc_arguments["input_nc"])

    def check_discriminator(self, images: Tensor) -> None:
        """Try the discriminator on images (B, C, H, W) before training; its state stays.

        Raises:
            ValueError, FileNotFoundError: the images are too small for it, R1 is not possible, or a frozen
                network lacks its weights.
        """
        if self.disc_factor == 0 or self.disc_conditional:
            return
        was_training = self.discriminator.training
        self.discriminator.eval()
        if self.r1_weight:
            try:
                penalty = r1_penalty(self.discriminator, images)
                torch.autograd.grad(penalty, [*self.discriminator.parameters()], allow_unused=True)
            except RuntimeError as error:
                if any(words in str(error) for words in ("derivative", "double backward")):
                    raise not_twice_differentiable() from error
                raise
        with torch.no_grad():
            self.discriminator(images)
        self.discriminator.train(was_training)

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
            seen = self._seen(reconstructions, cond, global_step)
            logits_fake = functional_call(self.discriminator, constants, (seen,))
            g_loss = generator_loss(self.gen_loss, logits_fake.float())
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
        def judge(images: Tensor) -> Tensor:
            return self.discriminator(self._seen(images, cond, global_step)).float()

        logits_real, logits_fake = judge(inputs.detach()), judge(reconstructions.detach())
        loss = self.disc_loss(logits_real, logits_fake)
        log: dict[str, Tensor | float] = {
            "disc_loss": factor * loss.detach(), "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }
        if self.training:
            for name, weight, value in self._penalties(judge, inputs, logits_real, logits_fake, global_step):
                loss = loss + weight * value
                log[name] = value.detach()
        return factor * loss, log

    def _penalties(
        self, judge: Callable[[Tensor], Tensor], inputs: Tensor, logits_real: Tensor, logits_fake: Tensor,
        global_step: int,
    ) -> list[tuple[str, float, Tensor]]:
        """Return name, weight and value of what is added to the discriminator's loss in training."""
        penalties = []
        if self.lecam_weight:
            penalties.append(("lecam_loss", self.lecam_weight, self.lecam(logits_real, logits_fake)))
        if self.r1_weight and global_step % self.r1_every == 0:
            penalties.append(("r1_penalty", self.r1_weight * self.r1_every, r1_penalty(judge, inputs)))
        return penalties

    def blur_at(self, global_step: int) -> float:
        """Return the deviation, in pixels, of the blur of what the discriminator sees."""
        if not self.blur_batches:
            return self.blur
        return self.blur * max(0.0, 1.0 - (global_step - self.discriminator_iter_start) / self.blur_batches)

    def _seen(self, images: Tensor, cond: Tensor | None, global_step: int) -> Tensor:
        """Return the discriminator's input: images, with a condition as further channels if it is given.

        In training they are augmented and blurred.
        """
        images = images if cond is None else torch.cat((images, cond), dim=1)
        if self.training:
            images = images if self.augment is None else self.augment(images)
            images = gaussian_blur(images, self.blur_at(global_step)) if self.blur else images
        return images
