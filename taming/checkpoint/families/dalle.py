"""The discrete VAE of DALL-E (Ramesh et al. 2021, arXiv 2102.12092): encoder.pkl and decoder.pkl."""

from typing import Any

from taming.checkpoint.families.base import Config, Family, State

FIRST, LAST, GROUP = "blocks.input.w", "blocks.output.conv.w", "blocks.group_1.block_1.res_path.conv_1.w"


def _is_half(state: State) -> bool:
    return {FIRST, LAST, GROUP} <= state.keys()


def _half_config(state: State) -> Config:
    half, other = ("encoder", "decoder") if state[FIRST].shape[-1] == 7 else ("decoder", "encoder")
    raise ValueError(
        f"it is the {half} of DALL-E's discrete VAE, one of two files: give both, "
        f'DVAE.from_dall_e("encoder.pkl", "decoder.pkl").save_pretrained("dall_e"), with the file of the '
        f"{other}, and load that folder"
    )


def _is_whole(state: State) -> bool:
    halves, names = ("encoder", "decoder"), (FIRST, LAST, GROUP)
    return all(f"{half}.{name}" in state for half in halves for name in names)


def sizes(state: State) -> dict[str, Any]:
    """Return the arguments of `DVAE` for the tensors of both halves, `encoder.` and `decoder.`."""
    first, last = state[f"encoder.{FIRST}"], state[f"encoder.{LAST}"]
    groups = len({key.split(".")[2] for key in state if key.startswith("encoder.blocks.group_")})
    blocks = len({key.split(".")[3] for key in state if key.startswith("encoder.blocks.group_1.block_")})
    ddconfig = {
        "resolution": 256, "in_channels": first.shape[1], "n_hid": first.shape[0],
        "n_init": state[f"decoder.{FIRST}"].shape[0], "n_blk_per_group": blocks, "n_groups": groups,
    }
    return {"ddconfig": ddconfig, "n_embed": last.shape[0]}


def _config(state: State) -> Config:
    return {"target": "taming.models.dvae.DVAE", "params": sizes(state)}


DALL_E = "github.com/openai/DALL-E"
HALF = Family("half of DALL-E's dVAE", DALL_E, "MIT (modified)", _is_half, _half_config, dict)
WHOLE = Family("DALL-E dVAE", DALL_E, "MIT (modified)", _is_whole, _config, dict)
FAMILIES = (WHOLE, HALF)
