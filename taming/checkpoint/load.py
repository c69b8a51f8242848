"""Find a checkpoint, read it without running anything in it, load it into a model completely or not at all.

A checkpoint comes from a stranger, and a pickle is code, so nothing is unpickled freely: files go through
torch's `weights_only` reader or safetensors. Loading is strict, and reports by name what it leaves out.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taming.checkpoint.legacy_pickle import read_pickled
from taming.checkpoint.meta_init import hollow_parameters, is_whole
from taming.checkpoint.state_dict import LoadReport, fill, load_weights, some_of
from taming.config import instantiate_from_config, load_config
from taming.util import atomic_write

__all__ = [
    "CONFIG_NAME", "LOSS_WEIGHTS", "PERCEPTUAL_WEIGHTS", "WEIGHTS_NAME", "Config", "LoadReport",
    "NoConfigError", "build_model", "config_of", "find_checkpoint", "load_model", "load_weights",
    "read_checkpoint", "save_exported", "without_ckpt_paths", "write_checkpoint",
]

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.yaml"

# Patterns as load_weights takes them. Files of 2021 hold the frozen LPIPS network, some inside a first stage;
# a discriminator may be in the file or in the config alone, and inference needs neither.
PERCEPTUAL_WEIGHTS = (r"(.*\.)?loss\.perceptual_loss\..*",)
LOSS_WEIGHTS = (r"(.*\.)?loss\..*",)

Config = Mapping[str, Any] | DictConfig


class NoConfigError(ValueError):
    """Nothing says what the model of a checkpoint is; the message lists where was looked."""


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint file that a path stands for: a file, a run directory, or an exported folder.

    Of a run directory it is `checkpoints/last.ckpt`, else the newest `checkpoints/*.ckpt`; of an exported
    folder `model.safetensors`. Raises FileNotFoundError with a list of what was looked for.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file or folder")
    by_age = sorted(path.glob("checkpoints/*.ckpt"), key=lambda file: (file.stat().st_mtime, file.name))
    for candidate in (path / "checkpoints" / "last.ckpt", *reversed(by_age), path / WEIGHTS_NAME):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no checkpoint in {path}: looked for checkpoints/last.ckpt and checkpoints/*.ckpt (a run directory) "
        f"and for {WEIGHTS_NAME} (an exported folder); give such a folder, or a checkpoint file itself"
    )


def read_checkpoint(
    path: str | Path, map_location: str | torch.device = "cpu", *, mmap: bool = True
) -> dict[str, Any]:
    """Read a checkpoint file into a dict with at least the key `state_dict`; nothing in it is executed.

    Takes Lightning checkpoints of today and of 2020-21, bare state dicts, and safetensors. With `mmap`
    tensors stay on disk until they are used, so that unwanted optimizer states cost nothing; replace such a
    file by renaming another one over it, never by writing into it.

    Raises:
        ValueError: the file is empty, damaged, not a checkpoint, or asks for code; the message says which.
    """
    path = Path(path).expanduser()
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): it was not written or copied completely; get it again")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, map_location)
    content = read_pickled(path, map_location, mmap)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        _check_entries(content["state_dict"], path)
        return content
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return {"state_dict": content}
    found = f"keys: {some_of(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
    raise ValueError(f"{path} is not a checkpoint: there is no state_dict in it (it holds {found})")


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", config: str | Path | Config | None = None
) -> tuple[nn.Module, DictConfig, int]:
    """Build the model of a checkpoint: `model, config, step = load_model("logs/RUN")`, in eval mode.

    `path` is a checkpoint file, a run directory or an exported folder. The config is `config` (a YAML file or
    a mapping) if given, else that of the checkpoint (see config_of). `step` counts batches. Other files that
    the config names under `ckpt_path` are not needed. On the CPU the weights stay mapped from the file.

    Raises:
        FileNotFoundError, ValueError: see find_checkpoint, read_checkpoint, config_of and load_weights.
    """
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file)
    found = config_of(checkpoint, file, config)
    model = build_model(found, checkpoint["state_dict"], str(file))
    counts = checkpoint.get("batches_seen"), checkpoint.get("global_step")
    step = next((count for count in counts if isinstance(count, int) and count > 0), 0)
    if hasattr(model, "batches_seen"):
        model.batches_seen = step
    return model.to(device).eval(), found, step


def config_of(
    checkpoint: Mapping[str, Any], path: str | Path, config: str | Path | Config | None = None
) -> DictConfig:
    """Return the config, with a section `model`, of a checkpoint that was read from the file `path`.

    In this order: `config`; the checkpoint's key `config`; in a run directory its `configs/*.yaml`, merged in
    the order of their names; beside the file `config.yaml`, or the file's own name with `.yaml`. Raises
    NoConfigError if there is none of these, and ValueError if it has no section `model`.
    """
    path = Path(path)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    beside = [path.with_name(CONFIG_NAME), path.with_suffix(".yaml")]
    if isinstance(config, str | Path):
        found, origin = load_config(config), str(config)
    elif config is not None:
        found, origin = OmegaConf.create(config), "the given config"
    elif isinstance(checkpoint.get("config"), dict):
        found, origin = OmegaConf.create(checkpoint["config"]), f"the config inside {path}"
    elif files := sorted(run.glob("configs/*.yaml")) or [file for file in beside if file.is_file()][:1]:
        found, origin = load_config(files), ", ".join(map(str, files))
    else:
        looked = ", ".join(map(str, (run / "configs" / "*.yaml", *beside)))
        raise NoConfigError(
            f"no config for {path}: there is none inside it, and none of these exists: {looked}; "
            "name the YAML file that it was trained with: load_model(path, config=...)"
        )
    if not OmegaConf.is_dict(found) or not OmegaConf.is_dict(found.get("model")):
        raise ValueError(f"{origin} has no section `model`; name another: load_model(path, config=...)")
    return found


def build_model(config: Config, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Build the model of a config's section `model` and fill it from `state`, whole or not at all.

    If possible, no random numbers and no second copy of the weights are made in between: the tensors of
    `state` become the model's. `source` is for messages.

    Raises:
        ValueError: the config names no model of torch, or `state` does not fit it; see load_weights.
    """
    section = without_ckpt_paths(config).model
    options = {"source": source, "ignore": PERCEPTUAL_WEIGHTS, "optional": LOSS_WEIGHTS, "assign": True}
    try:
        with hollow_parameters():
            model = instantiate_from_config(section)
    except Exception as error:  # a constructor that computes with weights; a wrong config fails again below
        logger.debug("building %s without weights failed: %s", section.get("target"), error)
        model = None
    report = fill(model, state, **options) if isinstance(model, nn.Module) else None
    if report is None or not is_whole(model):
        model = instantiate_from_config(section)
        if not isinstance(model, nn.Module):
            raise ValueError(f"target {section.get('target')} in the config of {source} is no torch module")
        report = fill(model, state, **options)
    logger.info("%s", report)
    return model


