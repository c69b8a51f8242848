"""Open-MAGVIT2's image tokenizers (Luo et al. 2024), lookup-free with one bit per channel."""

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State
from taming.checkpoint.families.maskbit import LOOKUP_FREE
from taming.checkpoint.families.maskgit import DUMMY, count_of

NETWORKS = "taming.modules.magvit2.networks"
AVERAGES = "model_ema."


def _matches(state: State) -> bool:
    return "decoder.adaptive.0.gamma.weight" in state and "encoder.mid_block.0.conv1.weight" in state


def _config(state: State) -> Config:
    ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
    levels = range(count_of(state, "encoder.down"))
    bits = state["encoder.conv_out.weight"].shape[0]
    ddconfig = {
        "ch": ch, "in_channels": in_channels, "out_ch": state["decoder.conv_out.weight"].shape[0],
        "ch_mult": [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in levels],
        "num_res_blocks": count_of(state, "encoder.down.0.block"), "z_channels": bits, "resolution": 256,
        "attn_resolutions": [], "double_z": False,
    }
    params = {
        "ddconfig": ddconfig, "lossconfig": DUMMY, "n_embed": 2**bits, "embed_dim": bits,
        "quant_conv_kernel": 0, "encoder_config": {"target": f"{NETWORKS}.Encoder"},
        "decoder_config": {"target": f"{NETWORKS}.Decoder"},
        "quantizer_config": {"target": LOOKUP_FREE, "params": {"codebook_size": 2**bits}},
    }
    return {"target": "taming.models.vqgan.VQModel", "params": params}


def _translate(state: State) -> dict[str, Tensor]:
    """Take encoder and decoder, and for each weight its running average where the file has one.

    Averages are named without dots.
    """
    weights = {name: value for name, value in state.items() if name.startswith(("encoder.", "decoder."))}
    return {name: state.get(AVERAGES + name.replace(".", ""), value) for name, value in weights.items()}


OPEN_MAGVIT2 = Family(
    name="Open-MAGVIT2 tokenizer",
    source="https://github.com/TencentARC/SEED-Voken",
    licence="Apache-2.0",
    matches=_matches,
    config=_config,
    translate=_translate,
)
