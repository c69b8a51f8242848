"""The variational autoencoder (Kingma and Welling 2014, "Auto-encoding variational Bayes").

B batch, C channels, H W pixels, d latent dimensions. Images are in [-1, 1].
"""

import math
from typing import Annotated, Any

import torch
from torch import Tensor

from taming.metrics import psnr, ssim
from taming.models.autoencoder import Autoencoder, Betas
from taming.models.base import LatentGenerator
from taming.models.tokenizer import SizeMismatch
from taming.modules.vae.gaussian import DiagonalGaussian, gaussian_log_prob
from taming.modules.vae.likelihoods import make_likelihood
from taming.modules.vae.networks import Decoder, Encoder
from taming.parameters import NonNegativeFloat, NonNegativeInt, ParametersOf, PositiveFloat

DDConfig = Annotated[dict, ParametersOf(Encoder)]
ACTIVE = 0.01  # nats that a latent dimension must hold to count as used


class GaussianVAE(Autoencoder, LatentGenerator):
    """A variational autoencoder with p(z) = N(0, I) and a diagonal Gaussian posterior q(z | x).

        ELBO(x) = E_q log p(x | z) - KL(q(z | x) || p(z)) <= log p(x)          eq. 3

    Training minimizes -E_q log p(x | z) + beta * KL, sums per image averaged over the batch, in nats. It has
    no codes; it is not a tokenizer.

    Args:
        ddconfig: arguments of `taming.modules.vae.networks.Encoder` and `Decoder`.
        likelihood: p(x | z): "gaussian" with the deviation `sigma`, "gaussian_learned", which begins there,
            "bernoulli", or "disc_logistic", which gives bits per dimension.
        sigma: deviation of a pixel, on the scale of [-1, 1].
        ckpt_path, ignore_keys, image_key, monitor, scheduler_config, betas: see `VQModel`.
        beta: weight of the KL divergence; 1 is the bound (Higgins et al. 2017, "beta-VAE").
        kl_warmup: batches over which that weight rises from 0, linearly.
        free_bits: nats that each latent dimension may hold, on average over a batch, before its divergence
            counts (Kingma et al. 2016, "Improving variational inference with inverse autoregressive flow").

    Raises:
        ValueError: an unknown likelihood or normalization.
    """

    factor = 1

    def __init__(
        self, ddconfig: DDConfig, likelihood: str = "gaussian", sigma: PositiveFloat = 1.0,
        ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (), image_key: str = "image",
        monitor: str | None = None, *,
        beta: NonNegativeFloat = 1.0, kl_warmup: NonNegativeInt = 0, free_bits: NonNegativeFloat = 0.0,
        betas: Betas = (0.9, 0.999), scheduler_config: dict | None = None,
    ):
        super().__init__(image_key, betas, monitor, scheduler_config)
        self.loss = None
        self.beta, self.kl_warmup, self.free_bits = beta, kl_warmup, free_bits
        self.likelihood = make_likelihood(likelihood, sigma)
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig, out_ch=self.likelihood.n_params(self.encoder.in_channels))
        self.resolution, self.channels = self.encoder.resolution, self.encoder.in_channels
        self.latent_dim = self.encoder.latent_dim
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    # ---- images <-> latents

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) of the model's size to the posterior of their latents (B, d)."""
        self.check_channels(x)
        if tuple(x.shape[2:]) != self.image_size:
            raise SizeMismatch((x.shape[2], x.shape[3]), self.image_size)
        with self.own_precision(x):
            return DiagonalGaussian(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, d) to the expected images (B, C, H, W), about in [-1, 1]."""
        return self.likelihood.mean(self.decode_params(z))

    def forward(self, input: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Decode a sample of the posterior of images (B, C, H, W): (images, posterior)."""
        posterior = self.encode(input)
        return self.decode(posterior.sample()), posterior

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode images (B, C, H, W) by the mean of the posterior: always the same result."""
        return self.decode(self.encode(x).mode())

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Generate images (n, C, H, W): the expected images of latents from N(0, I)."""
        device = generator.device if generator else self.device
        z = torch.randn(n, self.latent_dim, generator=generator, device=device)
        return self.decode(z.to(self.device))

    def decode_params(self, z: Tensor) -> Tensor:
        """Return the parameters of p(x | z) of latents (B, d)."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"latents are (B, {self.latent_dim}), ddconfig.latent_dim; got {tuple(z.shape)}")
        with self.own_precision(z):
            return self.decoder(z)

    # ---- bounds

    def elbo(self, x: Tensor, samples: int = 1) -> Tensor:
        """Return the evidence lower bound (B,) of images, in nats per image: eq. 3, with the exact KL.

        E_q log p(x | z) is the mean over `samples` latents of each image.
        """
        posterior = self.encode(x)
        log_p = [self.likelihood.log_prob(x, self.decode_params(posterior.sample())) for _ in range(samples)]
        return torch.stack(log_p).mean(0) - posterior.kl()

    def iwae_bound(self, x: Tensor, k: int) -> Tensor:
        """Return log mean_k p(x, z_k) / q(z_k | x), (B,), in nats per image; k = 1 is the ELBO, sampled.

        It rises with k, towards log p(x) (Burda et al. 2016, "Importance weighted autoencoders", eq. 8).
        """
        posterior, weights = self.encode(x), []
        for _ in range(k):
            z = posterior.sample()  # (B, d)
            log_p = self.likelihood.log_prob(x, self.decode_params(z)) + gaussian_log_prob(z, 0.0, 0.0)
            weights.append(log_p - posterior.log_prob(z))
        return torch.logsumexp(torch.stack(weights), dim=0) - math.log(k)

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """Turn log-likelihoods in nats per image into bits per value of a pixel, for 8-bit pixels.

        Raises:
            ValueError: a likelihood that is a density, whose bits depend on the scale of the pixels.
        """
        if not self.likelihood.is_discrete:
            raise ValueError("bits per dimension are those of 8-bit pixels: set likelihood=disc_logistic")
        return -nats / (self.channels * math.prod(self.image_size) * math.log(2.0))

    # ---- training

    def kl_weight(self) -> float:
        """Return the weight of the divergence for the batches seen so far."""
        return self.beta * min(1.0, self.batches_seen / self.kl_warmup) if self.kl_warmup else self.beta

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take one step: encode, sample, decode, compare, step, count."""
        x = self.get_images(batch)  #                                               (B, C, H, W)
        posterior = self.encode(x)  #                                               mean and variance, (B, d)
        params = self.decode_params(posterior.sample())  #                            (B, n_params, H, W)
        nll = -self.likelihood.log_prob(x, params).mean()  #                        ()
        kl = posterior.kl_by_dimension().mean(0)  #                                 (d,)
        weight = self.kl_weight()
        loss = nll + weight * kl.clamp_min(self.free_bits).sum()  #                 ()
        log = {"train/loss": loss.detach(), "train/nll": nll.detach(), "train/kl": kl.detach().sum()}
        self.check_finite(log, batch_idx)
        self.manual_backward(loss / self.accumulate_grad_batches)
        if self.gradients_complete():
            optimizer: Any = self.optimizers()
            log["train/lr"] = torch.tensor(self.set_learning_rate(optimizer))
            log["train/grad_norm"] = self.clip_grad_norm(self.generator_parameters())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.batches_seen += 1
        self.log_dict({**log, "train/kl_weight": weight}, batch_size=len(x))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make Adam for all that is trained."""
        return self.adam(p for p in self.generator_parameters() if p.requires_grad)

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names that validation logs, without "val/"."""
        bits = ("bits_per_dim",) if self.likelihood.is_discrete else ()
        return "loss", "nll", "kl", "active_dims_percent", "psnr", "ssim", *bits

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log the bound and its terms in nats per image, PSNR and SSIM, averaged over the set.

        "val/loss" is -ELBO, without beta, warm-up and free bits.
        """
        x = self.get_images(batch)
        posterior = self.encode(x)
        nll = -self.likelihood.log_prob(x, self.decode_params(posterior.sample())).mean()
        kl = posterior.kl_by_dimension().mean(0)  # (d,)
        rec = self.decode(posterior.mode())
        log = {
            "val/loss": nll + kl.sum(), "val/nll": nll, "val/kl": kl.sum(),
            "val/active_dims_percent": 100.0 * (kl > ACTIVE).float().mean(),
            "val/psnr": psnr(x, rec).mean(), "val/ssim": ssim(x, rec).mean(),
        }
        if self.likelihood.is_discrete:
            log["val/bits_per_dim"] = self.bits_per_dim(-log["val/loss"])
        self.log_dict(log, batch_size=len(x), sync_dist=True, on_epoch=True)

    @torch.no_grad()
    def log_images(self, batch: dict, **kwargs) -> dict[str, Tensor]:
        """Return inputs, their reconstructions, and samples, (B, 1 or 3, H, W) in [-1, 1]."""
        images = super().log_images(batch)
        return images | {"samples": self.to_rgb(self.sample(len(images["inputs"])))}
