"""RAR's class-conditional priors (Yu et al. 2024): `rar_b.bin`, `rar_l.bin`, `rar_xl.bin`, `rar_xxl.bin`."""

import math

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State

POSITIONS = ("pos_embed", "target_aware_pos_embed", "timesteps_embeddings")
NAMES = {"cls_token", *POSITIONS, "embeddings.weight", "blocks.0.attn.q_norm.weight", "lm_head.weight",
         "adaln_before_head.adaLN_modulation.1.weight"}
SPARE = 1024  # position embeddings beyond the codes; those of steps are 100
SPARE_STEPS = 100
PREFIX = 2  # positions before the codes: the first token, and the class


def matches(state: State) -> bool:
    """Tell whether names are those of RAR."""
    return NAMES <= state.keys()


def _codes(state: State) -> int:
    """Return the number of codes of an image, N."""
    places, _, steps = (state[name].shape[1] for name in POSITIONS)
    return places - SPARE if places - SPARE == steps - SPARE_STEPS else places - PREFIX


def config(state: State) -> Config:
    """Return the model, of which all sizes are in the shapes; the grid is as square as N codes can be."""
    codes, channels = state["lm_head.weight"].shape
    count = _codes(state)
    height = next(side for side in range(math.isqrt(count), 0, -1) if count % side == 0)
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    return {"target": "taming.modules.priors.rar.RAR", "params": {
        "vocab_size": codes, "layout": [1, [height, count // height]],
        "condition_vocab_size": len(state["embeddings.weight"]) - codes - 1, "n_layer": len(blocks),
        "n_head": channels // len(state["blocks.0.attn.q_norm.weight"]), "n_embd": channels,
        "ffn_dim": len(state["blocks.0.mlp.fc1.weight"]),
    }}


def translate(state: State) -> dict[str, Tensor]:
    """Return all tensors, those of positions without the spare ones."""
    length = PREFIX + _codes(state)
    kept = {key: value for key, value in state.items() if key != "attn_mask"}
    return kept | {name: state[name][:, :length].contiguous() for name in POSITIONS}


RAR = Family(
    name="RAR", source="https://github.com/bytedance/1d-tokenizer", licence="Apache-2.0",
    matches=matches, config=config, translate=translate,
)
