"""Write checkpoints and exports: whole or not at all, with checksums, without the paths of this machine."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from taming import __version__
from taming.checkpoint.files import CHECKSUMS, DECLARED, checksums
from taming.config import storable
from taming.util import atomic_write

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.yaml"
JSON_NAME = "config.json"  # by which the model hub counts downloads
CARD_NAME = "README.md"
RUN = "run:"  # begins a path that is relative to the run directory
LARGE = ("state_dict", "optimizer_states", "ema")  # entries of checkpoints without paths

Config = Mapping[str, Any] | DictConfig


def write_checkpoint(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint; `path` holds its predecessor or all of this one at any time.

    Paths below the run directory become relative to it (`run:checkpoints/last.ckpt`); of others the last part
    is kept. torch's file format has a checksum of every tensor.

    Raises:
        OSError: it cannot be written; a full disk is ENOSPC.
    """
    path = Path(path)
    run = run_of(path)
    portable = {key: value if key in LARGE else relative_paths(value, run) for key, value in content.items()}
    with _whole_file(path) as partial, partial.open("wb") as file:
        torch.save(portable, file)  # into a file of ours: torch's own error would not say what is wrong


def save_exported(model: nn.Module, config: Config, folder: str | Path, step: int = 0) -> Path:
    """Write a model's weights and config to `folder`, as load_model reads them, and return the folder.

    `model.safetensors` carries the number of batches seen and checksums; `config.yaml` loses every
    `ckpt_path`, since all weights are here, and the folders of this machine. `config.json` has the same for
    the model hub, and `README.md` is a model card, which is not written over.

    Raises:
        ValueError: the config has no section `model`.
        OSError: the files cannot be written; a full disk is ENOSPC.
    """
    folder = Path(folder)
    plain = relative_paths(storable(without_ckpt_paths(config)), folder.resolve())
    if not isinstance(plain.get("model"), dict):
        raise ValueError("the config to export with has no section `model` (target and params)")
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        tensors[key] = value.clone() if storage in storages else value  # safetensors allows no shared memory
        storages.add(storage)
    sums = {CHECKSUMS: checksums(tensors), DECLARED: CHECKSUMS}
    metadata = {"format": "pt", "step": str(int(step)), **sums}
    described = {"library_name": "taming", "taming_version": __version__, **plain}
    texts = {
        CONFIG_NAME: OmegaConf.to_yaml(OmegaConf.create(plain)),
        JSON_NAME: json.dumps(described, indent=2) + "\n",
    }
    if not (folder / CARD_NAME).exists():
        texts[CARD_NAME] = model_card(model, plain)
    with ExitStack() as files:  # all are written before the first takes its name
        save_file(tensors, files.enter_context(_whole_file(folder / WEIGHTS_NAME)), metadata=metadata)
        for name, text in texts.items():
            files.enter_context(_whole_file(folder / name)).write_text(text, encoding="utf-8")
    return folder


def model_card(model: nn.Module, config: Mapping[str, Any]) -> str:
    """Describe an exported model, in the form that model hubs read: a head of YAML, then Markdown."""
    name = config["model"]["target"].rsplit(".", 1)[-1]
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
library_name: taming
tags:
- taming
- vector-quantization
- image-generation
pipeline_tag: unconditional-image-generation
---

# {name}

A `{config["model"]["target"]}` of [taming](https://arxiv.org/abs/2012.09841), {count:,} parameters.

```python
from taming.checkpoint import load_model

model, config, step = load_model("this folder, or owner/name on the model hub")
```

`{CONFIG_NAME}` says how the model is built, `{WEIGHTS_NAME}` holds its weights and their checksums.
"""


def without_ckpt_paths(config: Config) -> DictConfig:
    """Copy a config, or a section of one, without the keys `ckpt_path` at any depth; interpolations stay."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strip(item) for key, item in value.items() if key != "ckpt_path"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    plain = OmegaConf.to_container(config) if OmegaConf.is_config(config) else config
    return OmegaConf.create(strip(plain))


# ---- paths


def run_of(path: Path) -> Path:
    """Return the run directory of a checkpoint file: the folder of its folder `checkpoints`, or its own."""
    path = Path(os.path.abspath(path))
    return (path.parent.parent if path.parent.name == "checkpoints" else path.parent).resolve()


def relative_paths(value: Any, run: Path) -> Any:
    """Copy dicts and lists with this machine's absolute paths made relative to `run`, a resolved folder.

    Those outside of it keep their last part only. A text is such a path if its first folder exists.
    """

    def relative(text: str) -> str:
        parts = PurePath(text).parts
        is_path = os.path.isabs(text) and len(parts) > 1 and "\0" not in text
        if not is_path or not os.path.exists(os.path.join(*parts[:2])):
            return text
        path = Path(os.path.realpath(text))
        return f"{RUN}{path.relative_to(run).as_posix()}" if path.is_relative_to(run) else path.name

    return _map_texts(value, relative)


def absolute_paths(value: Any, run: Path) -> Any:
    """Copy dicts and lists with the paths that `relative_paths` made put back below `run`."""

    def absolute(text: str) -> str:
        return str(Path(os.path.normpath(run / text.removeprefix(RUN)))) if text.startswith(RUN) else text

    return _map_texts(value, absolute)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        changed = ((change(key) if isinstance(key, str) else key, item) for key, item in value.items())
        return {key: _map_texts(item, change) for key, item in changed}
    if type(value) in (list, tuple):
        return type(value)(_map_texts(item, change) for item in value)
    return change(value) if isinstance(value, str) else value


# ---- files


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Yield a place to write to, as `atomic_write` does; what the system has against it names `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as partial:
            yield partial
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
