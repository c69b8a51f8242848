"""Put the file of a prior and that of a tokenizer together: a model that generates images, given a class."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from taming.checkpoint import config_of, find_checkpoint, read_checkpoint
from taming.checkpoint.save import Config
from taming.config import get_obj_from_str, instantiate_from_config, storable
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import Tokenizer
from taming.modules.priors.base import Prior


def combine(
    prior: str | Path, tokenizer: str | Path, *, size: int | tuple[int, int] | None = None,
    config: str | Path | Config | None = None,
) -> tuple[Net2NetTransformer, DictConfig]:
    """Build a model over the codes of a tokenizer with a prior that is published alone, in eval mode.

    Tokens of its condition are classes; the last one is the null token, which guidance needs.

    Args:
        prior, tokenizer: checkpoint files, run directories or exported folders.
        size: of the images in pixels, a side or (H, W). By default that of the prior's grid of codes, which
            for LlamaGen is a guess; see `taming.checkpoint.families.llamagen_gpt`.
        config: of the prior, as `taming.checkpoint.load_model` takes it.

    Returns:
        The model, and its config, as `taming.checkpoint.save_exported` takes them.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a file that holds no prior, or no tokenizer; a prior without a vocabulary of classes; two
            that do not fit each other.
    """
    second, first = _section(prior, Prior, config), _section(tokenizer, Tokenizer)
    params = second["params"]
    if (classes := params.get("condition_vocab_size")) is None:
        raise ValueError(f"{prior} has no classes of its own: name its condition in a configuration")
    *_, grid = params.pop("layout", [None])
    ddconfig = first["params"].get("ddconfig") or {}
    if grid is not None and size is None:
        without = {key: value for key, value in first["params"].items() if key != "ckpt_path"}
        with torch.device("meta"):
            factor = instantiate_from_config({**first, "params": without}).factor
        size = grid[0] * factor, grid[1] * factor
    if size is not None and "resolution" in ddconfig:
        _resize(ddconfig, (size, size) if isinstance(size, int) else size)
    combined = OmegaConf.create({"model": {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "first_stage_key": "image", "cond_stage_key": "class_label",
            "cond_dropout": 0.1, "null_token": classes - 1,
            "first_stage_config": first, "transformer_config": second,
            "cond_stage_config": {
                "target": "taming.modules.util.Labelator", "params": {"n_classes": classes - 1},
            },
        },
    }})
    return instantiate_from_config(combined.model).eval(), combined


def _resize(ddconfig: dict[str, Any], sides: tuple[int, int]) -> None:
    """Set the training size of a network, (H, W) in pixels; its attention stays in the levels where it is."""
    old = ddconfig["resolution"]
    before, now = old if isinstance(old, int) else min(old), min(sides)
    ddconfig["resolution"] = now if sides[0] == sides[1] else list(sides)
    levels = range(len(ddconfig.get("ch_mult", ())))  # sides are halved between them
    kept = [i for i in levels if before // 2**i in ddconfig.get("attn_resolutions", ())]
    if kept:
        ddconfig["attn_resolutions"] = [now // 2**i for i in kept]


def _section(
    path: str | Path, contract: type, config: str | Path | Config | None = None
) -> dict[str, Any]:
    """Return `{target, params}` of the model in a file, with its `ckpt_path`."""
    file = find_checkpoint(path)
    section = storable(config_of(read_checkpoint(file, tensors=()), file, config))["model"]
    target = get_obj_from_str(section["target"])
    if not issubclass(target, contract):
        raise ValueError(f"{file} is a {target.__name__}, not a {contract.__name__.lower()}")
    return {"target": section["target"], "params": {**section["params"], "ckpt_path": str(file)}}
