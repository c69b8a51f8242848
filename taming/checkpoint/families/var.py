"""VAR's tokenizer (Tian et al. 2024): the VQGAN, with residual codes at ten scales."""

import re

from torch import Tensor

from taming.checkpoint.families.base import NO_LOSS, Config, Family, State
from taming.checkpoint.families.convolutional import count, network_sizes


def _matches(state: State) -> bool:
    wanted = (
        "quantize.quant_resi.qresi_ls.0.weight", "quantize.embedding.weight", "encoder.mid.attn_1.qkv.weight",
        "quant_conv.weight",
    )
    return all(name in state for name in wanted)


def _config(state: State) -> Config:
    n_embed, embed_dim = state["quantize.embedding.weight"].shape
    named = _translate(state)
    finest = 16  # of the published scales, in codes of each side
    resolution = finest * 2 ** (count(named, r"encoder\.down\.(\d+)\.") - 1)
    ddconfig, decoder = network_sizes(named, resolution)
    convolutions = count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    params = {
        "ddconfig": ddconfig, "lossconfig": NO_LOSS, "n_embed": n_embed, "embed_dim": embed_dim,
        "quant_conv_kernel": state["quant_conv.weight"].shape[-1],
        "quantizer_config": {
            "target": "taming.modules.quantizers.multi_scale.MultiScaleResidualVQ",
            "params": {"codebook_size": n_embed, "dim": embed_dim, "num_convolutions": convolutions},
        },
    }
    if decoder:
        params["decoder_config"] = {"params": decoder}
    return {"target": "taming.models.vqgan.VQModel", "params": params}


def _translate(state: State) -> dict[str, Tensor]:
    """Split the fused queries, keys and values; leave out the counter of codes."""
    translated = {}
    for name, value in state.items():
        if fused := re.fullmatch(r"(.*\.)qkv\.(weight|bias)", name):
            for part, values in zip("qkv", value.chunk(3), strict=True):
                translated[f"{fused[1]}{part}.{fused[2]}"] = values
        elif name != "quantize.ema_vocab_hit_SV":
            translated[name] = value
    return translated


VAR = Family(
    name="VAR VQ-VAE",
    source="https://github.com/FoundationVision/VAR",
    licence="MIT",
    matches=_matches,
    config=_config,
    translate=_translate,
)
