"""TiTok's tokenizers (Yu et al. 2024).

L-32, B-64 and S-128 decode by way of MaskGIT's codes; the later BL-64, BL-128 and SL-256 decode to pixels.
"""

import math
from typing import Any

from torch import Tensor

from taming.checkpoint.families.base import NO_LOSS, Config, Family, State
from taming.checkpoint.families.convolutional import count
from taming.checkpoint.families.maskgit import decoder_config

NETWORKS = "taming.modules.titok.networks"
PIXEL_PARTS = ("pixel_decoder.", "pixel_quantize.")


def _matches(state: State) -> bool:
    wanted = (
        "latent_tokens", "encoder.latent_token_positional_embedding", "decoder.mask_token",
        "decoder.ffn.0.weight", "quantize.embedding.weight",
    )
    return all(name in state for name in wanted)


def _transformer(state: State, part: str) -> dict[str, Any]:
    """Return the sizes of a transformer, but for its heads, which show in no tensor."""
    width = state[f"{part}.class_embedding"].shape[1]
    return {"width": width, "num_layers": count(state, rf"{part}\.transformer\.(\d+)\.")}


def _config(state: State) -> Config:
    encoder, decoder = _transformer(state, "encoder"), _transformer(state, "decoder")
    num_tokens = state["latent_tokens"].shape[0]
    in_channels, patch_size = state["encoder.patch_embed.weight"].shape[1:3]
    side = math.isqrt(state["encoder.positional_embedding"].shape[0] - 1)
    resolution = side * patch_size
    decoder["patch_size"] = resolution // math.isqrt(state["decoder.positional_embedding"].shape[0] - 1)
    n_embed, z_channels = state["quantize.embedding.weight"].shape
    ddconfig = {
        "resolution": resolution, "num_tokens": num_tokens, "z_channels": z_channels,
        "patch_size": patch_size, "in_channels": in_channels, "pixel_range": [0.0, 1.0],
    }
    by_codes = "decoder.ffn.2.weight" in state
    if by_codes:
        if "pixel_quantize.embedding.weight" not in state:
            raise ValueError(
                "this TiTok is from the first stage of its training: its decoder gives codes of MaskGIT's "
                "VQGAN, which is not in the file; take one that has pixel_decoder and pixel_quantize"
            )
        encoder["legacy_order"] = True
        decoder["pixel_decoder"] = decoder_config(state, "pixel_decoder")
        decoder["pixel_codes"] = state["pixel_quantize.embedding.weight"].shape[0]
    params = {
        "ddconfig": ddconfig, "lossconfig": NO_LOSS, "n_embed": n_embed, "embed_dim": z_channels,
        "encoder_config": {"params": encoder},
        "decoder_config": {
            "target": f"{NETWORKS}.{'ProxyCodeDecoder' if by_codes else 'Decoder'}", "params": decoder,
        },
        # a unit length shows in no tensor either: published models have it where they decode by codes
        "quantizer_config": {
            "target": "taming.modules.quantizers.vector.VQ",
            "params": {"codebook_size": n_embed, "dim": z_channels, "l2_normalize": by_codes},
        },
    }
    return {"target": "taming.models.titok.TiTok", "params": params}


def _translate(state: State) -> dict[str, Tensor]:
    translated = {}
    for name, value in state.items():
        if name == "latent_tokens":
            name = f"encoder.{name}"
        translated[f"decoder.{name}" if name.startswith(PIXEL_PARTS) else name] = value
    return translated


TITOK = Family(
    name="TiTok tokenizer",
    source="https://github.com/bytedance/1d-tokenizer",
    licence="Apache-2.0",
    matches=_matches,
    config=_config,
    translate=_translate,
)
