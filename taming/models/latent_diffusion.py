"""First stages of latent diffusion (Rombach et al. 2022): VQGANs whose weights may be running averages.

Configs of that project say `ldm.models.autoencoder`.
B batch, C channels, H W pixels, h w latent grid (H/f, W/f).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.checkpoint.state_dict import take_averages
from taming.models import vqgan

EMA_DECAY = 0.9999


class VQModel(vqgan.VQModel):
    """A VQGAN with latent diffusion's arguments; it takes the running averages of a file that has them.

    Args:
        ddconfig, lossconfig, n_embed, embed_dim, ckpt_path, ignore_keys, image_key, colorize_nlabels,
            monitor, remap, sane_index_shape: see `taming.models.vqgan.VQModel`.
        batch_resize_range: smallest and largest side in pixels to which training batches are resized, square,
            in steps of 16; the first 5 batches get the largest, so that memory runs out early or not at all.
        scheduler_config: `{target, params}` of a callable from batches seen to a factor on the learning rate.
        lr_g_factor: multiplies the learning rate of all but the discriminator.
        use_ema: average the weights in training, with that project's decay, 0.9999; see
            `ImageModel.keep_averages`. A file that is loaded tells by itself whether it has averages.
    """

    def __init__(
        self, ddconfig: dict, lossconfig: dict, n_embed: int, embed_dim: int, ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (), image_key: str = "image", colorize_nlabels: int | None = None,
        monitor: str | None = None, batch_resize_range: tuple[int, int] | None = None,
        scheduler_config: dict | None = None, lr_g_factor: float = 1.0, remap: str | None = None,
        sane_index_shape: bool = False, use_ema: bool = False,
    ):
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, image_key=image_key, colorize_nlabels=colorize_nlabels,
            monitor=monitor, remap=remap, sane_index_shape=sane_index_shape,
            scheduler_config=scheduler_config,
        )
        self.n_embed, self.embed_dim = n_embed, embed_dim
        self.batch_resize_range, self.lr_g_factor, self.use_ema = batch_resize_range, lr_g_factor, use_ema
        self.keep_averages(EMA_DECAY if use_ema else None)
        self.register_load_state_dict_pre_hook(take_averages)
        self.takes_averages = True  # those of a file, by itself
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def forward(  # type: ignore[override]
        self, input: Tensor, return_pred_indices: bool = False
    ) -> tuple[Tensor, ...]:
        """Reconstruct images (B, C, H, W): (reconstructions, codebook loss), and the indices if asked for."""
        quant, codebook_loss, (_, _, indices) = self.encode(input)
        found = self.decode(quant), codebook_loss
        return (*found, indices) if return_pred_indices else found

    def get_input(self, batch: dict, key: str) -> Tensor:
        """Return entry `key` of a batch, resized in training where `batch_resize_range` says so."""
        x = super().get_input(batch, key)
        if self.batch_resize_range is None or not self.training or x.ndim != 4:
            return x
        lowest, highest = self.batch_resize_range
        size = highest
        if self.batches_seen > 4:
            size = lowest + 16 * int(torch.randint((highest - lowest) // 16 + 1, ()))
        return x if x.shape[2:] == (size, size) else F.interpolate(x, size=(size, size), mode="bicubic")

    def configure_optimizers(self) -> Any:
        """Make the optimizers of `vqgan.VQModel`, the first with its own factor on the learning rate."""
        optimizers, schedulers = super().configure_optimizers()
        optimizers[0].param_groups[0]["lr_factor"] = self.lr_g_factor
        return optimizers, schedulers


class VQModelInterface(VQModel):
    """The same autoencoder as a diffusion model sees it: latents are quantized when they are decoded.

    The arguments are `VQModel`'s, `embed_dim` first.
    """

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any):
        kwargs["embed_dim"] = embed_dim
        super().__init__(*args, **kwargs)

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Encode images (B, C, H, W) to latents (B, embed_dim, h, w), not quantized."""
        return self.encode_to_prequant(x)

    @torch.no_grad()
    def encode_codes(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) to codes (B, h, w), int64."""
        h, w = self.code_shape(*x.shape[2:])
        return self.quantize(self.encode(x))[2].indices.view(len(x), h, w)

    def tokens(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return quantized latents and codes (B, h, w), as a condition stage."""
        codes = self.encode_codes(c)
        return self.codes_to_latents(codes), codes

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Decode latents (B, embed_dim, h, w), quantized first unless `force_not_quantize`, to images."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])

    def forward(  # type: ignore[override]
        self, input: Tensor, return_pred_indices: bool = False
    ) -> tuple[Tensor, ...]:
        """Reconstruct images; see `VQModel.forward`."""
        quant, codebook_loss, (_, _, indices) = self.quantize(self.encode(input))
        found = self.decode(quant, force_not_quantize=True), codebook_loss
        return (*found, indices) if return_pred_indices else found

    def configure_optimizers(self) -> Any:
        """Raise: it is not for training."""
        raise ValueError("VQModelInterface is for use, not for training: train it as VQModel, the keys agree")
