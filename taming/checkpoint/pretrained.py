"""Models that save themselves, config and all, and are built again from a folder or from the model hub."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from taming.checkpoint.hub import push
from taming.checkpoint.load import load_model, other_class
from taming.checkpoint.save import save_exported

_RECORD = "_constructor_arguments"  # where an instance keeps them


class Pretrained(nn.Module):
    """A torch module with `save_pretrained`, `from_pretrained` and `push_to_hub`.

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
            ValueError: the class cannot be imported by its name, or an argument is not a plain value.
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
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", mmap: bool = False,
        revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None,
    ) -> Self:
        """Build the model of a local folder, run or checkpoint, else of a repository `owner/name` of the hub.

        It comes in eval mode, with all of its weights or not at all; see `load_model` for the arguments.

        Raises:
            ValueError: it is of another class, or its weights do not fit its config.
            FileNotFoundError: it is neither here nor on the hub, or the hub's client is not installed.
        """
        model, _, _ = load_model(
            name, cls, device=device, mmap=mmap, revision=revision, token=token, cache_dir=cache_dir
        )
        if type(model) is not cls:
            raise other_class(str(name), type(model), cls)
        return model

    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Save to the repository `owner/name` of the model hub, made if it is new; returns its address.

        Raises:
            ValueError: the hub cannot be reached or does not take it, its client is not installed, or see
                `pretrained_config`.
        """
        with TemporaryDirectory() as folder:
            return push(self.save_pretrained(folder), repo, private=private, token=token)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _named(cls: type, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give positional arguments their names; those that `*args` takes are named by the parent."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = {parameter.name: parameter.kind for parameter in parameters}
        names += [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if inspect.Parameter.VAR_POSITIONAL not in kinds.values():
            break
    return dict(zip(names, args, strict=False)) | kwargs  # the constructor itself objects to too many


def _copy(value: Any) -> Any:
    """Copy containers into plain ones; other values stay, and are an error when the model is saved."""
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
