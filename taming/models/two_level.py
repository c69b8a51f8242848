"""First stages with two grids of codes, and the VQGAN of that kind: coarse codes above, fine codes below.

The wiring is that of VQ-VAE-2 (Razavi et al. 2019, section 3.1). The two-level VQGAN is the last row of
table 5 of Esser et al. 2021: 64x64 and 32x32 codes of 512 at 256 pixels.

B batch, C channels, H W pixels, h w bottom grid, h/2 w/2 top grid, D = embed_dim, K = n_embed codes of each
level. Images are in [-1, 1].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming.metrics import CodebookUsage, psnr, ssim
from taming.models.autoencoder import Autoencoder, Betas
from taming.models.tokenizer import Size, Tokenizer
from taming.models.vqgan import DDConfig
from taming.modules.diffusionmodules import tiled
from taming.modules.diffusionmodules.model import Decoder, Encoder, Upsample
from taming.modules.quantizers.base import QuantizerInfo
from taming.modules.vqvae.quantize import VectorQuantizer2, codebook
from taming.parameters import NonNegativeFloat, NonNegativeInt, PositiveInt, Probability

LEVELS = ("top", "bottom")


def by_level(name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name a value of each level for the log."""
    return {f"{name}_{level}": value.detach() for level, value in zip(LEVELS, values, strict=True)}


