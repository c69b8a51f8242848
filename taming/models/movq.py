"""MoVQ (Zheng et al. 2022, arXiv 2209.09002): a VQGAN whose codes also modulate the features of the decoder.

B batch, C channels, H W pixels, h w latent grid, D = embed_dim channels of a code.
"""

from typing import Any

from torch import Tensor

from taming.models.vqgan import VQModel, as_grid
from taming.parameters import PositiveInt

DECODER = "taming.modules.movq.decoder.MOVQDecoder"


class MOVQ(VQModel):
    """A VQGAN with the decoder `MOVQDecoder`; the image decoder of Kandinsky 2 is one.

    Args:
        ddconfig, lossconfig, n_embed, embed_dim, arguments: see `VQModel`; there is no `decoder_config`.
    """

    def __init__(
        self, ddconfig: dict, lossconfig: dict, n_embed: PositiveInt, embed_dim: PositiveInt,
        *args: Any, **arguments: Any,
    ):
        decoder = {"target": DECODER, "params": {"embed_dim": embed_dim}}
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, *args, **arguments, decoder_config=decoder
        )

    def decode(self, quant: Tensor) -> Tensor:
        """Decode quantized latents (B, D, h, w) to images (B, C, H, W)."""
        return self.decoder(self.post_quant_conv(quant), quant)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Decode codebook indices (B, h, w), or (B, N) of a square grid, to images (B, C, H, W)."""
        return self.decode(self.codes_to_latents(as_grid(code_b)))
