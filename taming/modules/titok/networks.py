"""Transformers between images and a sequence of tokens that have no place in the image.

Source: Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation" (TiTok). Attribute
names are the keys of published checkpoints.

B batch, C channels, H W pixels, p patch_size, P patches (H / p * W / p), N num_tokens, D width.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Resolution
from taming.modules.maskgit.networks import Decoder as MaskGITDecoder
from taming.modules.pixel_range import UNIT, PixelRange, from_images, to_images
from taming.parameters import ParametersOf, PositiveInt

HEAD_WIDTH = 64  # channels of a head in published models


class Block(nn.Module):
    """Self-attention and a perceptron of four times the width, each normalized, beside skip connections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    """What encoder and decoder share: a class token, P patches and N tokens, and blocks over all of them.

    The class token has no use but for the attention of others.
    """

    def __init__(
        self, resolution: int | Sequence[int], patch_size: int, num_tokens: int, width: int, num_layers: int,
        heads: int | None,
    ):
        super().__init__()
        height, width_of_image = (resolution, resolution) if isinstance(resolution, int) else resolution
        if height % patch_size or width_of_image % patch_size:
            raise ValueError(f"resolution: {resolution} is not a multiple of patch_size: {patch_size}")
        if heads is None and width % HEAD_WIDTH:
            raise ValueError(
                f"heads is missing, the attention heads of the width: {width}, which is not a multiple of "
                f"{HEAD_WIDTH}, the channels of a head in published models: give heads"
            )
        heads = width // HEAD_WIDTH if heads is None else heads
        if width % heads:
            raise ValueError(f"heads: {heads} do not divide width: {width}")
        self.grid = height // patch_size, width_of_image // patch_size
        self.num_tokens = num_tokens
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(self.grid[0] * self.grid[1] + 1, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(num_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(num_layers))
        self.ln_post = nn.LayerNorm(width)

    def initialize(self) -> None:
        """Initialise as the published code does: weights with deviation 0.02, embeddings with D ** -0.5."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def run(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """Map patches (B, P, D) and tokens (B, N, D) to what becomes of all, (B, 1 + P + N, D)."""
        first = self.class_embedding.expand(len(patches), -1, -1)  # (B, 1, D)
        patches = torch.cat((first, patches), dim=1) + self.positional_embedding
        tokens = tokens + self.latent_token_positional_embedding
        h = self.ln_pre(torch.cat((patches, tokens), dim=1))
        for block in self.transformer:
            h = block(h)
        return h


class Encoder(_Transformer):
    """Map images (B, in_channels, H, W) in [-1, 1] to latents (B, z_channels, 1, N).

    The tokens are learned vectors that gather in the transformer what they describe.

    Args:
        resolution: size of the images in pixels, a side or [height, width]; there is no other.
        num_tokens: N.
        z_channels: channels of the latents.
        patch_size: side of a patch in pixels.
        width: D; published models have 512, 768 and 1024.
        num_layers: blocks; published models have 8, 12 and 24.
        heads: of the attention; None takes width / 64, as published models do.
        in_channels: channels of the images.
        out_ch: channels of the decoded image (the decoder's; taken so that both halves share one `ddconfig`).
        legacy_order: read the memory of the tokens (N, D) as (D, N), without a transpose, as the first
            published models do: each latent then mixes values of several tokens.
        pixel_range: lowest and highest value of a pixel inside the network; images are in [-1, 1] outside.
        double_z: of the VQGAN's networks; there is no variance here.

    Raises:
        ValueError: sides that are not multiples of `patch_size`, or a width that is none of `heads`, or of 64
            without heads.
    """

    def __init__(
        self, *, resolution: Resolution, num_tokens: PositiveInt, z_channels: PositiveInt,
        patch_size: PositiveInt = 16, width: PositiveInt = 512, num_layers: PositiveInt = 8,
        heads: PositiveInt | None = None, in_channels: PositiveInt = 3, out_ch: PositiveInt = 3,
        legacy_order: bool = False, pixel_range: PixelRange = UNIT, double_z: bool = False,
    ):
        super().__init__(resolution, patch_size, num_tokens, width, num_layers, heads)
        self.resolution, self.factor = resolution, patch_size
        self.in_channels, self.z_channels, self.legacy_order = in_channels, z_channels, legacy_order
        self.pixel_range, self.from_images = (pixel_range[0], pixel_range[1]), from_images(pixel_range)
        self.latent_tokens = nn.Parameter(torch.empty(num_tokens, width))
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(width, z_channels, 1)
        self.initialize()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(self.from_images(x)).flatten(2).transpose(1, 2)  # (B, P, D)
        h = self.run(patches, self.latent_tokens.expand(len(x), -1, -1))
        h = self.ln_post(h[:, -self.num_tokens :])  # (B, N, D)
        h = h.reshape(len(h), -1, self.num_tokens) if self.legacy_order else h.transpose(1, 2)
        return self.conv_out(h[:, :, None])  # (B, z_channels, 1, N)


class _Decoder(_Transformer):
    """Map latents (B, z_channels, 1, N) to features of the patches, (B, D, H / p, W / p)."""

    def __init__(self, z_channels: int, *sizes: Any):
        super().__init__(*sizes)
        width = self.class_embedding.shape[1]
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_embed = nn.Linear(z_channels, width)

    def features(self, z: Tensor) -> Tensor:
        height, width = self.grid
        tokens = self.decoder_embed(z.flatten(2).transpose(1, 2))  # (B, N, D)
        h = self.run(self.mask_token.expand(len(z), height * width, -1), tokens)
        h = self.ln_post(h[:, 1 : 1 + height * width])  # (B, P, D)
        return h.transpose(1, 2).unflatten(2, self.grid)


class Decoder(_Decoder):
    """Map latents (B, z_channels, 1, N) to images (B, out_ch, H, W), about in [-1, 1].

    Arguments are those of `Encoder`; `in_channels` is for the encoder alone.
    """

    def __init__(
        self, *, resolution: Resolution, num_tokens: PositiveInt, z_channels: PositiveInt,
        patch_size: PositiveInt = 16, width: PositiveInt = 512, num_layers: PositiveInt = 8,
        heads: PositiveInt | None = None, in_channels: PositiveInt = 3, out_ch: PositiveInt = 3,
        pixel_range: PixelRange = UNIT, double_z: bool = False,
    ):
        super().__init__(z_channels, resolution, patch_size, num_tokens, width, num_layers, heads)
        self.out_ch, self.patch_size, self.to_images = out_ch, patch_size, to_images(pixel_range)
        self.ffn = nn.Sequential(nn.Conv2d(width, patch_size**2 * out_ch, 1))
        self.conv_out = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.initialize()

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.ffn(self.features(z))  # (B, p * p * out_ch, H / p, W / p)
        p = self.patch_size
        x = rearrange(h, "b (row column c) h w -> b c (h row) (w column)", row=p, column=p)
        return self.to_images(self.conv_out(x))  # (B, out_ch, H, W)


class ProxyCodeDecoder(_Decoder):
    """Map latents (B, z_channels, 1, N) to images by way of the codes of another tokenizer, MaskGIT's VQGAN.

    For each patch there are logits over its codebook; the mean of the codes with these probabilities is what
    its decoder gets (section 3.3, "two-stage training").

    Args:
        pixel_decoder: arguments of `taming.modules.maskgit.networks.Decoder`.
        pixel_codes: codes of that tokenizer.
        others: those of `Encoder`; `in_channels` is for the encoder alone.

    Raises:
        ValueError: also a pixel decoder of another downsampling factor than `patch_size`.
    """

    def __init__(
        self, *, resolution: Resolution, num_tokens: PositiveInt, z_channels: PositiveInt,
        pixel_decoder: Annotated[dict, ParametersOf(MaskGITDecoder)], pixel_codes: PositiveInt = 1024,
        patch_size: PositiveInt = 16, width: PositiveInt = 512, num_layers: PositiveInt = 8,
        heads: PositiveInt | None = None, in_channels: PositiveInt = 3, out_ch: PositiveInt = 3,
        pixel_range: PixelRange = UNIT, double_z: bool = False,
    ):
        super().__init__(z_channels, resolution, patch_size, num_tokens, width, num_layers, heads)
        self.ffn = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, pixel_codes, 1)
        )
        self.initialize()
        embedding = nn.Embedding(pixel_codes, pixel_decoder["z_channels"])
        self.pixel_quantize = nn.ModuleDict({"embedding": embedding})
        arguments = {"out_ch": out_ch, "pixel_range": pixel_range, **pixel_decoder}
        self.pixel_decoder = MaskGITDecoder(**arguments)
        self.out_ch, factor = self.pixel_decoder.out_ch, 2 ** (len(self.pixel_decoder.up) - 1)
        if factor != patch_size:
            raise ValueError(
                f"pixel_decoder: its codes are of {factor}x{factor} pixels, but patch_size is {patch_size}"
            )

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        return self.pixel_decoder.last_layer

    def forward(self, z: Tensor) -> Tensor:
        shares = self.ffn(self.features(z)).softmax(1)  # (B, pixel_codes, H / p, W / p)
        codes: Any = self.pixel_quantize["embedding"].weight  # (pixel_codes, C)
        latents = torch.einsum("b k h w, k c -> b c h w", shares, codes)
        return self.pixel_decoder(latents)  # (B, out_ch, H, W)
