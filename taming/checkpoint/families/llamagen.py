"""The tokenizers of LlamaGen (Sun et al. 2024, arXiv 2406.06525) and of Janus, which is the same model.

    vq_ds16_c2i.pt, vq_ds16_t2i.pt, vq_ds8_c2i.pt   {"model": ...}; own trainings also {"ema": ...}
    Janus                                           gen_vision_model.* in the file of the whole model, or
                                                    model.vqmodel.* with other names in transformers

The levels of the decoder are counted from the lowest resolution there, here from the highest.
"""

import re

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State, plain_weights
from taming.checkpoint.families.convolutional import has_networks, highest_first, vq_model

CODEBOOK = "quantize.embedding.weight"
USAGE = "quantize.codebook_used"  # the last codes of its training, which nothing uses
MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}
QUANTIZER = "taming.modules.quantizers.vector.VQ"


def _is_llamagen(state: State) -> bool:
    names = {CODEBOOK, "encoder.conv_blocks.0.res.0.conv1.weight", "decoder.mid.0.conv1.weight"}
    return names <= state.keys()


def _to_ours(state: State) -> dict[str, Tensor]:
    found = {}
    for key, value in highest_first(state, "decoder.conv_blocks.").items():
        key = re.sub(r"\.mid\.(\d)\.", lambda match: f".mid.{MIDDLE[match[1]]}.", key)
        key = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", key)
        found[re.sub(r"\.res\.(\d+)\.", r".block.\1.", key)] = value
    return _kept(found)


def _is_reversed(state: State) -> bool:
    """Tell whether names are ours, but levels of the decoder are counted from the lowest resolution."""
    return has_networks(state) and CODEBOOK in state and "decoder.up.0.upsample.conv.weight" in state


def _in_order(state: State) -> dict[str, Tensor]:
    return _kept(highest_first(state, "decoder.up."))


def _kept(state: State) -> dict[str, Tensor]:
    return {key: value for key, value in plain_weights(state).items() if key != USAGE}


def _config(state: State, resolution: int) -> Config:
    """Return the config of a VQGAN with codes and latents of length 1."""
    n_embed, embed_dim = state[CODEBOOK].shape
    quantizer = {"target": QUANTIZER, "params": {
        "codebook_size": n_embed, "dim": embed_dim, "l2_normalize": True,
    }}
    return vq_model(state, resolution, quantizer_config=quantizer)


LLAMAGEN = Family(
    "LlamaGen VQ", "github.com/FoundationVision/LlamaGen", "MIT", _is_llamagen,
    lambda state: _config(_to_ours(state), 256), _to_ours,
)
JANUS = Family(
    "Janus VQ", "github.com/deepseek-ai/Janus", "MIT", _is_llamagen,
    lambda state: _config(_to_ours(state), 384), _to_ours, part="gen_vision_model.",
)
JANUS_TRANSFORMERS = Family(
    "Janus VQ (transformers)", "github.com/huggingface/transformers", "Apache-2.0", _is_reversed,
    lambda state: _config(_in_order(state), 384), _in_order,
)
FAMILIES = (JANUS, LLAMAGEN, JANUS_TRANSFORMERS)
