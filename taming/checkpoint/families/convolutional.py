"""Sizes of the VQGAN's encoder and decoder, from names and shapes; many projects have kept its names."""

import math
import re
from typing import Any

from torch import Tensor

from taming.checkpoint.families.base import AVERAGES, NO_LOSS, Config, State

# Names of `taming.modules.diffusionmodules.model.Encoder` and `Decoder`; normalizations may have parts.
_ATTENTION = r"(norm|q|k|v|proj_out)"
_RESIDUAL = r"(norm1|conv1|norm2|conv2|nin_shortcut)"
_NETWORKS = re.compile(
    r"(encoder|decoder)\.(conv_in|norm_out|conv_out"
    rf"|mid\.block_[12]\.{_RESIDUAL}|mid\.attn_1\.{_ATTENTION}"
    rf"|(down|up)\.\d+\.(block\.\d+\.{_RESIDUAL}|attn\.\d+\.{_ATTENTION}|(down|up)sample\.conv)"
    r")(\.norm_layer|\.conv_y|\.conv_b)?\.(weight|bias)"
)
DECODER = "taming.modules.diffusionmodules.model.Decoder"
GROUPS = 32  # of the normalizations of all published networks; names and shapes do not tell


def has_networks(state: State, *, spatial: bool = False) -> bool:
    """Tell whether a state dict has encoder, decoder and what is between them under the VQGAN's names.

    With `spatial` those of MOVQ, whose decoder has spatially conditioned normalizations.
    """
    between = {f"{name}.{kind}" for name in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias")}
    ends = (
        "encoder.conv_in.bias", "encoder.conv_out.weight", "decoder.conv_in.weight", "decoder.conv_out.bias",
    )
    others = (key for key in state if key not in between and key != "colorize")
    names = [key for key in others if not key.startswith(("quantize.", "loss.", AVERAGES))]
    return (
        between <= state.keys() and all(key in state for key in ends)
        and state["quant_conv.weight"].shape[2:] == (1, 1)
        and ("decoder.norm_out.norm_layer.weight" in state) == spatial
        and all(map(_NETWORKS.fullmatch, names))
    )


def count(state: State, pattern: str) -> int:
    """Return how many numbers, from 0, a name has in the place of the group of `pattern`, from its start."""
    found = {int(match[1]) for key in state if (match := re.match(pattern, key))}
    if found != set(range(len(found))):
        raise ValueError(f"the numbers in names {pattern} are {sorted(found)}, which skip one")
    return len(found)


def highest_first(state: State, level: str) -> dict[str, Tensor]:
    """Rename levels of a decoder, `level`0 at the lowest resolution, to ours, decoder.up.0 at the highest."""
    levels = count(state, re.escape(level) + r"(\d+)\.")
    found = {}
    for key, value in state.items():
        if match := re.match(re.escape(level) + r"(\d+)", key):
            key = f"decoder.up.{levels - 1 - int(match[1])}{key[match.end():]}"
        found[key] = value
    return found


def network_sizes(state: State, resolution: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `ddconfig` of a VQGAN's networks, and what of it differs for the decoder.

    Args:
        state: with our names.
        resolution: training size in pixels, which shapes do not tell.

    Raises:
        ValueError: widths that no such network has.
    """
    encoder, decoder = _Half(state, "encoder", "down"), _Half(state, "decoder", "up")
    ch_in, in_channels = state["encoder.conv_in.weight"].shape[:2]
    z_channels = state["decoder.conv_in.weight"].shape[1]
    out_ch, latents = (state[f"{half}.conv_out.weight"].shape[0] for half in ("decoder", "encoder"))
    if latents not in (z_channels, 2 * z_channels):
        raise ValueError(f"the encoder gives {latents} channels, but the decoder takes {z_channels}")
    shared = {
        "double_z": latents == 2 * z_channels, "z_channels": z_channels, "resolution": resolution,
        "in_channels": in_channels, "out_ch": out_ch, "dropout": 0.0,
    }
    if any(width % GROUPS for width in (ch_in, *encoder.widths, *decoder.widths)):
        raise ValueError(
            f"its levels have {[ch_in, *encoder.widths]} channels, which are not multiples of {GROUPS}, the "
            "groups of published normalizations: give the config that it was trained with"
        )
    first = encoder.sizes(ch_in, resolution) | {"num_res_blocks": encoder.blocks}
    if first["ch"] != ch_in:
        first["ch_in"] = ch_in
    second = decoder.sizes(first["ch"], resolution) | {"num_res_blocks": decoder.blocks - 1}
    return shared | first, {key: value for key, value in second.items() if value != first[key]}


class _Half:
    """Levels of one of the networks, from the highest resolution to the lowest."""

    def __init__(self, state: State, half: str, way: str):
        self.name = half
        levels = count(state, rf"{half}\.{way}\.(\d+)\.block\.")
        prefixes = [f"{half}.{way}.{i}." for i in range(levels)]
        blocks = {count(state, re.escape(prefix) + r"block\.(\d+)\.") for prefix in prefixes}
        if len(blocks) != 1:
            raise ValueError(f"levels of the {half} have different numbers of blocks: {sorted(blocks)}")
        (self.blocks,) = blocks
        self.widths = [state[f"{prefix}block.0.conv1.weight"].shape[0] for prefix in prefixes]
        self.attends = [f"{prefix}attn.0.q.weight" in state for prefix in prefixes]
        self.has_middle = f"{half}.mid.attn_1.q.weight" in state
        resized = prefixes[:-1] if way == "down" else prefixes[1:]
        self.resamples = all(f"{prefix}{way}sample.conv.weight" in state for prefix in resized)

    def sizes(self, ch: int, resolution: int) -> dict[str, Any]:
        """Return the arguments of the network, with multiples of `ch` channels if its widths are such.

        Raises:
            ValueError: attention in places where our networks have none.
        """
        if any(width % ch for width in self.widths):
            ch = math.gcd(*self.widths)
        if not self.has_middle and any(self.attends):
            raise ValueError(f"the {self.name} has attention, but none at its lowest resolution")
        return {
            "ch": ch, "ch_mult": [width // ch for width in self.widths],
            "attn_resolutions": [resolution >> i for i, attends in enumerate(self.attends) if attends],
            "attn_type": "vanilla" if self.has_middle else "none", "resamp_with_conv": self.resamples,
        }


def vq_model(
    state: State, resolution: int, *, target: str = "taming.models.vqgan.VQModel",
    pixel_range: tuple[float, float] | None = None, **params: Any,
) -> Config:
    """Return the section `model` of a VQGAN of whose state dict the names are ours.

    Args:
        state: with our names.
        resolution: training size in pixels.
        target: its class.
        pixel_range: see `Tokenizer`; None is [-1, 1].
        params: further arguments.
    """
    ddconfig, of_decoder = network_sizes(state, resolution)
    if pixel_range is not None:
        ddconfig["pixel_range"] = list(pixel_range)
    found = {"ddconfig": ddconfig, "lossconfig": NO_LOSS}
    if "n_embed" not in params:
        params["n_embed"], params["embed_dim"] = state["quantize.embedding.weight"].shape
    if of_decoder:
        params["decoder_config"] = {"target": DECODER, "params": of_decoder}
    return {"target": target, "params": found | params}
