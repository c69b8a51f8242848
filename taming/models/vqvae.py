"""VQ-VAE: an autoencoder over a learned codebook (van den Oord et al. 2017, "Neural discrete representation
learning").

B batch, C channels, H W pixels, h w latent grid (H/f, W/f), K = n_embed codes. Images are in [-1, 1].
"""

from typing import Annotated

from taming.metrics import psnr, ssim
from taming.models.autoencoder import Betas
from taming.models.vqgan import VQNoDiscModel
from taming.modules.vqvae.networks import Decoder, Encoder
from taming.modules.vqvae.quantize import codebook
from taming.parameters import NonNegativeFloat, NonNegativeInt, ParametersOf, PositiveInt, Probability

DDConfig = Annotated[dict, ParametersOf(Encoder, Decoder)]
PIXELS_ALONE = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPS",
    "params": {"perceptual_weight": 0.0, "pixel_loss": "l2"},
}


class VQVAE(VQNoDiscModel):
    """The VQ-VAE of 2017: strided convolutions and residual blocks, squared distances of pixels.

        L = mean (x - x_rec)^2 + codebook + beta * mean (z - sg[e])^2          eq. 3

    The codebook follows running means of the latents (appendix A.1), or, with `decay` None, gradients of the
    term `codebook`, mean (sg[z] - e)^2. All are means over elements.

    Args:
        ddconfig: arguments of `taming.modules.vqvae.networks.Encoder` and `Decoder`.
        n_embed: number of codes K.
        embed_dim: channels of a code.
        lossconfig: `{target, params}` of another loss than squared distances; see `VQNoDiscModel`.
        ckpt_path, ignore_keys, image_key, monitor, scheduler_config, betas: see `VQModel`.
        beta: weight of the commitment.
        decay: share of the running means that is kept in each batch; None: the codebook has gradients.
        revive_after, kmeans_steps: restarts of unused codes, and a start from clusters of the first batch;
            see `VectorQuantizer2`.
    """

    def __init__(
        self, ddconfig: DDConfig, n_embed: PositiveInt, embed_dim: PositiveInt,
        lossconfig: dict | None = None, ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (),
        image_key: str = "image", monitor: str | None = None, *,
        beta: NonNegativeFloat = 0.25, decay: Probability | None = 0.99,
        revive_after: PositiveInt | None = None, kmeans_steps: NonNegativeInt = 0,
        betas: Betas = (0.9, 0.999), scheduler_config: dict | None = None,
    ):
        super().__init__(
            ddconfig, lossconfig or PIXELS_ALONE, n_embed, embed_dim, image_key=image_key, monitor=monitor,
            betas=betas, scheduler_config=scheduler_config,
        )
        self.use_quantizer(codebook(n_embed, embed_dim, beta, decay, revive_after, kmeans_steps))
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def build_networks(self, ddconfig: dict, encoder: dict, decoder: dict) -> tuple[Encoder, Decoder]:
        """Build encoder and decoder."""
        return Encoder(**ddconfig), Decoder(**ddconfig)

    @property
    def validation_metrics(self) -> tuple[str, ...] | None:
        """Names that validation logs, without "val/"; None if the loss does not tell its own."""
        names = super().validation_metrics
        return names and (*names, "psnr", "ssim")

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log losses, PSNR and SSIM of the batch, averaged over the set, and count its codes."""
        x = self.get_images(batch)
        quant, codebook_loss, (_, _, indices) = self.encode(x)
        rec = self.decode(quant)
        _, log = self.loss(codebook_loss, x, rec, split="val")
        log |= {"val/psnr": psnr(x, rec).mean(), "val/ssim": ssim(x, rec).mean()}
        self.val_codes.update(indices)
        self.log_dict(log, batch_size=len(x), sync_dist=True, on_epoch=True)
