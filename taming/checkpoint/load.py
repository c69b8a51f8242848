"""Find a checkpoint, read it without running anything in it, load it into a model completely or not at all.

A checkpoint comes from a stranger, and a pickle is code: it is read as data (see
`taming.checkpoint.pickles`). Its config may build models only. Loading is strict, and reports by name what it
leaves out.
"""

import inspect
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from taming.checkpoint.deferred_init import DeferredInit, memory_limit
from taming.checkpoint.families import Published, identify
from taming.checkpoint.files import FormatError, TensorFile
from taming.checkpoint.hub import fetch, is_hub_name
from taming.checkpoint.pickles import (
    Finisher,
    ForbiddenNameError,
    Placeholder,
    StoredTensor,
    module_tensors,
)
from taming.checkpoint.save import (
    CONFIG_NAME,
    LARGE,
    WEIGHTS_NAME,
    Config,
    absolute_paths,
    run_of,
    without_ckpt_paths,
)
from taming.checkpoint.state_dict import load_weights, some_of
from taming.config import (
    get_obj_from_str,
    instantiate_from_config,
    is_foreign,
    load_config,
    models_only,
    one_line,
    safe_config,
)

logger = logging.getLogger(__name__)

# Patterns as load_weights takes them. Files of 2021 hold the frozen LPIPS network, some inside a first stage;
# a discriminator may be in the file or in the config alone, and inference needs neither.
PERCEPTUAL_WEIGHTS = (r"(.*\.)?loss\.perceptual_loss\..*",)
LOSS_WEIGHTS = (r"(.*\.)?loss\..*",)

SPARE_BYTES = 1 << 30  # that a model may have besides its weights in the file: buffers, a discriminator

Model = TypeVar("Model", bound=nn.Module)


