"""Stage 1: the VQGAN, an autoencoder over a learnt codebook (Esser et al. 2021, section 3.1).

B batch, C channels, H W pixels, h w latent grid (H/f, W/f), K = n_embed codes. Images are in [-1, 1].
"""

import math

import torch
from torch import Tensor, nn

from taming.config import instantiate_from_config
from taming.metrics import CodebookUsage, psnr, ssim
from taming.models.base import ImageModel
from taming.modules.conditioners.label_maps import colored, one_hot_maps, palette
from taming.modules.diffusionmodules import tiled
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.losses.vqperceptual import DummyLoss
from taming.modules.vqvae.quantize import Codebook, EMAVectorQuantizer, GumbelQuantize, VectorQuantizer2


class VQModel(ImageModel):
    """Encoder, vector quantizer, decoder; trained against pixels, LPIPS and a patch discriminator.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        lossconfig: `{target, params}` of the loss; `DummyLoss` for a model that is only used.
        n_embed: number of codes K.
        embed_dim: channels of a code.
        ckpt_path: checkpoint to start from; keys that begin with one of `ignore_keys` are not taken.
        image_key: entry of the batch that holds the images.
        monitor: metric by which checkpoints are ranked, "val/rec_loss" for instance.
        colorize_nlabels: channels of label maps; pictures of them then have colours kept in the checkpoint.
        remap, sane_index_shape: see `VectorQuantizer2`.
        legacy: beta weighs the codebook term instead of the commitment, as in 2021; new configs say False.
        beta: weight of the commitment.
        revive_after: batches without use after which a code is moved; see `VectorQuantizer2`.
        betas: Adam's.
        scheduler_config: `{target, params}` of a callable from batches seen to a factor on the learning rate.

    Raises:
        ValueError: ddconfig with `double_z`, or a `disc_conditional` loss: there is no condition here.
    """

    def __init__(
        self, ddconfig: dict, lossconfig: dict, n_embed: int, embed_dim: int, ckpt_path: str | None = None,
        ignore_keys: tuple[str, ...] = (), image_key: str = "image", colorize_nlabels: int | None = None,
        monitor: str | None = None, remap: str | None = None, sane_index_shape: bool = False, *,
        legacy: bool = True, beta: float = 0.25, revive_after: int | None = None,
        betas: tuple[float, float] = (0.5, 0.9), scheduler_config: dict | None = None,
    ):
        super().__init__(monitor, scheduler_config)
        # bytes that decoding may take before it goes in tiles, which is slower; None: see tiled.decode
        self.decode_memory: int | None = None
        if ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z must be False (it defaults to True): codes have no variance")
        self.image_key, self.betas = image_key, tuple(betas)
        self.encoder = Encoder(**ddconfig)
        self.resolution, self.factor = self.encoder.resolution, self.encoder.factor
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        if getattr(self.loss, "disc_conditional", False):
            raise ValueError("lossconfig.params.disc_conditional must be False: VQModel has no condition")
        self.use_quantizer(VectorQuantizer2(
            n_embed, embed_dim, beta=beta, remap=remap, sane_index_shape=sane_index_shape, legacy=legacy,
            revive_after=revive_after,
        ))
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", palette(colorize_nlabels))
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def use_quantizer(self, quantizer: Codebook) -> None:
        """Put a quantizer in place, and count its codes in validation."""
        self.quantize = quantizer
        self.val_codes = CodebookUsage(quantizer.re_embed)

    # ---- images <-> codes

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Images (B, C, H, W) to (quant (B, embed_dim, h, w), codebook loss, (None, None, indices)).

        In eval mode all is computed in float32 whatever autocast says, so that an image keeps its codes:
        bfloat16 would change some percent of them.
        """
        return self.quantize(self.encode_to_prequant(x))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to what is quantized, (B, embed_dim, h, w)."""
        channels = self.encoder.conv_in.in_channels
        if x.shape[1] != channels:
            raise ValueError(
                f"{x.shape[1]} channels a pixel (colours, or labels), but the model takes {channels}, its "
                "ddconfig.in_channels: give it what it was trained on"
            )
        self.check_size(*x.shape[-2:])
        device = x.device.type
        with torch.autocast(device, enabled=self.training and torch.is_autocast_enabled(device)):
            return self.quant_conv(self.encoder(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantized latents (B, embed_dim, h, w) to images (B, C, H, W).

        Without gradients, in eval mode, large ones are decoded in tiles: see `decode_memory`.
        """
        return tiled.decode(self.decoder, self.post_quant_conv(quant), self.decode_memory)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Codebook indices (B, h, w), or (B, N) of a square grid, to images (B, C, H, W)."""
        if code_b.ndim == 2:
            side = math.isqrt(code_b.shape[1])
            if side * side != code_b.shape[1]:
                raise ValueError(f"{code_b.shape[1]} indices form no square grid: give them as (B, h, w)")
            code_b = code_b.view(-1, side, side)
        shape = (*code_b.shape, self.quantize.e_dim)
        return self.decode(self.quantize.get_codebook_entry(code_b.reshape(-1), shape=shape))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to (reconstructions, codebook loss)."""
        quant, codebook_loss, _ = self.encode(input)
        return self.decode(quant), codebook_loss

    def check_size(self, height: int, width: int) -> None:
        """Raise unless both sides are multiples of the downsampling factor."""
        f = self.factor
        if height % f or width % f:
            crop = f"{max(f, height // f * f)}x{max(f, width // f * f)}"
            raise ValueError(f"images of {height}x{width} pixels are no multiple of f = {f}: crop to {crop}")

    def token_count(self, height: int, width: int) -> int:
        """Number of codes of an image of that size."""
        return (height // self.factor) * (width // self.factor)

    @property
    def n_tokens(self) -> int:
        """Number of different indices that `encode` can give."""
        return self.quantize.re_embed

    # ---- training

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """One forward for both losses: the generator's, and the discriminator's on what it made."""
        x = self.get_input(batch, self.image_key)
        reconstruction, codebook_loss = self(x)
        step, last_layer = self.batches_seen, self.get_last_layer()
        ae_loss, log = self.loss(codebook_loss, x, reconstruction, 0, step, last_layer=last_layer)
        disc_loss, disc_log = self.loss(codebook_loss, x, reconstruction, 1, step)
        log = {**log, **disc_log, "train/aeloss": ae_loss.detach()}
        self.check_finite(log, batch_idx)
        loss = ae_loss + disc_loss
        if self.trainer.world_size > 1:  # ddp waits for every parameter, also for those not trained yet
            loss = loss + 0.0 * sum(p.sum() for p in self.loss.discriminator.parameters())
        networks = [*self.generator_parameters()], [*self.loss.discriminator.parameters()]
        steps = [*zip(self.optimizers(), networks, strict=True)]
        self.update_weights(loss, steps if disc_log else steps[:1])  # Adam counts its steps, empty ones too
        self.log_dict(log, batch_size=len(x))
        self.log("rec", log["train/rec_loss"], prog_bar=True, logger=False, batch_size=len(x))

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Losses, PSNR and SSIM of the batch, averaged over the set; its codes go into the usage count."""
        x = self.get_input(batch, self.image_key)
        quant, codebook_loss, (_, _, indices) = self.encode(x)
        rec = self.decode(quant)
        _, log = self.loss(codebook_loss, x, rec, 0, self.batches_seen, split="val")
        _, disc_log = self.loss(codebook_loss, x, rec, 1, self.batches_seen, split="val")
        log |= disc_log | {"val/psnr": psnr(x, rec).mean(), "val/ssim": ssim(x, rec).mean()}
        self.val_codes.update(indices)
        self.log_dict(log, batch_size=len(x), sync_dist=True, on_epoch=True)

    def on_validation_epoch_start(self) -> None:
        self.val_codes.reset()

    def on_validation_epoch_end(self) -> None:
        self.val_codes.all_reduce()
        self.log_dict({
            "val/codebook_usage_percent": 100.0 * self.val_codes.usage(),
            "val/codebook_perplexity": self.val_codes.perplexity(),
        }, sync_dist=True)  # the same on all ranks; each must have them, a checkpoint may be ranked by them

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        if isinstance(self.loss, DummyLoss):
            raise ValueError(
                "the model was built with DummyLoss, which has nothing to train: name a loss in lossconfig, "
                "for instance taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
            )
        lr = self.base_learning_rate()
        networks = [self.generator_parameters()]
        if hasattr(self.loss, "discriminator"):
            networks.append(self.loss.discriminator.parameters())
        return [torch.optim.Adam(parameters, lr=lr, betas=self.betas) for parameters in networks]

    def generator_parameters(self):
        """Parameters of all but the loss: encoder, decoder, codebook and the convolutions between them."""
        for part in (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv):
            yield from part.parameters()

    def get_last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        return self.decoder.conv_out.weight

    @torch.no_grad()
    def log_images(self, batch: dict, **kwargs) -> dict[str, Tensor]:
        """The pictures worth looking at: inputs and their reconstructions, (B, C, H, W) in [-1, 1]."""
        x = self.get_input(batch, self.image_key).to(self.device)
        reconstructions, _ = self(x)
        if x.shape[1] not in (1, 3):
            x, reconstructions = self.to_rgb(x), self.to_rgb(reconstructions)
        return {"inputs": x, "reconstructions": reconstructions}

    def to_rgb(self, x: Tensor) -> Tensor:
        """Label maps (B, L, H, W) in arbitrary, fixed colours: (B, 3, H, W) in [-1, 1]."""
        colors = getattr(self, "colorize", None)
        return colored(x, palette(x.shape[1]) if colors is None else colors)


class EMAVQ(VQModel):
    """A VQGAN whose codebook follows running means of the latents: see `EMAVectorQuantizer`, and `VQModel`.

    Args:
        decay: share of the running sums that is kept in each batch.
    """

    def __init__(
        self, ddconfig: dict, lossconfig: dict, n_embed: int, embed_dim: int, ckpt_path: str | None = None,
        ignore_keys: tuple[str, ...] = (), image_key: str = "image", colorize_nlabels: int | None = None,
        monitor: str | None = None, remap: str | None = None, sane_index_shape: bool = False, *,
        beta: float = 0.25, decay: float = 0.99, revive_after: int | None = None,
        betas: tuple[float, float] = (0.5, 0.9), scheduler_config: dict | None = None,
    ):
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, image_key=image_key, colorize_nlabels=colorize_nlabels,
            monitor=monitor, betas=betas, scheduler_config=scheduler_config,
        )
        self.use_quantizer(EMAVectorQuantizer(
            n_embed, embed_dim, beta, decay, remap=remap, sane_index_shape=sane_index_shape,
            revive_after=revive_after,
        ))
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)


