"""Models that save themselves, config and all, and are built again from a folder or from the model hub."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Self

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from taming.checkpoint.load import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    config_of,
    find_checkpoint,
    load_model,
    read_checkpoint,
    save_exported,
)
from taming.config import get_obj_from_str

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
_INSTALL = 'pip install "taming[hub]"'
_RECORD = "_constructor_arguments"  # where an instance keeps them


class Pretrained:
    """Adds `save_pretrained`, `from_pretrained` and `push_to_hub` to a torch module.

    A model remembers what its constructor was given, by name, with OmegaConf nodes made plain: that is its
    config. A class that takes `*args` hands them to its parent, as it does with `**kwargs`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        model = super().__new__(cls)
        vars(model)[_RECORD] = {name: _copy(value) for name, value in _named(cls, args, kwargs).items()}
        return model

    def pretrained_config(self) -> dict[str, Any]:
        """The config that builds this model again: `{"model": {"target": ..., "params": ...}}`, plain.

        Raises:
            ValueError: the class cannot be imported by its name, or an argument was no plain value.
        """
        cls = type(self)
        if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
            raise ValueError(f"{cls.__qualname__} cannot be imported by name: define it in a module")
        params = vars(self)[_RECORD]
        for name, value in params.items():
            _check_plain(f"{cls.__name__}({name}=...)", value)
        return {"model": {"target": _path(cls), "params": params}}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights and config to a folder that `from_pretrained` and `load_model` read; returns it.

        Raises:
            ValueError: see `pretrained_config`.
        """
        return save_exported(self, self.pretrained_config(), folder, step=getattr(self, "batches_seen", 0))

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Build the model of a local folder, run or checkpoint, else of a repository `owner/name` of the hub.

        It comes in eval mode, with all of its weights or not at all; see `load_model`.

        Raises:
            ValueError: it is of another class, or its weights do not fit its config.
            FileNotFoundError: it is neither here nor on the hub, or the hub's client is not installed.
        """
        path = Path(name).expanduser()
        if not path.exists() and _HUB_NAME.fullmatch(str(name)):
            path = _fetch(str(name))
        file = find_checkpoint(path)
        config = config_of(read_checkpoint(file), file)
        found = get_obj_from_str(config.model.get("target"))
        if found is not cls:
            raise ValueError(
                f"{name} holds a {_path(found)}, not a {_path(cls)}: call {found.__name__}.from_pretrained, "
                "or load_model, which takes any"
            )
        return load_model(file, device=device, config=config)[0]

    def push_to_hub(self, repo: str, *, private: bool | None = None) -> str:
        """Save to the repository `owner/name` of the model hub, made if it is new; returns its address.

        Raises:
            ValueError: the hub's client is not installed, or see `pretrained_config`.
        """
        try:
            api = _hub().HfApi()
        except ModuleNotFoundError as error:
            raise ValueError(f"push_to_hub needs the model hub's client: {_INSTALL}") from error
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            address = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder)
        return str(address)


def _hub() -> ModuleType:
    import huggingface_hub

    return huggingface_hub


def _fetch(name: str) -> Path:
    """Download weights and config of a repository into the hub's cache, and return their folder."""
    try:
        return Path(_hub().snapshot_download(name, allow_patterns=[WEIGHTS_NAME, CONFIG_NAME]))
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name}; if it is one of the model hub, install its client: {_INSTALL}"
        ) from error
    except OSError as error:  # no such repository, no right to it, no network
        raise FileNotFoundError(f"there is no folder {name}, and the model hub gave none: {error}") from error


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _named(cls: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give positional arguments their names; those that `*args` takes are named by the parent."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        kinds = {p.name: p.kind for p in list(inspect.signature(base.__init__).parameters.values())[1:]}
        names += [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if inspect.Parameter.VAR_POSITIONAL not in kinds.values():
            break
    return dict(zip(names, args, strict=False)) | kwargs  # the constructor itself objects to too many


def _copy(value: Any) -> Any:
    """Copy containers into plain ones; what is none of them stays, and is objected to when it is saved."""
    if OmegaConf.is_config(value):
        try:
            return OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException:  # nothing to say while the constructor may do without
            return value
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _check_plain(where: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(f"{where}[{key!r}]", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_plain(f"{where}[{i}]", item)
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise ValueError(
            f"the model cannot be saved with its config: {where} was given a {type(value).__name__}, which "
            "YAML cannot hold; build it from numbers, strings, lists and dicts, or use save_exported"
        )
