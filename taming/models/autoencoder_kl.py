"""The KL autoencoder of latent diffusion (Rombach et al. 2022): a VQGAN with Gaussian latents, no codes.

The `kl-f4`, `kl-f8`, `kl-f16`, `kl-f32` files of that project, and the autoencoder inside Stable Diffusion's
files, load by their names. Configs there say `ldm.models.autoencoder`.

B batch, C channels, H W pixels, D = embed_dim channels of the latents (B, D, h, w). Images are in [-1, 1].
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from taming.colormap import random_colors
from taming.metrics import psnr, ssim
from taming.models.autoencoder import Autoencoder, Betas
from taming.models.vqgan import DDConfig
from taming.modules.diffusionmodules import tiled
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vae.gaussian import DiagonalGaussian
from taming.parameters import PositiveInt


class AutoencoderKL(Autoencoder):
    """Encoder, Gaussian latents, decoder; trained against pixels, LPIPS, a divergence and a discriminator.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`, with `double_z`.
        lossconfig: `{target, params}` of the loss, `LPIPSWithDiscriminator` in
            `taming.modules.losses.latent_diffusion`; `DummyLoss` for a model that is only used.
        embed_dim: channels D of the latents.
        ckpt_path, ignore_keys, image_key, monitor, scheduler_config, betas: see `VQModel`.
        colorize_nlabels: channels of label maps; the checkpoint then holds the buffer `colorize`.
        learn_logvar: train the log-variance of the reconstruction, a parameter of the loss; in the first
            release of latent diffusion no optimizer had it, and it stayed at its start.

    Raises:
        ValueError: ddconfig without `double_z`, or a `disc_conditional` loss.
    """

    def __init__(
        self, ddconfig: DDConfig, lossconfig: dict, embed_dim: PositiveInt, ckpt_path: str | None = None,
        ignore_keys: tuple[str, ...] = (), image_key: str = "image",
        colorize_nlabels: PositiveInt | None = None, monitor: str | None = None, *,
        learn_logvar: bool = True, betas: Betas = (0.5, 0.9), scheduler_config: dict | None = None,
    ):
        super().__init__(image_key, betas, monitor, scheduler_config)
        # bytes that decoding may take before it goes in tiles, which is slower; None: see tiled.decode
        self.decode_memory: int | None = None
        if not ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z must be True: the encoder gives a mean and a log-variance")
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.resolution, self.factor = self.encoder.resolution, self.encoder.factor
        self.channels, self.embed_dim = self.encoder.in_channels, embed_dim
        self.use_loss(lossconfig)
        if isinstance(logvar := getattr(self.loss, "logvar", None), nn.Parameter):
            logvar.requires_grad_(learn_logvar)
        self.quant_conv = nn.Conv2d(2 * self.encoder.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, self.encoder.z_channels, 1)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", random_colors(colorize_nlabels))
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    # ---- images <-> latents

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Encode images (B, C, H, W) to the posterior of their latents (B, D, h, w).

        In eval mode all is computed in float32 whatever autocast says. Sides that f does not divide are
        rounded down.
        """
        self.check_channels(x)
        with self.own_precision(x):
            return DiagonalGaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, D, h, w) to images (B, C, H, W).

        Without gradients, in eval mode, large ones are decoded in tiles: see `decode_memory`.
        """
        if z.ndim != 4 or z.shape[1] != self.embed_dim:
            raise ValueError(f"latents are (B, {self.embed_dim}, h, w), embed_dim; got {tuple(z.shape)}")
        return tiled.decode(self.decoder, self.post_quant_conv(z), self.decode_memory)

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussian]:
        """Decode a sample of the posterior of images (B, C, H, W), or its mean: (images, posterior)."""
        posterior = self.encode(input)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode images (B, C, H, W) by the mean of the posterior: always the same result."""
        return self(x, sample_posterior=False)[0]

    # ---- training

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take one step of both networks: one forward, both losses, one backward."""
        x = self.get_images(batch)  #                       (B, C, H, W)
        posterior = self.encode(x)  #                       mean and variance, (B, D, h, w)
        rec = self.decode(posterior.sample())  #            (B, C, H, W)

        step, last_layer = self.batches_seen, self.get_last_layer()
        ae_loss, log = self.loss(x, rec, posterior, 0, step, last_layer=last_layer)
        disc_loss, disc_log = self.loss(x, rec, posterior, 1, step)
        log = {**log, **disc_log, "train/aeloss": ae_loss.detach()}
        self.check_finite(log, batch_idx)

        generator, discriminator = [*self.generator_parameters()], [*self.loss.discriminator.parameters()]
        loss = ae_loss + disc_loss  # the generator's gradient does not reach the discriminator, nor back
        if self.trainer.world_size > 1:  # ddp waits for every parameter, also for those not trained yet
            loss = loss + 0.0 * sum(p.sum() for p in discriminator)
        self.manual_backward(loss / self.accumulate_grad_batches)
        if self.gradients_complete():
            trained = [*zip(("", "_disc"), self.optimizers(), (generator, discriminator), strict=True)]
            for name, optimizer, parameters in trained if disc_log else trained[:1]:
                log[f"train/lr{name}"] = self.set_learning_rate(optimizer)
                log[f"train/grad_norm{name}"] = self.clip_grad_norm(parameters)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.batches_seen += 1
        self.log_dict(log, batch_size=len(x))
        self.log("rec", log["train/rec_loss"], prog_bar=True, logger=False, batch_size=len(x))

    def generator_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained beside the discriminator; the log-variance of the loss if it is learned."""
        yield from super().generator_parameters()
        logvar = getattr(self.loss, "logvar", None)
        if isinstance(logvar, nn.Parameter) and logvar.requires_grad:
            yield logvar

    def channel_settings(self) -> dict[str, int]:
        """Return the settings that are the number of channels of an image."""
        return {
            "ddconfig.in_channels": self.channels, "ddconfig.out_ch": self.decoder.out_ch,
        }

    @property
    def validation_metrics(self) -> tuple[str, ...] | None:
        """Names that validation logs, without "val/"; None if the loss does not tell its own."""
        terms = getattr(self.loss, "terms", None)
        return terms and (*terms, "psnr", "ssim")

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log losses, PSNR and SSIM of the batch, by the mean of the posterior, averaged over the set."""
        x = self.get_images(batch)
        rec, posterior = self(x, sample_posterior=False)
        _, log = self.loss(x, rec, posterior, 0, self.batches_seen, split="val")
        _, disc_log = self.loss(x, rec, posterior, 1, self.batches_seen, split="val")
        log |= disc_log | {"val/psnr": psnr(x, rec).mean(), "val/ssim": ssim(x, rec).mean()}
        self.log_dict(log, batch_size=len(x), sync_dist=True, on_epoch=True)

    def get_last_layer(self) -> Tensor:
        """Return the weight at which the adaptive weight compares gradients."""
        return self.decoder.last_layer

    @torch.no_grad()
    def log_images(self, batch: dict, **kwargs) -> dict[str, Tensor]:
        """Return inputs, their reconstructions, and what N(0, I) decodes to, in [-1, 1]."""
        x = self.get_images(batch).to(self.device)
        reconstructions, posterior = self(x, sample_posterior=False)
        samples = self.decode(torch.randn_like(posterior.mean))
        images = {"inputs": x, "reconstructions": reconstructions, "samples": samples}
        return {name: self.to_rgb(value) for name, value in images.items()}
