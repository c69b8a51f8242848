"""VQ-VAE-2: an autoencoder with codes at two levels (Razavi et al. 2019, "Generating diverse high-fidelity
images with VQ-VAE-2").

B batch, C channels, H W pixels, h w bottom grid, D = embed_dim, K = n_embed. Images are in [-1, 1].
"""

from typing import Any

import torch
from torch import Tensor, nn

from taming.checkpoint.families.vqvae2 import KEYS
from taming.models.autoencoder import Betas
from taming.models.two_level import TwoLevelModel, by_level
from taming.models.vqvae import PIXELS_ALONE, DDConfig
from taming.modules.vqvae.networks import Decoder, Encoder
from taming.parameters import NonNegativeFloat, NonNegativeInt, PositiveInt, Probability


class VQVAE2(TwoLevelModel):
    """VQ-VAE-2 with two levels; checkpoints of rosinality/vq-vae-2-pytorch load as they are.

        L = mean (x - x_rec)^2 + beta (mean (z_t - sg[e_t])^2 + mean (z_b - sg[e_b])^2)

    Both codebooks follow running means of the latents.

    Args:
        ddconfig: arguments of `taming.modules.vqvae.networks.Encoder` and `Decoder`; `num_down` leads to the
            bottom level, and one more convolution to the top.
        n_embed: number of codes K of each level.
        embed_dim: channels D of a code.
        lossconfig: `{target, params}` of another loss than squared distances; see `VQNoDiscModel`.
        ckpt_path, ignore_keys, image_key, monitor, scheduler_config, betas: see `VQModel`.
        beta: weight of the commitment.
        decay: share of the running means that is kept in each batch; None: the codebooks have gradients.
        revive_after, kmeans_steps: see `VectorQuantizer2`.
    """

    def __init__(
        self, ddconfig: DDConfig, n_embed: PositiveInt, embed_dim: PositiveInt,
        lossconfig: dict | None = None, ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (),
        image_key: str = "image", monitor: str | None = None, *,
        beta: NonNegativeFloat = 0.25, decay: Probability | None = 0.99,
        revive_after: PositiveInt | None = None, kmeans_steps: NonNegativeInt = 0,
        betas: Betas = (0.9, 0.999), scheduler_config: dict | None = None,
    ):
        super().__init__(image_key, betas, monitor, scheduler_config)
        ch = ddconfig["ch"]
        above = {**ddconfig, "in_channels": ch, "num_down": 1}
        self.enc_b = Encoder(**ddconfig)
        self.enc_t = Encoder(**above)
        self.resolution, self.channels = self.enc_b.resolution, self.enc_b.in_channels
        self.factor = self.enc_b.factor * self.enc_t.factor
        self.quantize_conv_t = nn.Conv2d(ch, embed_dim, 1)
        self.dec_t = Decoder(**{**above, "out_ch": embed_dim, "z_channels": embed_dim})
        self.quantize_conv_b = nn.Conv2d(embed_dim + ch, embed_dim, 1)
        self.upsample_t = nn.ConvTranspose2d(embed_dim, embed_dim, 4, stride=2, padding=1)
        self.dec = Decoder(**ddconfig, z_channels=2 * embed_dim)
        self.use_codebooks(
            n_embed, embed_dim=embed_dim, beta=beta, decay=decay, revive_after=revive_after,
            kmeans_steps=kmeans_steps, smoothing=True,
        )
        self.use_loss(lossconfig or PIXELS_ALONE)
        self.register_load_state_dict_pre_hook(_rename_codebooks)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take one step of the autoencoder."""
        x = self.get_images(batch)  #                       (B, C, H, W)
        quants, losses, _ = self.encode(x)  #               (B, D, h/2, w/2) and (B, D, h, w); () and ()
        rec = self.decode(quants)  #                        (B, C, H, W)
        loss, log = self.loss(losses[0] + losses[1], x, rec, split="train")
        log |= by_level("train/quant_loss", losses)
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


def _rename_codebooks(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Give codebooks of other code their names and shapes here: a load hook of torch."""
    for level in ("quantize_t.", "quantize_b."):
        for theirs, ours in KEYS.items():
            value = state.pop(f"{prefix}{level}{theirs}", None)
            if value is not None:
                state[f"{prefix}{level}{ours}"] = value.t().contiguous()
