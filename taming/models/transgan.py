"""TransGAN: a GAN made of transformers alone (Jiang, Chang and Wang 2021, arXiv 2102.07074, first version).

B batch, H W pixels, d latent dimensions, h w grid of the generator's entry stage. Images are in [-1, 1].
"""

import copy
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.config import instantiate_from_config
from taming.models.base import ImageModel, LatentGenerator
from taming.models.tokenizer import ImageSizes
from taming.modules.discriminator.diffaugment import DiffAugment
from taming.modules.losses.adversarial import DISCRIMINATOR_LOSSES, Kind, generator_loss, gradient_penalty
from taming.modules.transgan.discriminator import ViTDiscriminator
from taming.modules.transgan.generator import TransGANGenerator
from taming.modules.transgan.locality import check_schedule, radius_at
from taming.parameters import (
    NonNegativeFloat,
    NonNegativeInt,
    ParametersOf,
    PositiveFloat,
    PositiveInt,
    Probability,
)

Betas = tuple[Probability, Probability]


class TransGAN(ImageSizes, LatentGenerator, ImageModel):
    """Generates images of noise; see docs/models.md for the losses.

    A batch is one step of the discriminator; every `n_critic`-th is followed by one of the generator, on
    twice as many latents. `generator_ema` has running means of the generator's weights; it samples.

    Args:
        generator: arguments of `taming.modules.transgan.generator.TransGANGenerator`.
        discriminator: arguments of `taming.modules.transgan.discriminator.ViTDiscriminator`.
        augment: arguments of `taming.modules.discriminator.diffaugment.DiffAugment`; None: no augmentation.
        ckpt_path, ignore_keys, image_key, monitor, scheduler_config, betas: see `VQModel`.
        loss: "wgangp", "hinge" or "logistic".
        gp_weight: weight of the gradient penalty, 0 to leave it out.
        gp_phi: norm of the gradient that the penalty asks for.
        drift_weight: weight of (E D(real))^2, which keeps the logits from drifting.
        n_critic: steps of the discriminator per step of the generator.
        sr_weight: weight of the mean squared error of super-resolution, the second task of the generator;
            0 to leave it out. Needs `generator.entry_stage`.
        locality: list of [epoch, radius]: before that epoch, queries of the last stage see pixels up to the
            radius; epochs and radii rise. Afterwards, and in sampling, they see all.
        ema_decay: share of the running means that is kept in each step of the generator: 0.999 forgets over
            1,000 of them. Short runs need less, for instance 0.99; 0 keeps the weights themselves.
        generator_config, discriminator_config: `{target, params}` of other networks, which take the size of
            the images, of the generator also that of the latents, and `params`; for instance
            `taming.modules.transgan.convolutional.ConvGenerator`.

    Raises:
        ValueError: settings that do not go together.
    """

    def __init__(
        self, generator: Annotated[dict, ParametersOf(TransGANGenerator)],
        discriminator: Annotated[dict, ParametersOf(ViTDiscriminator)],
        augment: Annotated[dict, ParametersOf(DiffAugment)] | None = None,
        ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (), image_key: str = "image",
        monitor: str | None = None, *,
        loss: Kind = "wgangp", gp_weight: NonNegativeFloat = 10.0, gp_phi: PositiveFloat = 1.0,
        drift_weight: NonNegativeFloat = 1e-3, n_critic: PositiveInt = 5, sr_weight: NonNegativeFloat = 0.0,
        locality: list[tuple[NonNegativeInt, NonNegativeInt]] | None = None,
        ema_decay: Probability = 0.999, betas: Betas = (0.0, 0.99), scheduler_config: dict | None = None,
        generator_config: dict | None = None, discriminator_config: dict | None = None,
    ):
        super().__init__(monitor, scheduler_config)
        self.generator: Any = _other(generator_config, generator, "resolution", "latent_dim") \
            if generator_config else TransGANGenerator(**generator)
        self.discriminator: Any = _other(discriminator_config, discriminator, "resolution") \
            if discriminator_config else ViTDiscriminator(**discriminator)
        self.augment = None if augment is None else DiffAugment(**augment)
        self.resolution, self.factor = self.generator.resolution, 1
        if self.generator.image_size != self.discriminator.image_size:
            raise ValueError(
                f"generator.resolution is {self.generator.image_size}, but discriminator.resolution "
                f"{self.discriminator.image_size}: set both to the size of the images"
            )
        if loss not in DISCRIMINATOR_LOSSES:
            raise ValueError(f"loss: {loss!r} is unknown; choose one of {', '.join(DISCRIMINATOR_LOSSES)}")
        if gp_weight and self.discriminator.fused_attention:
            raise ValueError(
                f"gp_weight: {gp_weight} is not possible with discriminator.fused_attention: true. The "
                "gradient penalty differentiates the discriminator twice, and torch's fused attention "
                "kernels have no second derivative: set fused_attention: false, or gp_weight: 0 with another "
                "loss than wgangp"
            )
        if loss == "wgangp" and not gp_weight:
            raise ValueError(
                "gp_weight: 0 leaves the loss wgangp without a bound: set 10, or loss: hinge or logistic"
            )
        if bool(sr_weight) != (self.generator.entry_stage is not None):
            raise ValueError(
                f"sr_weight: {sr_weight} and generator.entry_stage: {self.generator.entry_stage} do not go "
                "together: super-resolution needs both, for instance 50 and 2; set 0 and null for none"
            )
        check_schedule(locality or [])
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False)
        self.generator_ema.from_rgb = None  # sampling needs no images
        self.image_key, self.betas = image_key, (betas[0], betas[1])
        self.loss_kind, self.gp_weight, self.gp_phi, self.drift_weight = loss, gp_weight, gp_phi, drift_weight
        self.n_critic, self.sr_weight, self.ema_decay = n_critic, sr_weight, ema_decay
        self.locality = locality or []
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    size_settings = ("generator.resolution", "discriminator.resolution")

    @property
    def latent_dim(self) -> int:
        """Size d of the noise."""
        return self.generator.latent_dim

    @property
    def generator_steps(self) -> int:
        """Number of steps of the generator; `batches_seen` counts those of the discriminator."""
        return -(-self.batches_seen // self.n_critic)

    # ---- images

    def forward(self, z: Tensor) -> Tensor:
        """Generate images (B, 3, H, W) of latents (B, d), by the running means of the weights."""
        return self.generator_ema(z)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Generate images (n, 3, H, W) of latents from N(0, I)."""
        device = generator.device if generator else self.device
        z = torch.randn(n, self.latent_dim, generator=generator, device=device)
        return self(z.to(self.device))

    def get_images(self, batch: dict) -> Tensor:
        """Return the images of a batch, (B, 3, H, W).

        Raises:
            ValueError: not 3 channels.
        """
        x = self.get_input(batch, self.image_key)
        if x.shape[1] != 3:
            raise ValueError(f"TransGAN takes images of 3 channels, got {x.shape[1]}")
        return x

    def check_batch(self, batch: dict) -> None:
        """Raise ValueError if the images have another size than the networks."""
        self.check_training_size(*self.get_images(batch).shape[2:])

    def judge(self, x: Tensor) -> Tensor:
        """Return logits (B, 1) of images (B, 3, H, W), each augmented at random."""
        return self.discriminator(x if self.augment is None else self.augment(x))

    # ---- training

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take a step of the discriminator and, every `n_critic` steps, one of the generator."""
        x = self.get_images(batch)  #                                           (B, 3, H, W)
        log = self.discriminator_losses(x)
        self.check_finite(log, batch_idx)
        self.backward_of(log["train/d_loss"], self.generator)
        log = {name: value.detach() for name, value in log.items()}
        if self.gradients_complete():
            optimizers: Any = self.optimizers()
            for_generator, for_discriminator = optimizers
            log["train/lr_disc"] = torch.tensor(self.set_learning_rate(for_discriminator))
            log["train/grad_norm_disc"] = self.clip_grad_norm(self.discriminator.parameters())
            for_discriminator.step()
            self.zero_grad(set_to_none=True)
            if self.batches_seen % self.n_critic == 0:
                log |= self.generator_step(x, for_generator, batch_idx)
            self.batches_seen += 1
        if (radius := self.radius()) is not None:
            log["train/locality_radius"] = torch.tensor(float(radius))
        self.log_dict(log, batch_size=len(x))
        self.log("d_loss", log["train/d_loss"], prog_bar=True, logger=False, batch_size=len(x))

    def discriminator_losses(self, x: Tensor) -> dict[str, Tensor]:
        """Return the discriminator's loss of images (B, 3, H, W), "train/d_loss", and its terms."""
        z = torch.randn(len(x), self.latent_dim, device=x.device)  #            (B, d)
        with torch.no_grad():
            fake = self.generator(z, self.radius())  #                          (B, 3, H, W)
        real_logits, fake_logits = self.judge(x).float(), self.judge(fake).float()  # (B, 1) each
        loss = DISCRIMINATOR_LOSSES[self.loss_kind](real_logits, fake_logits)
        log = {"train/logits_real": real_logits.mean(), "train/logits_fake": fake_logits.mean()}
        if self.gp_weight:
            log["train/gp"] = gradient_penalty(self.judge, x, fake, self.gp_phi)  # through the augmentation
            loss = loss + self.gp_weight * log["train/gp"]
        if self.drift_weight:
            loss = loss + self.drift_weight * real_logits.mean().square()
        return log | {"train/d_loss": loss}

    def generator_step(self, x: Tensor, optimizer: Any, batch_idx: int) -> dict[str, Tensor]:
        """Take a step of the generator, with images (B, 3, H, W) to enlarge; return what to log."""
        idle = [] if self.trainer.world_size > 1 else [  # ddp wants all gradients
            p for p in self.discriminator.parameters() if p.requires_grad
        ]
        try:
            for p in idle:
                p.requires_grad_(False)
            for _ in range(self.accumulate_grad_batches):
                log = self.generator_losses(x)
                self.check_finite(log, batch_idx)
                self.backward_of(log["train/g_loss"], self.discriminator)
        finally:
            for p in idle:
                p.requires_grad_(True)
        log = {name: value.detach() for name, value in log.items()}
        log["train/lr"] = torch.tensor(self.set_learning_rate(optimizer))
        log["train/grad_norm"] = self.clip_grad_norm(self.generator.parameters())
        optimizer.step()
        self.zero_grad(set_to_none=True)
        self.update_ema()
        return log

    def generator_losses(self, x: Tensor) -> dict[str, Tensor]:
        """Return the generator's loss, "train/g_loss", and its terms; `x` (B, 3, H, W) is what to enlarge."""
        z = torch.randn(2 * len(x), self.latent_dim, device=x.device)  #        (2 B, d)
        logits = self.judge(self.generator(z, self.radius())).float()  #        (2 B, 1)
        loss = generator_loss(self.loss_kind, logits)
        log = {"train/g_adv": loss}
        if self.sr_weight and self.generator.entry_stage:
            grid = self.generator.grids[self.generator.entry_stage - 1]
            low = F.adaptive_avg_pool2d(x, grid)  #                             (B, 3, h, w)
            high = self.generator.super_resolve(low, self.radius())  #          (B, 3, H, W)
            log["train/sr_mse"] = F.mse_loss(high.float(), x)
            loss = loss + self.sr_weight * log["train/sr_mse"]
        return log | {"train/g_loss": loss}

    def backward_of(self, loss: Tensor, other: torch.nn.Module) -> None:
        """Backpropagate a batch's share of a loss that `other` has no part in."""
        if self.trainer.world_size > 1:  # ddp waits for the gradients of all parameters
            loss = loss + 0.0 * sum(p.sum() for p in other.parameters())
        self.manual_backward(loss / self.accumulate_grad_batches)

    def radius(self) -> int | None:
        """Return how far queries of the last stage see in this epoch, in pixels; None: everywhere."""
        return radius_at(self.locality, self.current_epoch)

    def freeze_parts(self, names: str | Sequence[str]) -> None:
        """Leave parts as they are; see `ImageModel.freeze_parts`.

        Raises:
            ValueError: see there; or one of the two networks would have nothing left to train.
        """
        super().freeze_parts(names)
        for name in ("generator", "discriminator"):
            if not any(p.requires_grad for p in self.get_submodule(name).parameters()):
                raise ValueError(
                    f"freeze: nothing of the {name} is left to train, and the two networks train each other: "
                    f"name parts of it, {name}.blocks for instance"
                )

    def keep_averages(self, decay: float | None, warmup: bool = True) -> None:
        """Raise unless `decay` is None: `generator_ema` has the averages.

        Raises:
            ValueError: a decay; the message says where to set it.
        """
        if decay is not None:
            raise ValueError("TransGAN has averages of its generator: set model.params.ema_decay instead")

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the running means towards the generator's weights."""
        now = dict(self.generator.named_parameters())
        for name, mean in self.generator_ema.named_parameters():
            mean.lerp_(now[name].detach(), 1.0 - self.ema_decay)

    def configure_optimizers(self) -> Any:
        """Make Adam for the generator and for the discriminator: ([both], [])."""
        rate = self.base_learning_rate()
        return [
            torch.optim.Adam(network.parameters(), lr=rate, betas=self.betas, fused=self.has_fused_step)
            for network in (self.generator, self.discriminator)
        ], []

    # ---- validation

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names that validation logs, without "val/"."""
        return ("loss", "logits_real", "logits_fake")

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log the discriminator's logits, without augmentation; "val/loss" is its loss without penalties.

        The loss tells whether one network has won, not how good images are: it depends on both networks.
        """
        x = self.get_images(batch)
        real, fake = self.discriminator(x).float(), self.discriminator(self.sample(len(x))).float()
        self.log_dict({
            "val/loss": DISCRIMINATOR_LOSSES[self.loss_kind](real, fake),
            "val/logits_real": real.mean(), "val/logits_fake": fake.mean(),
        }, batch_size=len(x), sync_dist=True, on_epoch=True)

    @torch.no_grad()
    def log_images(self, batch: dict, **kwargs) -> dict[str, Tensor]:
        """Return images of the batch and as many samples, (B, 3, H, W) in [-1, 1]; see `sample`.

        With super-resolution, also what the generator makes of the images after they were made small.
        """
        x = self.get_images(batch).to(self.device)
        shown = {"inputs": x}
        if self.generator.entry_stage:
            low = F.adaptive_avg_pool2d(x, self.generator.grids[self.generator.entry_stage - 1])
            shown["super_resolution"] = self.generator.super_resolve(low)
        return shown | {"samples": self.sample(len(x))}


def _other(config: dict, settings: dict, *shared: str) -> Any:
    """Build a network of `{target, params}`, with those settings that it shares with TransGAN's own."""
    params = {name: settings[name] for name in shared if name in settings} | (config.get("params") or {})
    return instantiate_from_config({"target": config.get("target"), "params": params})
