"""A tokenizer of a sequence: TiTok (Yu et al. 2024, "An Image is Worth 32 Tokens").

B batch, C channels, H W pixels, N tokens of an image, K = n_embed codes. Images are in [-1, 1].
"""

from typing import Annotated, Any

from torch import Tensor

from taming.models.tokenizer import Codes, Size, SizeMismatch
from taming.models.vqgan import VQModel
from taming.modules.titok.networks import Decoder, Encoder
from taming.parameters import ParametersOf

DDConfig = Annotated[dict, ParametersOf(Encoder, Decoder, named_by=("encoder_config", "decoder_config"))]


class TiTok(VQModel):
    """A VQGAN whose codes are a sequence (B, 1, N): they have no place in the image.

    Its transformers take images of one size. No convolution stands between them and the codes.

    Args:
        ddconfig: arguments of `taming.modules.titok.networks.Encoder` and `Decoder`; where the two differ, in
            their width for instance, `encoder_config` and `decoder_config` say in what.
        arguments: those of `VQModel`; embed_dim is z_channels.
    """

    spatial = False

    def __init__(self, ddconfig: DDConfig, *arguments: Any, **named: Any):
        super().__init__(ddconfig, *arguments, **{"quant_conv_kernel": 0, **named})

    def build_networks(self, ddconfig: dict, encoder: dict, decoder: dict) -> tuple[Any, Any]:
        """Build encoder and decoder, those of TiTok where no other is named."""
        configs = [
            {"target": f"{default.__module__}.{default.__name__}", **config}
            for config, default in ((encoder, Encoder), (decoder, Decoder))
        ]
        networks = super().build_networks(ddconfig, *configs)
        counts = [network.num_tokens for network in networks]
        if counts[0] != counts[1]:
            raise ValueError(f"num_tokens: {counts[0]} in the encoder, but {counts[1]} in the decoder")
        return networks

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless images have the size that the model is made for."""
        self.check_training_size(height, width)

    def check_training_size(self, height: int, width: int) -> None:
        """Raise SizeMismatch unless images have the size that the model is made for."""
        if (height, width) != self.image_size:
            raise SizeMismatch((height, width), self.image_size)

    def latent_shape(self, height: int, width: int) -> Size:
        """Return the grid of the latents, (1, N)."""
        self.check_size(height, width)
        return 1, self.encoder.num_tokens

    def token_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of the tokens of a condition, (N,)."""
        return self.latent_shape(height, width)[1:]

    def tokens(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a condition (B, C, H, W) to quantized latents (B, embed_dim, 1, N) and tokens (B, N)."""
        quant, tokens = super().tokens(c)
        return quant, tokens.flatten(1)

    def decode_code(self, code_b: Codes) -> Tensor:
        """Decode codebook indices (B, 1, N), (B, N) or a list to images (B, C, H, W)."""
        is_flat = isinstance(code_b, Tensor) and code_b.ndim == 2
        return super().decode_code(code_b[:, None] if is_flat else code_b)