class GumbelVQ(VQModel):
    """A VQGAN whose codes are drawn with a falling temperature: see `GumbelQuantize`, and `VQModel`.

    Args:
        temperature_scheduler_config: `{target, params}` of a callable from batches seen to the temperature.
        kl_weight: weight of the divergence from a uniform use of the codes.
        kl_scheduler_config: of a callable from batches seen to a factor on `kl_weight`; constant when None.
    """

    def __init__(
        self, ddconfig: dict, lossconfig: dict, n_embed: int, embed_dim: int,
        temperature_scheduler_config: dict, ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (),
        image_key: str = "image", colorize_nlabels: int | None = None, monitor: str | None = None,
        kl_weight: float = 1e-8, remap: str | None = None, *, kl_scheduler_config: dict | None = None,
        betas: tuple[float, float] = (0.5, 0.9), scheduler_config: dict | None = None,
    ):
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, image_key=image_key, colorize_nlabels=colorize_nlabels,
            monitor=monitor, betas=betas, scheduler_config=scheduler_config,
        )
        self.use_quantizer(GumbelQuantize(embed_dim, embed_dim, n_embed, kl_weight=kl_weight, remap=remap))
        self.kl_weight = kl_weight
        self.temperature_scheduler = instantiate_from_config(temperature_scheduler_config)
        self.kl_scheduler = instantiate_from_config(kl_scheduler_config) if kl_scheduler_config else None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def temperature_scheduling(self) -> None:
        """Set the temperature and the weight of the divergence for the batches seen so far."""
        self.quantize.temperature = float(self.temperature_scheduler(self.batches_seen))
        if self.kl_scheduler is not None:
            self.quantize.kl_weight = self.kl_weight * float(self.kl_scheduler(self.batches_seen))

    def training_step(self, batch: dict, batch_idx: int) -> None:
        self.temperature_scheduling()
        self.log("train/temperature", self.quantize.temperature)
        self.log("train/kl_weight", self.quantize.kl_weight)
        super().training_step(batch, batch_idx)


