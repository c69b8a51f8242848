"""The stages of a transformer that a configuration names by their checkpoints only: found, and filled in.

    first_stage_config: logs/2026-01-01T12-00-00_custom_vqgan       a run directory, checkpoint or export
    first_stage_config: {params: {ckpt_path: logs/*_custom_vqgan}}  the newest match that has a checkpoint
    first_stage_config: vq_ds16_c2i.pt                              a published tokenizer: docs/checkpoints.md
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from taming.checkpoint import config_of, find_checkpoint, read_checkpoint
from taming.config import config_names, find_config, load_config, missing_keys, storable
from taming.training.console import command_line, rank_zero_print
from taming.training.run_dir import find_run

STAGES = ("first_stage_config", "cond_stage_config")
OF_TRAINING = ("ckpt_path", "ignore_keys", "monitor", "scheduler_config")  # parameters of no use in a stage
NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}


def fill_stages(config: DictConfig) -> None:
    """Complete the stages in the section `model` from their checkpoints, in place.

    Raises:
        ValueError, FileNotFoundError: a stage names no checkpoint, or none is found; says how to train one.
    """
    params = config.model.params
    for key in STAGES:
        stage = params.get(key)
        if OmegaConf.is_list(stage):  # several conditions
            params[key] = [complete_stage(f"{key}.{i}", one, config) for i, one in enumerate(stage)]
        elif stage is not None:
            params[key] = complete_stage(key, stage, config)


def complete_stage(key: str, stage: Any, config: DictConfig) -> DictConfig | dict[str, Any] | str:
    """Return a stage with what its checkpoint adds; a stage without a checkpoint stays as it is."""
    if isinstance(stage, str):
        if stage.startswith("__"):  # __is_unconditional__, __is_first_stage__
            return stage
        stage = OmegaConf.create({"params": {"ckpt_path": stage}})
    place = f"model.params.{key}"
    if OmegaConf.is_dict(stage) and set(stage) == {"ckpt_path"}:
        stage = OmegaConf.create({"params": stage})
    if not OmegaConf.is_dict(stage):
        raise ValueError(f"{place}: {stage!r} is not a stage: write target and params, or a run directory")
    params = stage.get("params") or {}
    if not params and "target" not in stage:
        raise ValueError(f"{place} is empty: add {place}.params.ckpt_path=logs/RUN, or its target and params")
    if OmegaConf.is_missing(params, "ckpt_path"):
        raise ValueError(
            f"{place} names no checkpoint: add {place}.params.ckpt_path=logs/RUN, the run directory of that "
            "stage"
        )
    path = params.get("ckpt_path")
    if path is None:
        return stage
    try:
        file = find_checkpoint(find_run(str(path)))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{place}.params.ckpt_path: {error}. Train that stage first{training_of(str(path), config)}, or "
            "name its run directory"
        ) from None
    return fill_stage(key, OmegaConf.to_container(stage, resolve=True), file)


def fill_stage(key: str, stage: Any, file: Path) -> dict[str, Any]:
    """Return a stage with the file of its checkpoint and, where they are not given, its target and params."""
    rank_zero_print(f"{key}: {file}")
    given = {**(stage.get("params") or {}), "ckpt_path": str(file)}
    if "target" in stage and "ddconfig" in given:
        return {**stage, "params": given}
    trained = storable(config_of(read_checkpoint(file, tensors=()), file))["model"]
    kept = {name: value for name, value in (trained.get("params") or {}).items() if name not in OF_TRAINING}
    if "lossconfig" in kept:
        kept["lossconfig"] = NO_LOSS
    if "ddconfig" in given:
        given["ddconfig"] = {**kept.get("ddconfig", {}), **given["ddconfig"]}
    return {"target": stage.get("target", trained["target"]), "params": {**kept, **given}}


def training_of(path: str, config: DictConfig) -> str:
    """The command that trains what a pattern such as logs/*_custom_vqgan names, in brackets, or nothing.

    It takes the data and the size from `config`, the configuration at hand.
    """
    named = Path(path).name.strip("*_")
    found = [find_config(name) for name in config_names() if name.rpartition("/")[2] == named]
    if not found:
        return ""
    own = load_config(found[0])
    keys = [*missing_keys(own), *(["size"] if own.get("size") != config.get("size") else [])]
    values = {key: OmegaConf.select(config, key, throw_on_missing=False) for key in sorted(keys)}
    words = [f"{key}={value}" for key, value in values.items() if value is not None]
    return f" ({command_line('--base', found[0], '-t', *words)})"
