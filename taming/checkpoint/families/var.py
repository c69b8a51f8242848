"""VAR's tokenizer (Tian et al. 2024): the VQGAN, with residual codes at ten scales."""

import re

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State
from taming.checkpoint.families.maskgit import DUMMY, count_of


def _matches(state: State) -> bool:
    wanted = (
        "quantize.quant_resi.qresi_ls.0.weight", "quantize.embedding.weight", "encoder.mid.attn_1.qkv.weight",
        "quant_conv.weight",
    )
    return all(name in state for name in wanted)


def _config(state: State) -> Config:
    ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
    levels = range(count_of(state, "encoder.down"))
    n_embed, embed_dim = state["quantize.embedding.weight"].shape
    attends = [i for i in levels if f"encoder.down.{i}.attn.0.norm.weight" in state]
    resolution = 16 * 2 ** (len(levels) - 1)  # the finest of the published scales has 16x16 codes
    ddconfig = {
        "ch": ch, "in_channels": in_channels, "out_ch": state["decoder.conv_out.weight"].shape[0],
        "ch_mult": [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in levels],
        "num_res_blocks": count_of(state, "encoder.down.0.block"),
        "z_channels": state["encoder.conv_out.weight"].shape[0], "resolution": resolution,
        "attn_resolutions": [resolution // 2**i for i in attends], "double_z": False,
    }
    convolutions = count_of(state, "quantize.quant_resi.qresi_ls")
    params = {
        "ddconfig": ddconfig, "lossconfig": DUMMY, "n_embed": n_embed, "embed_dim": embed_dim,
        "quant_conv_kernel": state["quant_conv.weight"].shape[-1],
        "quantizer_config": {
            "target": "taming.modules.quantizers.multi_scale.MultiScaleResidualVQ",
            "params": {"codebook_size": n_embed, "dim": embed_dim, "num_convolutions": convolutions},
        },
    }
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
