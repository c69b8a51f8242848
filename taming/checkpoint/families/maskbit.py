"""MaskBit's tokenizers (Weber et al. 2024): VQGAN+ with 10 or 12 bits, and lookup-free ones of 10 to 18."""

import re

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State
from taming.checkpoint.families.maskgit import count_of, model_config

LOOKUP_FREE = "taming.modules.quantizers.lookup_free.LFQ"


def _matches(state: State) -> bool:
    wanted = ("encoder.mid.res_blocks.0.conv1.weight", "decoder.up.0.res_blocks.0.conv1.weight")
    return all(name in state for name in wanted)


def _translate(state: State) -> dict[str, Tensor]:
    """Give residual blocks the names of MaskGIT's; `decoder.up` has the lowest resolution first.

    Older files have the full resolution first, which alone has no `upsample_conv`. Buffers of lookup-free
    quantizers are the bits of each index.
    """
    levels, lowest_first = count_of(state, "decoder.up"), "decoder.up.0.upsample_conv.weight" in state

    def level(found: re.Match) -> str:
        i = int(found[1])
        return f"decoder.up.{levels - 1 - i if lowest_first else i}."

    translated = {}
    for name, tensor in state.items():
        if name in ("quantize.bits_to_indices", "quantize.codebook"):
            continue
        name = name.replace(".mid.res_blocks.", ".mid.").replace(".res_blocks.", ".block.")
        translated[re.sub(r"^decoder\.up\.(\d+)\.", level, name)] = tensor
    return translated


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