class VQNoDiscModel(VQModel):
    """A VQ autoencoder without a discriminator: any loss called as loss(codebook_loss, x, rec, split).

    Such are `VQLPIPS` for pictures and `BCELossWithQuant` for maps of labels. The arguments are `VQModel`'s.
    """

    def training_step(self, batch: dict, batch_idx: int) -> None:
        x = self.get_input(batch, self.image_key)
        reconstruction, codebook_loss = self(x)
        loss, log = self.loss(codebook_loss, x, reconstruction, split="train")
        self.check_finite(log, batch_idx)
        self.update_weights(loss, [(self.optimizers(), [*self.generator_parameters()])])
        self.log_dict(log, batch_size=len(x))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(x))

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x = self.get_input(batch, self.image_key)
        quant, codebook_loss, (_, _, indices) = self.encode(x)
        _, log = self.loss(codebook_loss, x, self.decode(quant), split="val")
        self.val_codes.update(indices)
        self.log_dict(log, batch_size=len(x), sync_dist=True, on_epoch=True)


class VQSegmentationModel(VQNoDiscModel):
    """A VQ autoencoder of label maps (B, n_labels, H, W), one-hot; decodes to a logit per label.

    A batch may hold the ids themselves, (B, H, W): they become one-hot here, on the device.

    Args:
        n_labels: number of labels, the channels in and out of the networks.
        ddconfig, lossconfig, ...: see `VQModel`; the loss is `BCELossWithQuant`.

    Raises:
        ValueError: `n_labels` is not the number of channels that `ddconfig` names.
    """

    def __init__(self, n_labels: int, *args, **kwargs):
        super().__init__(*args, **{"colorize_nlabels": n_labels, **kwargs})
        found = self.encoder.conv_in.in_channels, self.decoder.conv_out.out_channels
        if found != (n_labels, n_labels):
            raise ValueError(
                f"n_labels: {n_labels}, but ddconfig has in_channels: {found[0]} and out_ch: {found[1]}: "
                "all three are the number of labels"
            )
        self.n_labels = n_labels

    def get_input(self, batch: dict, key: str) -> Tensor:
        """Entry `key` of a batch as one-hot maps (B, n_labels, H, W), float32."""
        x = super().get_input(batch, key)
        return self.one_hot(x) if x.ndim == 3 else x

    def one_hot(self, ids: Tensor) -> Tensor:
        """Label ids (B, H, W) to maps (B, n_labels, H, W); see `one_hot_maps`."""
        return one_hot_maps(ids, self.n_labels)

    @torch.no_grad()
    def log_images(self, batch: dict, **kwargs) -> dict[str, Tensor]:
        """The label maps, and the likeliest label of each pixel of their reconstructions, in colours."""
        x = self.get_input(batch, self.image_key).to(self.device)
        logits, _ = self(x)
        likeliest = self.one_hot(logits.argmax(1))
        return {"inputs": self.to_rgb(x), "reconstructions": self.to_rgb(likeliest)}
