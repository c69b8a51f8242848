"""MaskGIT's VQGAN (Chang et al. 2022), in PyTorch; RAR, TiTok, MaskBit and RandAR generate its codes."""

import math
from typing import Any

from torch import Tensor

from taming.checkpoint.families.base import NO_LOSS, Config, Family, State
from taming.checkpoint.families.convolutional import count

NETWORKS = "taming.modules.maskgit.networks"


def decoder_config(state: State, prefix: str) -> dict[str, Any]:
    """Return the arguments of a decoder without an encoder; `ch` is the common divisor of its widths."""
    levels = range(count(state, rf"{prefix}\.up\.(\d+)\."))
    widths = [state[f"{prefix}.up.{i}.block.0.conv1.weight"].shape[0] for i in levels]
    ch = math.gcd(*widths)
    return {
        "ch": ch, "ch_mult": [width // ch for width in widths],
        "out_ch": state[f"{prefix}.conv_out.weight"].shape[0],
        "num_res_blocks": count(state, rf"{prefix}\.up\.0\.block\.(\d+)\."),
        "z_channels": state[f"{prefix}.conv_in.weight"].shape[1],
    }


def shared_sizes(state: State) -> dict[str, Any]:
    """Return `ddconfig` of networks without attention, with the levels and blocks that MaskGIT's have.

    The size of training images shows in no tensor; published ones have 256 pixels.
    """
    ch, in_channels = state["encoder.conv_in.weight"].shape[:2]
    levels = range(count(state, r"encoder\.down\.(\d+)\."))
    return {
        "ch": ch, "in_channels": in_channels, "out_ch": state["decoder.conv_out.weight"].shape[0],
        "ch_mult": [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in levels],
        "num_res_blocks": count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "z_channels": state["encoder.conv_out.weight"].shape[0], "resolution": 256,
        "attn_resolutions": [], "double_z": False,
    }


def model_config(state: State, quantizer: Config | None = None, n_embed: int | None = None) -> Config:
    """Return the section `model` of a state dict with the names of the networks here.

    Args:
        state: its names and shapes.
        quantizer: section of the quantizer; None for a codebook in the file.
        n_embed: its codes.
    """
    ddconfig = {**shared_sizes(state), "pixel_range": [0.0, 1.0]}
    encoder = {"resamp_with_conv": "encoder.down.0.down_conv.weight" in state}
    decoder = {"num_res_blocks": count(state, r"decoder\.up\.0\.block\.(\d+)\.")}
    params = {
        "ddconfig": ddconfig, "lossconfig": NO_LOSS, "quant_conv_kernel": 0,
        "embed_dim": ddconfig["z_channels"],
        "n_embed": n_embed or state["quantize.embedding.weight"].shape[0],
        "encoder_config": {"target": f"{NETWORKS}.Encoder", "params": encoder},
        "decoder_config": {"target": f"{NETWORKS}.Decoder", "params": decoder},
    }
    if quantizer:
        params["quantizer_config"] = quantizer
    return {"target": "taming.models.vqgan.VQModel", "params": params}


def _matches(state: State) -> bool:
    wanted = (
        "encoder.mid.0.conv1.weight", "encoder.conv_in.weight", "decoder.conv_in.weight",
        "decoder.up.1.upsample_conv.weight", "quantize.embedding.weight",
    )
    return all(name in state for name in wanted) and "encoder.conv_in.bias" not in state


def _translate(state: State) -> dict[str, Tensor]:
    return dict(state)


MASKGIT = Family(
    name="MaskGIT VQGAN",
    source="https://github.com/bytedance/1d-tokenizer",
    licence="Apache-2.0",
    matches=_matches,
    config=model_config,
    translate=_translate,
)