class TwoLevelModel(Tokenizer, Autoencoder):
    """Encoders, codebooks and decoders of two levels, wired up; subclasses build the networks and train them.

    The bottom codes are chosen with the top codes known: they add what those lack.

    Attributes:
        enc_b: images (B, C, H, W) to features (B, F, h, w).
        enc_t: these to features of the top level, (B, F', h/2, w/2).
        dec_t: top codes (B, D, h/2, w/2) to features (B, F'', h, w).
        quantize_conv_t, quantize_conv_b: 1x1 convolutions to what is quantized, D channels.
        quantize_t, quantize_b: the codebooks.
        upsample_t: top codes to (B, D, h, w), for the decoder.
        dec: both, (B, 2 D, h, w), to images.
    """

    levels = 2
    enc_b: Any
    enc_t: Any
    dec_t: Any
    quantize_conv_t: nn.Module
    quantize_conv_b: nn.Module
    quantize_t: VectorQuantizer2
    quantize_b: VectorQuantizer2
    upsample_t: nn.Module
    dec: Any

    def use_codebooks(self, n_embed: int, **arguments: Any) -> None:
        """Make a codebook for each level, see `codebook`, and count its codes in validation."""
        self.quantize_t, self.quantize_b = (codebook(n_embed, **arguments) for _ in LEVELS)
        self.val_codes_t, self.val_codes_b = CodebookUsage(n_embed), CodebookUsage(n_embed)

    # ---- images <-> codes

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[QuantizerInfo]]:
        """Encode images (B, C, H, W): quantized latents, losses and infos, of the top and the bottom level.

        In eval mode all is computed in float32 whatever autocast says, so that an image keeps its codes.
        """
        self.check_channels(x)
        with self.own_precision(x):
            h_b = self.enc_b(x)  #                                        (B, F, h, w)
            z_t = self.quantize_conv_t(self.enc_t(h_b))  #                (B, D, h/2, w/2)
            q_t, loss_t, info_t = self.quantize_t(z_t)  #                 (B, D, h/2, w/2), ()
            h_b = torch.cat((self.dec_t(q_t), h_b), dim=1)  #             (B, F'' + F, h, w)
            z_b = self.quantize_conv_b(h_b)  #                            (B, D, h, w)
            q_b, loss_b, info_b = self.quantize_b(z_b)  #                 (B, D, h, w), ()
        return [q_t, q_b], [loss_t, loss_b], [info_t, info_b]

    def join(self, quants: Sequence[Tensor]) -> Tensor:
        """Bring the quantized latents of both levels to one map (B, 2 D, h, w)."""
        return torch.cat((self.upsample_t(quants[0]), quants[1]), dim=1)

    def decode(self, quants: Sequence[Tensor]) -> Tensor:
        """Decode quantized latents (B, D, h/2, w/2) and (B, D, h, w) to images (B, C, H, W)."""
        return self.dec(self.join(quants))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images (B, C, H, W): (reconstructions, loss of both codebooks)."""
        quants, losses, _ = self.encode(input)
        return self.decode(quants), losses[0] + losses[1]

    # ---- the contract of a tokenizer

    @property
    def codebook_size(self) -> int:
        """Number of different codes, of each level."""
        return self.quantize_t.codebook_size

    def code_shape(self, height: int, width: int) -> list[Size]:
        """Return the grids of an image of `height` x `width` pixels: top, (h/2, w/2), and bottom, (h, w)."""
        self.check_size(height, width)
        h, w = height // self.factor, width // self.factor
        return [(h, w), (2 * h, 2 * w)]

    @torch.no_grad()
    def encode_codes(self, x: Tensor) -> list[Tensor]:
        """Encode images (B, C, H, W) to codes (B, h/2, w/2) and (B, h, w), int64."""
        grids = self.code_shape(*x.shape[2:])
        infos = self.encode(x)[2]
        return [info.indices.view(len(x), *grid) for info, grid in zip(infos, grids, strict=True)]

    def codes_to_latents(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Look up codes (B, h/2, w/2) and (B, h, w): (B, D, h/2, w/2) and (B, D, h, w).

        Raises:
            ValueError: codes of another number of levels, or grids that do not belong together.
        """
        shapes = [tuple(grid.shape) for grid in codes]
        b, h, w = shapes[0] if len(shapes) == 2 and len(shapes[0]) == 3 else (0, 0, 0)
        if shapes[-1] != (b, 2 * h, 2 * w):
            raise ValueError(
                f"{type(self).__name__} decodes two grids of codes, (B, h, w) and (B, 2h, 2w), not "
                f"{' and '.join(map(str, shapes))}"
            )
        return [self.quantize_t.indices_to_codes(codes[0]), self.quantize_b.indices_to_codes(codes[1])]

    @torch.no_grad()
    def decode_codes(self, codes: Sequence[Tensor]) -> Tensor:
        """Decode codes (B, h/2, w/2) and (B, h, w) to images (B, C, H, W)."""
        return tiled.decode(self.dec, self.join(self.codes_to_latents(codes)))

    # ---- validation

    def channel_settings(self) -> dict[str, int]:
        """Return the settings that are the number of channels of an image."""
        return {"ddconfig.in_channels": self.channels, "ddconfig.out_ch": self.dec.out_ch}

    @property
    def validation_metrics(self) -> tuple[str, ...] | None:
        """Names that validation logs, without "val/"; None if the loss does not tell its own."""
        terms = getattr(self.loss, "terms", None)
        names = ["codebook_usage_percent", "codebook_perplexity"]
        each = [f"{name}_{level}" for name in ("quant_loss", *names) for level in LEVELS]
        return terms and (*terms, "psnr", "ssim", *names, *each)

    def validation_losses(self, codebook_loss: Tensor, x: Tensor, rec: Tensor) -> dict[str, Any]:
        """Return the terms of the loss by their names."""
        return self.loss(codebook_loss, x, rec, split="val")[1]

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log losses, PSNR and SSIM of the batch, averaged over the set, and count its codes."""
        x = self.get_images(batch)
        quants, losses, (top, bottom) = self.encode(x)
        rec = self.decode(quants)
        log = self.validation_losses(losses[0] + losses[1], x, rec)
        log |= by_level("val/quant_loss", losses)
        log |= {"val/psnr": psnr(x, rec).mean(), "val/ssim": ssim(x, rec).mean()}
        self.val_codes_t.update(top.indices)
        self.val_codes_b.update(bottom.indices)
        self.log_dict(log, batch_size=len(x), sync_dist=True, on_epoch=True)

    def on_validation_epoch_start(self) -> None:
        self.val_codes_t.reset()
        self.val_codes_b.reset()

    def on_validation_epoch_end(self) -> None:
        used = [codes.compute() for codes in (self.val_codes_t, self.val_codes_b)]
        usage, perplexity = [100.0 * each["usage"] for each in used], [each["perplexity"] for each in used]
        log = by_level("val/codebook_usage_percent", usage) | by_level("val/codebook_perplexity", perplexity)
        log["val/codebook_usage_percent"] = torch.minimum(*usage)  # of the level that is used less
        log["val/codebook_perplexity"] = torch.minimum(*perplexity)
        self.log_dict(log, sync_dist=True)  # the same on all ranks


class TwoLevelVQModel(TwoLevelModel):
    """A VQGAN with codes at two levels: its blocks and its losses, in the wiring of VQ-VAE-2.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`, see `VQModel`; the last two resolutions of `ch_mult`
            are those of the bottom and the top codes.
        lossconfig: `{target, params}` of the loss; `DummyLoss` for a model that is only used.
        n_embed: number of codes K of each level.
        embed_dim: channels D of a code.
        ckpt_path, ignore_keys, image_key, monitor, betas, scheduler_config: see `VQModel`.
        beta: weight of the commitment.
        decay: share of the codebooks' running means that is kept in each batch; None: they have gradients.
        revive_after, kmeans_steps: see `VectorQuantizer2`.

    Raises:
        ValueError: ddconfig with `double_z`, or with a single resolution.
    """

    def __init__(
        self, ddconfig: DDConfig, lossconfig: dict, n_embed: PositiveInt, embed_dim: PositiveInt,
        ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (), image_key: str = "image",
        monitor: str | None = None, *,
        beta: NonNegativeFloat = 0.25, decay: Probability | None = None,
        revive_after: PositiveInt | None = None, kmeans_steps: NonNegativeInt = 0,
        betas: Betas = (0.5, 0.9), scheduler_config: dict | None = None,
    ):
        super().__init__(image_key, betas, monitor, scheduler_config)
        if ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z must be False (it defaults to True): codes have no variance")
        multiples, features = [*ddconfig.get("ch_mult", (1, 2, 4, 8))], ddconfig["z_channels"]
        if len(multiples) < 2:
            raise ValueError(f"ddconfig.ch_mult: {multiples} has one resolution; two levels need at least 2")
        bottom = {**ddconfig, "ch_mult": multiples[:-1]}
        self.enc_b = Encoder(**bottom)
        top = {
            **ddconfig, "ch_mult": multiples[-2:], "in_channels": features, "out_ch": features,
            "resolution": [side // self.enc_b.factor for side in _sides(ddconfig["resolution"])],
        }
        self.enc_t = Encoder(**top)
        self.dec_t = Decoder(**{**top, "z_channels": embed_dim})
        self.dec = Decoder(**{**bottom, "z_channels": 2 * embed_dim})
        self.resolution, self.channels = self.enc_b.resolution, self.enc_b.in_channels
        self.factor = self.enc_b.factor * self.enc_t.factor
        self.use_loss(lossconfig)
        self.quantize_conv_t = nn.Conv2d(features, embed_dim, 1)
        self.quantize_conv_b = nn.Conv2d(2 * features, embed_dim, 1)
        self.upsample_t = Upsample(embed_dim)
        self.use_codebooks(
            n_embed, embed_dim=embed_dim, beta=beta, decay=decay, revive_after=revive_after,
            kmeans_steps=kmeans_steps,
        )
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take one step of both networks: one forward, both losses, one backward."""
        x = self.get_images(batch)  #                       (B, C, H, W)
        quants, losses, _ = self.encode(x)  #               (B, D, h/2, w/2) and (B, D, h, w); () and ()
        rec = self.decode(quants)  #                        (B, C, H, W)

        step, last_layer, codebook_loss = self.batches_seen, self.get_last_layer(), losses[0] + losses[1]
        ae_loss, log = self.loss(codebook_loss, x, rec, 0, step, last_layer=last_layer)  # eq. 4, 6 and 7
        disc_loss, disc_log = self.loss(codebook_loss, x, rec, 1, step)  #               eq. 5
        log = {**log, **disc_log, "train/aeloss": ae_loss.detach()}
        log |= by_level("train/quant_loss", losses)
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

    def validation_losses(self, codebook_loss: Tensor, x: Tensor, rec: Tensor) -> dict[str, Any]:
        """Return the terms of both losses by their names."""
        step = self.batches_seen
        return self.loss(codebook_loss, x, rec, 0, step, split="val")[1] | self.loss(
            codebook_loss, x, rec, 1, step, split="val"
        )[1]

    def get_last_layer(self) -> Tensor:
        """Return the weight at which the adaptive weight compares gradients."""
        return self.dec.last_layer


def _sides(resolution: int | Sequence[int]) -> Sequence[int]:
    """Return (H, W) of a resolution."""
    return [resolution] * 2 if isinstance(resolution, int) else resolution
