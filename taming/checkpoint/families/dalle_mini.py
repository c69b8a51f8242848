"""The VQGAN of dalle-mini: flax_model.msgpack, made of a VQGAN of 2021 by patil-suraj/vqgan-jax.

Lists have numbers behind a low line there, down_0; kernels are (height, width, in, out). Pixels are in
[0, 1].
"""

import re

from torch import Tensor

from taming.checkpoint.families.base import Family, State
from taming.checkpoint.families.convolutional import vq_model

KINDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _to_ours(state: State) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if ".mid." not in key:
            name = re.sub(r"(down|up|block|attn)_(\d+)", r"\1.\2", name)
        if kind == "kernel":
            value = value.permute(3, 2, 0, 1).contiguous()
        elif kind in ("scale", "bias"):  # normalizations of old versions are (1, 1, 1, C)
            value = value.flatten()
        found[f"{name}.{KINDS[kind]}"] = value
    return found


def _matches(state: State) -> bool:
    names = {"encoder.conv_in.kernel", "encoder.down_0.block_0.conv1.kernel", "quantize.embedding.embedding"}
    return names <= state.keys()


DALLE_MINI = Family(
    "dalle-mini VQGAN", "github.com/patil-suraj/vqgan-jax", "none stated", _matches,
    lambda state: vq_model(_to_ours(state), 256, pixel_range=(0.0, 1.0)), _to_ours,
)
