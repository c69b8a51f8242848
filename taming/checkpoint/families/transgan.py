"""The generator of TransGAN's first version (Jiang et al. 2021, arXiv 2102.07074).

    cifar_checkpoint.pth   {"avg_gen_state_dict": ..., "gen_state_dict": ..., ...}
"""

import math

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State
from taming.checkpoint.families.convolutional import count

HEADS = (4, 2, 1)  # 4 in the published models, which shapes do not tell; else what divides the channels


def _matches(state: State) -> bool:
    return {"l1.weight", "pos_embed_1", "blocks.0.attn.qkv.weight", "deconv.0.weight"} <= state.keys()


def _config(state: State) -> Config:
    stages = count(state, r"upsample_blocks\.(\d+)\.")
    dim = state["pos_embed_1"].shape[2]
    heads = next(number for number in HEADS if dim // 4**stages % number == 0)
    depths = [count(state, rf"upsample_blocks\.{i}\.(\d+)\.") for i in range(stages)]
    return {"target": "taming.modules.transgan.generator.TransGANGenerator", "params": {
        "resolution": math.isqrt(state[f"pos_embed_{stages + 1}"].shape[1]),
        "dim": dim, "depths": [count(state, r"blocks\.(\d+)\."), *depths],
        "latent_dim": state["l1.weight"].shape[1], "heads": heads,
    }}


def _used(state: State) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("to_rgb.")}


TRANSGAN = Family(
    "TransGAN generator", "github.com/VITA-Group/TransGAN", "MIT", _matches, _config, _used
)