def save_exported(model: nn.Module, config: Config, folder: str | Path, step: int = 0) -> Path:
    """Write a model's weights and config to `folder`, as load_model reads them, and return the folder.

    `model.safetensors` carries the number of batches seen; `config.yaml` loses every `ckpt_path`, since all
    weights are here. Each file appears whole or not at all.
    """
    folder = Path(folder)
    plain = without_ckpt_paths(config)
    if not OmegaConf.is_dict(plain.get("model")):
        raise ValueError("the config to export with has no section `model` (target and params)")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        tensors[key] = value.clone() if storage in storages else value  # safetensors refuses shared memory
        storages.add(storage)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CONFIG_NAME) as config_file, atomic_write(folder / WEIGHTS_NAME) as weights:
        OmegaConf.save(plain, config_file, resolve=True)
        save_file(tensors, weights, metadata={"format": "pt", "step": str(int(step))})
    return folder


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint that appears whole or not at all; models mapped from its predecessor stay intact."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as file:  # given a path, torch hides what failed
        torch.save(content, file)


def _check_entries(state: Mapping[Any, Any], path: Path) -> None:
    """Raise unless keys are names and tensors are ordinary ones, which a module can take over."""
    for key, value in state.items():
        unusual = isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided)
        if not isinstance(key, str) or unusual:
            kind = "a tensor without data, or a sparse one" if unusual else "no name of a weight"
            raise ValueError(f"{path} is not a checkpoint of weights: {key!r} in its state_dict is {kind}")


def _read_safetensors(path: Path, map_location: str | torch.device) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        content: dict[str, Any] = {"state_dict": load_file(path, device=str(map_location))}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); get it again") from error
    if metadata.get("step", "").isdecimal():
        content["batches_seen"] = int(metadata["step"])
    return content


def without_ckpt_paths(config: Config) -> DictConfig:
    """Copy a config, or a section of one, without the keys `ckpt_path` at any depth; interpolations stay."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "ckpt_path"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return OmegaConf.create(strip(OmegaConf.to_container(OmegaConf.create(config))))
