"""Stage 1: the VQGAN, an autoencoder over a learned codebook (Esser et al. 2021, section 3.1).

B batch, C channels, H W pixels, h w latent grid (H/f, W/f), K = n_embed codes. Images are in [-1, 1].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from taming.colormap import colorize, random_colors
from taming.config import instantiate_from_config
from taming.metrics import CodebookUsage, psnr, ssim
from taming.models.autoencoder import Autoencoder, Betas
from taming.models.tokenizer import Codes, Grid, Size, Tokenizer
from taming.modules.conditioners.image import ImageConditioner
from taming.modules.conditioners.label_map import LabelMapConditioner
from taming.modules.diffusionmodules import tiled
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.quantizers.base import Quantizer, QuantizerInfo
from taming.modules.vqvae.quantize import EMAVectorQuantizer, GumbelQuantize, VectorQuantizer2
from taming.parameters import NonNegativeFloat, NonNegativeInt, ParametersOf, PositiveInt, Probability

DDConfig = Annotated[dict, ParametersOf(Encoder, Decoder, named_by=("encoder_config", "decoder_config"))]


class VQModel(Tokenizer, ImageConditioner, Autoencoder):
    """Encoder, vector quantizer, decoder; trained against pixels, LPIPS and a patch discriminator.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`, or of the networks in their place.
        lossconfig: `{target, params}` of the loss; `DummyLoss` for a model that is only used.
        n_embed: number of codes K.
        embed_dim: channels of a code.
        ckpt_path: checkpoint to start from; keys that begin with one of `ignore_keys` are not taken.
        image_key: entry of the batch that holds the images.
        monitor: metric by which checkpoints are ranked, "val/rec_loss" for instance.
        colorize_nlabels: channels of label maps; the checkpoint then holds the buffer `colorize` of 2021.
        remap, sane_index_shape: see `VectorQuantizer2`.
        legacy: beta weighs the codebook term instead of the commitment, as in 2021; new configs say False.
        beta: weight of the commitment.
        revive_after: batches without use after which a code is moved; see `VectorQuantizer2`.
        betas: Adam's.
        scheduler_config: `{target, params}` of a callable from batches seen to a factor on the learning rate.
        quantizer_config: `{target, params}` of another `Quantizer`, with K = n_embed codes of embed_dim
            channels; `remap`, `sane_index_shape`, `legacy`, `beta` and `revive_after` are not for it.
        encoder_config, decoder_config: `{target, params}` of other networks, either key optional; they take
            the arguments of ddconfig, and those of `params` on top; see `build_networks`.
        quant_conv_kernel: side of the convolutions between networks and codes, odd; 0 for none, where
            z_channels and embed_dim are the same.

    As a condition stage it encodes images (depth, edges, ...): see `ImageConditioner`.

    Raises:
        ValueError: ddconfig with `double_z`, or a `disc_conditional` loss: there is no condition here.
    """

    def __init__(
        self, ddconfig: DDConfig, lossconfig: dict, n_embed: PositiveInt, embed_dim: PositiveInt,
        ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (), image_key: str = "image",
        colorize_nlabels: PositiveInt | None = None, monitor: str | None = None, remap: str | None = None,
        sane_index_shape: bool = False, *,
        legacy: bool = True, beta: NonNegativeFloat = 0.25, revive_after: PositiveInt | None = None,
        betas: Betas = (0.5, 0.9), scheduler_config: dict | None = None,
        quantizer_config: dict | None = None, encoder_config: dict | None = None,
        decoder_config: dict | None = None, quant_conv_kernel: NonNegativeInt = 1,
    ):
        super().__init__(image_key, betas, monitor, scheduler_config)
        # bytes that decoding may take before it goes in tiles, which is slower; None: see tiled.decode
        self.decode_memory: int | None = None
        self.encoder, self.decoder = self.build_networks(ddconfig, encoder_config or {}, decoder_config or {})
        self.resolution, self.factor = self.encoder.resolution, self.encoder.factor
        self.channels, self.pixel_range = self.encoder.in_channels, self.encoder.pixel_range
        self.use_loss(lossconfig)
        if not quantizer_config:
            self.use_quantizer(VectorQuantizer2(
                n_embed, embed_dim, beta=beta, remap=remap, sane_index_shape=sane_index_shape, legacy=legacy,
                revive_after=revive_after,
            ))
        else:
            for name, value in (("revive_after", revive_after), ("remap", remap)):
                if value is not None:
                    raise ValueError(
                        f"{name}: {value} is not for the quantizer of quantizer_config: leave it out, or set "
                        "quantizer_config.params if it has such an argument"
                    )
            self.use_quantizer(instantiate_from_config(quantizer_config))
            found = self.quantize.codebook_size, self.quantize.code_dim
            if found != (n_embed, embed_dim):
                raise ValueError(
                    f"n_embed: {n_embed} and embed_dim: {embed_dim}, but the quantizer has {found[0]} codes "
                    f"of {found[1]} channels: set n_embed={found[0]} and embed_dim={found[1]}"
                )
        features = self.encoder.z_channels
        self.quant_conv = _convolution(features, embed_dim, quant_conv_kernel)
        self.post_quant_conv = _convolution(embed_dim, features, quant_conv_kernel)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", random_colors(colorize_nlabels))
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def build_networks(self, ddconfig: dict, encoder: dict, decoder: dict) -> tuple[Any, Any]:
        """Build encoder and decoder of `{target, params}`, each with the arguments of ddconfig as well.

        The encoder has `resolution`, `factor`, `in_channels`, `z_channels` and `pixel_range`, the decoder
        `out_ch` and `last_layer`, the weight at which the adaptive weight compares gradients. Both take and
        give images in [-1, 1].
        """
        if ddconfig.get("double_z", "target" not in encoder):
            raise ValueError("ddconfig.double_z must be False (it defaults to True): codes have no variance")
        networks = []
        for config, default in ((encoder, Encoder), (decoder, Decoder)):
            target = config.get("target", f"{default.__module__}.{default.__name__}")
            params = {**ddconfig, **(config.get("params") or {})}
            networks.append(instantiate_from_config({"target": target, "params": params}))
        return networks[0], networks[1]

    def use_quantizer(self, quantizer: Quantizer) -> None:
        """Put a quantizer in place, and count its codes in validation."""
        self.quantize: Any = quantizer
        self.levels = quantizer.num_levels
        self.val_codes = CodebookUsage(quantizer.codebook_size)

    # ---- images <-> codes

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Encode images (B, C, H, W) to (quant (B, embed_dim, h, w), codebook loss, info).

        In eval mode all is computed in float32 whatever autocast says, so that an image keeps its codes:
        bfloat16 would change some percent of them. Sides that f does not divide are rounded down.
        """
        return self.quantize(self.encode_to_prequant(x))

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) to what is quantized, (B, embed_dim, h, w)."""
        self.check_channels(x)
        with self.own_precision(x):
            return self.quant_conv(self.encoder(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Decode quantized latents (B, embed_dim, h, w) to images (B, C, H, W)."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Codes) -> Tensor:
        """Decode codebook indices (B, h, w), (B, N) of a square grid or a list to images (B, C, H, W).

        Without gradients, in eval mode, large ones are decoded in tiles: see `decode_memory`.
        """
        latents = self.post_quant_conv(self.codes_to_latents(as_grid(code_b)))  # (B, z_channels, h, w)
        return tiled.decode(self.decoder, latents, self.decode_memory)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images (B, C, H, W): (reconstructions, codebook loss)."""
        quant, codebook_loss, _ = self.encode(input)
        return self.decode(quant), codebook_loss

    # ---- the contract of a tokenizer

    @property
    def codebook_size(self) -> int:
        """Number of different codes."""
        return self.quantize.codebook_size

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, as a condition stage."""
        return self.codebook_size

    def latent_shape(self, height: int, width: int) -> Size:
        """Return the grid (h, w) of the latents of an image; see `Tokenizer.code_shape`."""
        return super().code_shape(height, width)

    def code_shape(self, height: int, width: int) -> Grid:
        """Return the grid (h, w) of an image, or a list of grids; see `Tokenizer.code_shape`."""
        grids = self.quantize.grids(*self.latent_shape(height, width))
        return grids if self.levels > 1 else grids[0]

    @torch.no_grad()
    def encode_codes(self, x: Tensor) -> Codes:
        """Encode images (B, C, H, W) to codes (B, h, w), int64, or a list; see `Tokenizer.encode_codes`."""
        h, w = self.latent_shape(*x.shape[2:])
        return self.quantize.to_grids(self.encode(x)[2].indices, h, w)

    def codes_to_latents(self, codes: Codes) -> Tensor:
        """Look up codes (B, h, w), or a list of grids: (B, embed_dim, h, w)."""
        return self.quantize.indices_to_codes(codes)

    @torch.no_grad()
    def decode_codes(self, codes: Codes) -> Tensor:
        """Decode codes (B, h, w), or a list of grids, to images (B, C, H, W)."""
        return self.decode_code(codes)

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Decode tokens (B, h, w) of a condition to images (B, C, H, W)."""
        return self.decode_codes(tokens)

    # ---- training

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take one step of both networks: one forward, both losses, one backward."""
        x = self.get_images(batch)  #                                               (B, C, H, W)
        z = self.encode_to_prequant(x)  #                                           (B, embed_dim, h, w)
        z_q, codebook_loss, _ = self.quantize(z)  #                                 (B, embed_dim, h, w), ()
        rec = self.decode(z_q)  #                                                   (B, C, H, W)

        step, last_layer = self.batches_seen, self.get_last_layer()
        ae_loss, log = self.loss(codebook_loss, x, rec, 0, step, last_layer=last_layer)  # eq. 4, 6 and 7
        disc_loss, disc_log = self.loss(codebook_loss, x, rec, 1, step)  #          eq. 5
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

    def channel_settings(self) -> dict[str, int]:
        """Return the settings that are the number of channels of an image."""
        return {
            "ddconfig.in_channels": self.channels, "ddconfig.out_ch": self.decoder.out_ch,
        }

    @property
    def validation_metrics(self) -> tuple[str, ...] | None:
        """Names that validation logs, without "val/"; None if the loss does not tell its own."""
        terms = getattr(self.loss, "terms", None)
        return terms and (*terms, "psnr", "ssim", "codebook_usage_percent", "codebook_perplexity")

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log losses, PSNR and SSIM of the batch, averaged over the set, and count its codes."""
        x = self.get_images(batch)
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
        used = self.val_codes.compute()
        self.log_dict({
            "val/codebook_usage_percent": 100.0 * used["usage"],
            "val/codebook_perplexity": used["perplexity"],
        }, sync_dist=True)  # the same on all ranks; each must have them, a checkpoint may be ranked by them

    def generator_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all but the loss: encoder, decoder, codebook, convolutions between them."""
        for part in (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv):
            yield from part.parameters()

    def get_last_layer(self) -> Tensor:
        """Return the weight at which the adaptive weight compares gradients."""
        return self.decoder.last_layer

    def to_rgb(
        self, x: Tensor, size: tuple[int, int] | None = None, *, names: Sequence[str] = (),
        plot: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Show images as they are, and maps of more channels, one a label, in fixed colours."""
        return x if x.shape[1] in (1, 3) else colorize(x)


def as_grid(codes: Any) -> Any:
    """Return codes (B, h, w), or a list of grids, as they are, and (B, N) of a square grid as (B, h, w)."""
    if not isinstance(codes, Tensor) or codes.ndim != 2:
        return codes
    side = math.isqrt(codes.shape[1])
    if side * side != codes.shape[1]:
        raise ValueError(f"{codes.shape[1]} indices form no square grid: give them as (B, h, w)")
    return codes.view(-1, side, side)


def _convolution(in_channels: int, out_channels: int, kernel: int) -> nn.Module:
    """Return a convolution that keeps H and W, or nothing in its place where `kernel` is 0."""
    if kernel:
        if kernel % 2 == 0:
            raise ValueError(f"quant_conv_kernel: {kernel} is even: give 0 or an odd side, for instance 1")
        return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    if in_channels != out_channels:
        raise ValueError(
            f"quant_conv_kernel: 0, but z_channels and embed_dim differ ({in_channels} and {out_channels}): "
            "make them the same, or set quant_conv_kernel=1"
        )
    return nn.Identity()


class EMAVQ(VQModel):
    """A VQGAN whose codebook follows running means of the latents: see `EMAVectorQuantizer`, and `VQModel`.

    Args:
        decay: share of the running sums that is kept in each batch.
    """

    def __init__(
        self, ddconfig: DDConfig, lossconfig: dict, n_embed: PositiveInt, embed_dim: PositiveInt,
        ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (), image_key: str = "image",
        colorize_nlabels: PositiveInt | None = None, monitor: str | None = None, remap: str | None = None,
        sane_index_shape: bool = False, *,
        beta: NonNegativeFloat = 0.25, decay: Probability = 0.99, revive_after: PositiveInt | None = None,
        betas: Betas = (0.5, 0.9), scheduler_config: dict | None = None,
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
    """A VQGAN whose codes are sampled with a falling temperature: see `GumbelQuantize`, and `VQModel`.

    Args:
        temperature_scheduler_config: `{target, params}` of a callable from batches seen to the temperature.
        kl_weight: weight of the divergence from a uniform use of the codes.
        kl_scheduler_config: of a callable from batches seen to a factor on `kl_weight`; constant when None.
    """

    def __init__(
        self, ddconfig: DDConfig, lossconfig: dict, n_embed: PositiveInt, embed_dim: PositiveInt,
        temperature_scheduler_config: dict, ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (),
        image_key: str = "image", colorize_nlabels: PositiveInt | None = None, monitor: str | None = None,
        kl_weight: NonNegativeFloat = 1e-8, remap: str | None = None, *,
        kl_scheduler_config: dict | None = None, betas: Betas = (0.5, 0.9),
        scheduler_config: dict | None = None,
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

    Such are `VQLPIPS` for images and `BCELossWithQuant` for label maps. The arguments are `VQModel`'s.
    """

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take one step of the autoencoder."""
        x = self.get_images(batch)  #                                               (B, C, H, W)
        z_q, codebook_loss, _ = self.quantize(self.encode_to_prequant(x))  #        (B, embed_dim, h, w), ()
        rec = self.decode(z_q)  #                                                   (B, C, H, W)
        loss, log = self.loss(codebook_loss, x, rec, split="train")
        self.check_finite(log, batch_idx)
        self.manual_backward(loss / self.accumulate_grad_batches)
        if self.gradients_complete():
            optimizer: Any = self.optimizers()
            log["train/lr"] = self.set_learning_rate(optimizer)
            log["train/grad_norm"] = self.clip_grad_norm(self.generator_parameters())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.batches_seen += 1
        self.log_dict(log, batch_size=len(x))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make Adam for the autoencoder."""
        return self.adam(self.generator_parameters())

    @property
    def validation_metrics(self) -> tuple[str, ...] | None:
        """Names that validation logs, without "val/"; None if the loss does not tell its own."""
        terms = getattr(self.loss, "terms", None)
        return terms and (*terms, "codebook_usage_percent", "codebook_perplexity")

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log losses of the batch, averaged over the set, and count its codes."""
        x = self.get_images(batch)
        quant, codebook_loss, (_, _, indices) = self.encode(x)
        _, log = self.loss(codebook_loss, x, self.decode(quant), split="val")
        self.val_codes.update(indices)
        self.log_dict(log, batch_size=len(x), sync_dist=True, on_epoch=True)


class VQSegmentationModel(LabelMapConditioner, VQNoDiscModel):
    """A VQ autoencoder of label maps (B, n_labels, H, W), one-hot; decodes to a logit per label.

    A batch may hold the ids themselves, (B, H, W): they become one-hot here, on the device.

    Args:
        n_labels: number of labels, the channels in and out of the networks.
        ddconfig, lossconfig, ...: see `VQModel`; the loss is `BCELossWithQuant`.

    Raises:
        ValueError: `n_labels` is not the number of channels that `ddconfig` names.
    """

    def __init__(self, n_labels: PositiveInt, *args, **kwargs):
        super().__init__(*args, **{"colorize_nlabels": n_labels, **kwargs})
        found = self.encoder.in_channels, self.decoder.out_ch
        if found != (n_labels, n_labels):
            raise ValueError(
                f"n_labels: {n_labels}, but ddconfig has in_channels: {found[0]} and out_ch: {found[1]}: "
                "all three are the number of labels"
            )
        self.n_labels = n_labels

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Decode tokens (B, h, w) to the most likely labels, one-hot maps (B, n_labels, H, W)."""
        return self.one_hot(self.decode_codes(tokens).argmax(1))

    def validators(self) -> dict[str, Any]:
        """Check label ids."""
        return {self.image_key: self}

    def get_input(self, batch: dict, key: str) -> Tensor:
        """Return entry `key` of a batch as one-hot maps (B, n_labels, H, W), float32."""
        return self.from_batch(super().get_input(batch, key))

    @torch.no_grad()
    def log_images(self, batch: dict, **kwargs) -> dict[str, Tensor]:
        """Return the label maps, and the most likely labels of their reconstructions, in colours."""
        x = self.get_images(batch).to(self.device)
        logits, _ = self(x)
        return {"inputs": self.to_rgb(x), "reconstructions": self.to_rgb(self.one_hot(logits.argmax(1)))}
