"""Checkpoints from one form into another, and a part of a model out of the whole.

The two forms are a file of torch.save, named .ckpt, and a folder with model.safetensors and config.yaml. Both
are written whole or not at all, and only after the weights were seen to fit their config.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from taming.checkpoint.families import identify
from taming.checkpoint.load import (
    NoConfigError,
    build_model,
    checkpoint_weights,
    config_of,
    load_model,
)
from taming.checkpoint.read import find_checkpoint, read_checkpoint
from taming.checkpoint.save import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Config,
    save_exported,
    without_ckpt_paths,
    write_checkpoint,
)
from taming.config import storable

FILES = (".ckpt", ".pt", ".pth")  # endings of files that torch.save writes


def convert(
    source: str | Path, target: str | Path, config: str | Path | Config | None = None, *, ema: bool = True
) -> list[Path]:
    """Write the model of a checkpoint, run directory or folder to `target` in its other form; give the files.

    `target` is a folder, or a file whose name ends in .ckpt. `config` is the YAML file of a checkpoint that
    has none inside or beside it. The number of batches seen is kept; states of optimizers are not, nor are
    the weights of a perceptual network inside a first stage. Of a run that averages its weights, the averages
    are written, or with `ema` False the trained ones.

    Raises:
        FileNotFoundError, ValueError: see load_model; or `target` is neither, or would overwrite the source.
    """
    file, target = find_checkpoint(source), Path(target)
    files = _files(target, file)
    model, found, step = load_model(file, config=config, ema=ema)
    if len(files) > 1:
        save_exported(model, found, target, step)
    else:
        write_checkpoint(_content(model.state_dict(), found) | {"batches_seen": step}, target)
    return files


def extract(
    source: str | Path, target: str | Path, name: str, config: str | Path | Config | None = None, *,
    ema: bool = True,
) -> list[Path]:
    """Write one part of a model, `first_stage_model` for instance, to a file or folder; give the files.

    The part's config is cut out of the whole one: `params.first_stage_config`. Where there is none, that of a
    published tokenizer follows from its names and shapes. To a file the part may go without a config, if
    there is none; then it is not looked at any closer. A class that is not here can be cut out of its file as
    well, since only the part is built, and only for a folder. `ema`: see `convert`.

    Raises:
        FileNotFoundError: there is no `source`.
        ValueError: `source` has no such part, or the part has no config that a folder could hold.
    """
    file, target = find_checkpoint(source), Path(target)
    files = _files(target, file)
    checkpoint = read_checkpoint(file, tensors=("state_dict", "ema"))
    state = checkpoint_weights(checkpoint, ema)
    prefix = name.rstrip(".") + "."
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not part:
        there = ", ".join(dict.fromkeys(key.split(".")[0] for key in state))
        raise ValueError(f"{file} has no part {name!r}; there are: {there}")
    section = _config_of_part(checkpoint, file, name, config)
    if len(files) == 1:
        write_checkpoint(_content(part, section), target)
    elif section is None and (published := identify(part)) is not None:
        section = OmegaConf.create({"model": published.model})
        save_exported(build_model(section, part, f"{name} of {file}"), section, target)
    elif section is None:
        raise ValueError(
            f"no config for {name} of {file}: name the YAML file of the whole model (--config), or write to "
            "a file that ends in .ckpt, which can do without"
        )
    else:
        save_exported(build_model(section, part, f"{name} of {file}"), section, target)
    return files


def _files(target: Path, source: Path) -> list[Path]:
    """List what will be written."""
    files = [target] if target.suffix in FILES else [target / WEIGHTS_NAME, target / CONFIG_NAME]
    if len(files) > 1 and (target.is_file() or target.suffix in (".safetensors", ".yaml")):
        raise ValueError(f"cannot write to {target}: name a folder, or a file that ends in .ckpt")
    if len(files) == 1 and target.is_dir():
        raise ValueError(f"cannot write to {target}: it is a folder; name another file")
    if files[0].exists() and files[0].samefile(source):
        raise ValueError(f"{files[0]} is what is read; name another place to write to")
    return files


def _content(state: Mapping[str, Tensor], config: DictConfig | None) -> dict[str, Any]:
    """Put together what a file holds: tensors, each with no more data than its own, and plain values."""
    own = {key: value.detach().clone() for key, value in state.items()}
    return {"state_dict": own} | ({} if config is None else {"config": storable(without_ckpt_paths(config))})


def _config_of_part(
    checkpoint: Mapping[str, Any], file: Path, name: str, config: str | Path | Config | None
) -> DictConfig | None:
    """Cut the config of a part, under `model`, out of that of the whole; None if there is none."""
    try:
        whole = storable(config_of(checkpoint, file, config))["model"]
    except NoConfigError:
        return None
    params = whole.get("params") or {}
    section = params.get(f"{name.removesuffix('_model')}_config")
    if section == "__is_first_stage__":
        section = params.get("first_stage_config")
    return OmegaConf.create({"model": section}) if isinstance(section, dict) else None
