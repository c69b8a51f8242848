"""A tokenizer with codes at many scales: that of VAR (Tian et al. 2024, "Visual autoregressive modeling").

B batch, C channels, H W pixels, h w latent grid, h_k w_k grid of codes of scale k, K = n_embed codes. Images
are in [-1, 1].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taming.models.tokenizer import Size
from taming.models.vqgan import VQModel
from taming.modules.diffusionmodules import tiled


class MultiScaleVQModel(VQModel):
    """A VQGAN whose latents are the sum of codes at several scales; it has a grid of codes for each.

    Args:
        arguments: those of `VQModel`. The quantizer is a `MultiScaleResidualVQ` or has, as that, `num_levels`
            and `grids(h, w)`, the coarsest first.

    Raises:
        ValueError: no `quantizer_config`.
    """

    def __init__(self, *arguments: Any, **named: Any):
        if not named.get("quantizer_config"):
            raise ValueError(
                "quantizer_config is missing: name "
                "taming.modules.quantizers.multi_scale.MultiScaleResidualVQ, with the scales of the codes"
            )
        super().__init__(*arguments, **named)
        self.levels = self.quantize.num_levels

    def code_shape(self, height: int, width: int) -> list[Size]:
        """Return the grids (h_k, w_k) of an image of `height` x `width` pixels, the coarsest first."""
        return self.quantize.grids(*super().code_shape(height, width))

    @torch.no_grad()
    def encode_codes(self, x: Tensor) -> list[Tensor]:
        """Encode images (B, C, H, W) to codes (B, h_k, w_k), int64, the coarsest first."""
        grids = self.code_shape(*x.shape[2:])
        each = self.encode(x)[2].indices.split([h * w for h, w in grids], dim=1)
        return [codes.view(len(x), *grid) for codes, grid in zip(each, grids, strict=True)]

    def codes_to_latents(self, codes: Sequence[Tensor]) -> Tensor:
        """Add up codes (B, h_k, w_k) of all scales: (B, embed_dim, h, w)."""
        return self.quantize.indices_to_codes(codes)

    def decode_code(self, code_b: Sequence[Tensor]) -> Tensor:
        """Decode codes (B, h_k, w_k) of all scales to images (B, C, H, W), large ones in tiles."""
        latents = self.post_quant_conv(self.codes_to_latents(code_b))
        return tiled.decode(self.decoder, latents, self.decode_memory)