class NoConfigError(ValueError):
    """Nothing says what the model of a checkpoint is; the message lists the places."""


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint file that a path stands for: a file, a run directory, or an exported folder.

    Of a run directory it is `checkpoints/last.ckpt`, else the newest `checkpoints/*.ckpt`; of an exported
    folder `model.safetensors`.

    Raises:
        FileNotFoundError: there is none; the message lists what was looked for.
        ValueError: it is a pipe or a device.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file or folder")
    if not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device, not a file")
    by_age = sorted(path.glob("checkpoints/*.ckpt"), key=lambda file: (file.stat().st_mtime, file.name))
    for candidate in (path / "checkpoints" / "last.ckpt", *reversed(by_age), path / WEIGHTS_NAME):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no checkpoint in {path}: looked for checkpoints/last.ckpt and checkpoints/*.ckpt (a run directory) "
        f"and for {WEIGHTS_NAME} (an exported folder); give such a folder, or a checkpoint file itself"
    )


def read_checkpoint(
    path: str | Path,
    map_location: str | torch.device = "cpu",
    *,
    mmap: bool = False,
    tensors: Collection[str] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint file into a dict with at least the key `state_dict`; nothing in it is executed.

    Takes Lightning checkpoints of today and of 2020-21, bare state dicts, safetensors, and the pickled
    networks of DALL-E. Tensors get memory of their own, and are compared with the file's checksums.

    Args:
        path: the file.
        map_location: device for the tensors.
        mmap: leave tensors in the file until they are used, without comparing checksums. Writing to the file
            while they are in use ends the process; replacing it by another one does not.
        tensors: the entries whose tensors are wanted, `("state_dict",)` for instance; those of others are on
            the meta device, shapes without data. None stands for all.

    Raises:
        ValueError: the file is empty, damaged, not a checkpoint, or asks for code; the message says which.
    """
    path = Path(path).expanduser()

    def data(stored: StoredTensor) -> Tensor:
        return file.tensor(stored).to(map_location)

    def shape_only(stored: StoredTensor) -> Tensor:
        return torch.empty_strided(stored.shape, stored.stride, dtype=stored.dtype, device="meta")

    with TensorFile(path, mmap) as file:
        if file.size == 0:
            raise ValueError(f"{path} is empty (0 bytes): it was not written completely; get it again")
        try:
            content, metadata = file.structure()
            content = _as_checkpoint(content)
            finishers = {wanted: Finisher(data if wanted else shape_only) for wanted in (True, False)}
            found = {
                key: finishers[tensors is None or key in tensors].finish(value)[0]
                for key, value in content.items() if isinstance(key, str)
            }
        except ForbiddenNameError as error:
            names = ", ".join(error.names[:5]) + (", ..." if len(error.names) > 5 else "")
            raise ValueError(
                f"{path} asks for {names}, which weights do not need and which could run code here, so "
                "nothing was loaded. Get the weights as .safetensors, or as a file that holds tensors, "
                "numbers and strings only"
            ) from error
        except FormatError as error:
            raise ValueError(f"{path} is not a checkpoint: {error}") from error
        except (PermissionError, MemoryError):
            raise
        except Exception as error:  # damaged or hostile bytes can be the cause of any
            raise ValueError(
                f"{path} is truncated, damaged or not a checkpoint ({one_line(error)}); get it again and "
                "compare its size"
            ) from error
    _check_entries(found["state_dict"], path)
    step = str(metadata.get("step"))
    if step.isdecimal() and len(step) < 16:
        found["batches_seen"] = int(step)
    run = run_of(path)
    return {key: value if key in LARGE else absolute_paths(value, run) for key, value in found.items()}


def checkpoint_weights(checkpoint: Mapping[str, Any], ema: bool = True) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that was read: their averages, where it has some under `ema`.

    With `ema` False they are the trained ones in any case.

    Raises:
        ValueError: the averages do not belong to the weights.
    """
    state, averages = checkpoint["state_dict"], checkpoint.get("ema")
    if not ema or not (isinstance(averages, dict) and isinstance(averages.get("weights"), dict)):
        return state
    for name, value in averages["weights"].items():
        if not isinstance(value, Tensor) or value.shape != getattr(state.get(name), "shape", None):
            raise ValueError(f"the averages in the checkpoint do not belong to its weights: {name!r}")
    return state | averages["weights"]


@overload
def load_model(
    path: str | Path, cls: type[Model], *, device: str | torch.device = ...,
    config: str | Path | Config | None = ..., mmap: bool = ..., revision: str | None = ...,
    token: str | None = ..., cache_dir: str | Path | None = ..., ema: bool = ...,
) -> tuple[Model, DictConfig, int]: ...
@overload
def load_model(
    path: str | Path, cls: None = None, *, device: str | torch.device = ...,
    config: str | Path | Config | None = ..., mmap: bool = ..., revision: str | None = ...,
    token: str | None = ..., cache_dir: str | Path | None = ..., ema: bool = ...,
) -> tuple[Any, DictConfig, int]: ...
def load_model(
    path: str | Path, cls: type[nn.Module] | None = None, *, device: str | torch.device = "cpu",
    config: str | Path | Config | None = None, mmap: bool = False, revision: str | None = None,
    token: str | None = None, cache_dir: str | Path | None = None, ema: bool = True,
) -> tuple[Any, DictConfig, int]:
    """Build the model of a checkpoint: `model, config, step = load_model("logs/RUN")`, in eval mode.

    Other files that the config names under `ckpt_path` are not needed. The weights are in memory of their own
    and were compared with the file's checksums.

    Args:
        path: a checkpoint file, a run directory, an exported folder, or a repository `owner/name` of the
            model hub.
        cls: what the model must be, `VQModel` for instance; for type checkers, its type as well.
        device: where to put it.
        config: a YAML file or a mapping; None takes that of the checkpoint (see `config_of`).
        mmap: on the CPU, leave the weights in the file until they are used; see `read_checkpoint`.
        revision, token, cache_dir: of the model hub: branch, tag or commit; access token; folder for
        downloads.
        ema: take the averages of the weights, where the checkpoint of a run has them; False takes the
            weights as they were trained last.

    Returns:
        The model, its config, and the number of batches that it was trained on.

    Raises:
        FileNotFoundError, ValueError: see `find_checkpoint`, `read_checkpoint`, `config_of` and
        `build_model`.
    """
    if is_hub_name(path):
        path = fetch(str(path), revision=revision, token=token, cache_dir=cache_dir)
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file, mmap=mmap, tensors=("state_dict", "ema"))
    weights = checkpoint_weights(checkpoint, ema)
    published = identify(weights)
    found = config_of(checkpoint, file, config, published)
    state = published.state if published else weights
    model: Any = build_model(found, state, str(file), cls)
    counts = checkpoint.get("batches_seen"), checkpoint.get("global_step")
    step = next((count for count in counts if isinstance(count, int) and count > 0), 0)
    if hasattr(model, "batches_seen"):
        model.batches_seen = step
    return model.to(device).eval(), found, step


def config_of(
    checkpoint: Mapping[str, Any], path: str | Path, config: str | Path | Config | None = None,
    published: Published | None = None,
) -> DictConfig:
    """Return the config, with a section `model`, of a checkpoint that was read from the file `path`.

    In this order: `config`; the checkpoint's key `config`, with the section `data` of the run directory,
    whose paths are those of this machine; in a run directory its `configs/*.yaml`, merged in the order of
    their names; beside the file `config.yaml`, or the file's own name with `.yaml`; that of the family whose
    names and shapes the file's tensors have.

    Raises:
        NoConfigError: there is none of these.
        ValueError: it has no section `model`, or see `load_config`.
    """
    path = Path(path)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    beside = [path.with_name(CONFIG_NAME), path.with_suffix(".yaml")]
    files = sorted(run.glob("configs/*.yaml"))
    if isinstance(config, str | Path):
        found, origin = load_config(config), str(config)
    elif config is not None:
        found, origin = safe_config(config, "the given config"), "the given config"
    elif isinstance(checkpoint.get("config"), dict):
        origin = f"the config inside {path}"
        found = safe_config(checkpoint["config"], origin)
        if "data" in found and files:
            found.data = load_config(files).get("data", found.data)
    elif files := files or [file for file in beside if file.is_file()][:1]:
        found, origin = load_config(files), ", ".join(map(str, files))
    elif published is not None:
        found, origin = OmegaConf.create({"model": published.model}), published.family.name
    else:
        looked = ", ".join(map(str, (run / "configs" / "*.yaml", *beside)))
        raise NoConfigError(
            f"no config for {path}: there is none inside it, and none of these exists: {looked}; "
            "name the YAML file that it was trained with: load_model(path, config=...)"
        )
    if not OmegaConf.is_dict(found.get("model")):
        raise ValueError(f"{origin} has no section `model`; name another: load_model(path, config=...)")
    return found


def build_model(
    config: Config, state: Mapping[str, Tensor], source: str, cls: type[nn.Module] | None = None
) -> nn.Module:
    """Build the model of a config's section `model` once, and fill it from `state`, whole or not at all.

    The tensors of `state` become the model's. Where all classes are of this package and torch, which compute
    nothing from initial weights, parameters are initialised only if `state` has no values for them. The
    global random generator is not touched. `source` is for messages.

    Raises:
        ValueError: the config names no model, or none of the class `cls`; it does not build, or is far larger
            than `state`; or `state` does not fit it (see `load_weights`).
    """
    with models_only(), torch.random.fork_rng(devices=[]):
        section = without_ckpt_paths(config).model
        target = get_obj_from_str(section.get("target"))
        if not (inspect.isclass(target) and issubclass(target, nn.Module)):
            raise ValueError(f"target {section.target} in the config of {source} is no torch module")
        if cls is not None and not issubclass(target, cls):
            raise other_class(source, target, cls)
        if is_foreign(OmegaConf.to_container(section)):
            model = instantiate_from_config(section)
            _fill(model, state, source)
            return model
        deferred = DeferredInit()
        try:
            with memory_limit(SPARE_BYTES + 4 * sum(map(_size, state.values()))), deferred:
                model = instantiate_from_config(section)
        except (ValueError, OSError):
            raise
        except Exception as error:  # of a config that its file came with, not of the caller's code
            raise ValueError(
                f"the model of {source} cannot be built with its config ({type(error).__name__}: "
                f"{one_line(error)}); name another: load_model(path, config=...)"
            ) from error
        _fill(model, state, source)
        deferred.finish(model)
        return model


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    load_weights(
        model, state, source=source, ignore=PERCEPTUAL_WEIGHTS, optional=LOSS_WEIGHTS, assign=True
    )


def _size(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def other_class(source: str, found: type, cls: type) -> ValueError:
    """Make the error that says which class a checkpoint holds, and how to load that."""
    names = [f"{each.__module__}.{each.__qualname__}" for each in (found, cls)]
    return ValueError(
        f"{source} holds a {names[0]}, not a {names[1]}: call {found.__name__}.from_pretrained, or "
        "load_model without cls, which takes any"
    )


def _as_checkpoint(content: Any) -> dict[Any, Any]:
    """Return what a file holds if it is a checkpoint; a bare state dict, or a whole module, as one."""
    if (tensors := module_tensors(content)) is not None:
        return {"state_dict": tensors}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        return content
    if isinstance(content, dict) and content and {*map(type, content.values())} == {StoredTensor}:
        return {"state_dict": content}
    kind = "Tensor" if isinstance(content, StoredTensor) else type(content).__name__
    found = f"keys: {some_of(content)}" if isinstance(content, dict) else f"a {kind}"
    raise FormatError(f"there is no state_dict in it (it holds {found})")


def _check_entries(state: Mapping[Any, Any], path: Path) -> None:
    """Raise unless keys are names, and tensors are ordinary ones, which a module can take over."""
    for key, value in state.items():
        unusual = isinstance(value, Placeholder)
        if not isinstance(key, str) or unusual:
            kind = "a tensor without data, or a sparse one" if unusual else "no name of a weight"
            raise ValueError(f"{path} is not a checkpoint of weights: {key!r} in its state_dict is {kind}")
