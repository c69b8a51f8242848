"""Stage 1: the VQGAN, an autoencoder over a learnt codebook (Esser et al. 2021, section 3.1).

B batch, C channels, H W pixels, h w latent grid (H/f, W/f), K = n_embed codes. Images are in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.config import instantiate_from_config
from taming.models.base import ImageModel
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.losses import DummyLoss
from taming.modules.metrics import CodebookUsage, psnr, ssim
from taming.modules.vqvae.quantize import VectorQuantizer2


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
        if ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z must be False (it defaults to True): codes have no variance")
        self.image_key, self.betas = image_key, tuple(betas)
        self.encoder = Encoder(**ddconfig)
        self.resolution, self.factor = self.encoder.resolution, self.encoder.factor
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        if getattr(self.loss, "disc_conditional", False):
            raise ValueError("lossconfig.params.disc_conditional must be False: VQModel has no condition")
        self.quantize = VectorQuantizer2(
            n_embed, embed_dim, beta=beta, remap=remap, sane_index_shape=sane_index_shape, legacy=legacy,
            revive_after=revive_after,
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.val_codes = CodebookUsage(self.quantize.re_embed)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    # ---- images <-> codes

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Images (B, C, H, W) to (quant (B, embed_dim, h, w), codebook loss, (None, None, indices))."""
        self.check_size(*x.shape[-2:])
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantized latents (B, embed_dim, h, w) to images (B, C, H, W)."""
        return self.decoder(self.post_quant_conv(quant))

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
        return [
            torch.optim.Adam(self.generator_parameters(), lr=lr, betas=self.betas),
            torch.optim.Adam(self.loss.discriminator.parameters(), lr=lr, betas=self.betas),
        ]

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
        if colors is None:
            colors = torch.randn(3, x.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
        x = F.conv2d(x.float(), colors.to(x.device))
        lowest, highest = x.aminmax()
        return 2.0 * (x - lowest) / (highest - lowest).clamp_min(1e-8) - 1.0
