"""Open-MAGVIT2's image tokenizers (Luo et al. 2024), lookup-free with one bit per channel."""

from torch import Tensor

from taming.checkpoint.families.base import NO_LOSS, Config, Family, State, plain_weights
from taming.checkpoint.families.maskbit import LOOKUP_FREE
from taming.checkpoint.families.maskgit import shared_sizes

NETWORKS = "taming.modules.magvit2.networks"


def _matches(state: State) -> bool:
    return "decoder.adaptive.0.gamma.weight" in state and "encoder.mid_block.0.conv1.weight" in state


def _config(state: State) -> Config:
    ddconfig = shared_sizes(state)
    bits = ddconfig["z_channels"]
    params = {
        "ddconfig": ddconfig, "lossconfig": NO_LOSS, "n_embed": 2**bits, "embed_dim": bits,
        "quant_conv_kernel": 0, "encoder_config": {"target": f"{NETWORKS}.Encoder"},
        "decoder_config": {"target": f"{NETWORKS}.Decoder"},
        "quantizer_config": {"target": LOOKUP_FREE, "params": {"codebook_size": 2**bits}},
    }
    return {"target": "taming.models.vqgan.VQModel", "params": params}


def _translate(state: State) -> dict[str, Tensor]:
    networks = ("encoder.", "decoder.")
    return {name: value for name, value in plain_weights(state).items() if name.startswith(networks)}


OPEN_MAGVIT2 = Family(
    name="Open-MAGVIT2 tokenizer",
    source="https://github.com/TencentARC/SEED-Voken",
    licence="Apache-2.0",
    matches=_matches,
    config=_config,
    translate=_translate,
)
