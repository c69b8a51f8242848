"""MaskBit's tokenizers (Weber et al. 2024): VQGAN+ with 10 or 12 bits, and lookup-free ones of 10 to 18."""

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State
from taming.checkpoint.families.convolutional import highest_first
from taming.checkpoint.families.maskgit import model_config

LOOKUP_FREE = "taming.modules.quantizers.lookup_free.LFQ"


def _matches(state: State) -> bool:
    wanted = ("encoder.mid.res_blocks.0.conv1.weight", "decoder.up.0.res_blocks.0.conv1.weight")
    return all(name in state for name in wanted)


def _translate(state: State) -> dict[str, Tensor]:
    """Give residual blocks the names of MaskGIT's, and leave out the bits of each index.

    `decoder.up` has the lowest resolution first, but in older files the full one, without `upsample_conv`.
    """
    if "decoder.up.0.upsample_conv.weight" in state:
        state = highest_first(state, "decoder.up.")
    bits = ("quantize.bits_to_indices", "quantize.codebook")
    return {
        name.replace(".mid.res_blocks.", ".mid.").replace(".res_blocks.", ".block."): value
        for name, value in state.items() if name not in bits
    }


def _config(state: State) -> Config:
    named = _translate(state)
    if "quantize.embedding.weight" in state:
        return model_config(named)
    bits = state["encoder.conv_out.weight"].shape[0]
    quantizer = {"target": LOOKUP_FREE, "params": {"codebook_size": 2**bits}}
    return model_config(named, quantizer, 2**bits)


MASKBIT = Family(
    name="MaskBit tokenizer (VQGAN+, LFQ)",
    source="https://github.com/markweberdev/maskbit",
    licence="Apache-2.0",
    matches=_matches,
    config=_config,
    translate=_translate,
)
