"""Load a checkpoint into a model, completely or not at all.

A checkpoint comes from a stranger: it is read as data (see `taming.checkpoint.read`), and its config may
build models only. Published checkpoints of other projects need no config: they are known by the names and
shapes of their tensors (see `taming.checkpoint.families`). Loading is strict, and reports by name what it
leaves out.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from taming.checkpoint.deferred_init import DeferredInit, memory_limit
from taming.checkpoint.families import Published, identify
from taming.checkpoint.hub import fetch, is_hub_name
from taming.checkpoint.read import CheckpointFile, find_checkpoint
from taming.checkpoint.save import CONFIG_NAME, Config, without_ckpt_paths
from taming.checkpoint.state_dict import AVERAGES, LoadReport, load_weights, some_of
from taming.config import (
    ConfigError,
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
        config: a YAML file or a mapping; None takes that of the checkpoint (see `config_of`). Of a published
            checkpoint, a section `model` without `target` changes arguments of the model that its names and
            shapes give: `{"model": {"params": {"ddconfig": {"heads": 4}}}}`.
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
    with CheckpointFile(file, mmap=mmap) as opened:
        shapes = opened.read(tensors=())
        problem: ValueError | None = None
        for found, published in _configs(shapes, file, config):
            part = published.part if published else ""
            is_there = any(key.startswith(part) for key in shapes["state_dict"])
            checkpoint = opened.read(tensors=("state_dict", "ema"), prefix=part if is_there else "")
            try:
                model: Any = build_model(found, checkpoint_weights(checkpoint, ema), str(file), cls)
                break
            except ValueError as error:  # of a config beside the file, which may be that of another file
                problem = problem or error
        else:
            assert problem is not None  # there is at least one config
            raise problem
    if problem is not None:
        logger.warning(
            "the config beside %s is not used, but what names and shapes of its tensors say: %s", file,
            problem,
        )
    counts = checkpoint.get("batches_seen"), checkpoint.get("global_step")
    step = next((count for count in counts if isinstance(count, int) and count > 0), 0)
    if hasattr(model, "batches_seen"):
        model.batches_seen = step
    return model.to(device).eval(), found, step


def config_of(
    checkpoint: Mapping[str, Any], path: str | Path, config: str | Path | Config | None = None
) -> DictConfig:
    """Return the config, with a section `model`, of a checkpoint that was read from the file `path`.

    In this order: `config`, on top of that of the file's family if it names no target; the checkpoint's key
    `config`, with the section `data` of the run directory, whose paths are those of this machine; in a run
    directory its `configs/*.yaml`, merged in the order of their names; beside the file `config.yaml`, or the
    file's own name with `.yaml`; that of the family whose names and shapes the file's tensors have. Of a
    published checkpoint, configs inside and beside it that are not of this package count for nothing.

    Raises:
        NoConfigError: there is none of these.
        ValueError: it has no section `model`, or see `load_config`; of a published checkpoint, no model of
            this package can be of its kind or sizes.
    """
    return next(_configs(checkpoint, Path(path), config))[0]


def _configs(
    checkpoint: Mapping[str, Any], path: Path, config: str | Path | Config | None
) -> Iterator[tuple[DictConfig, Published | None]]:
    """Yield the config of a checkpoint, and for one beside its file also that of its family; see `config_of`.

    The latter comes with its `Published`.
    """
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    beside = [path.with_name(CONFIG_NAME), path.with_suffix(".yaml")]
    files = sorted(run.glob("configs/*.yaml"))
    published = identify(checkpoint["state_dict"])
    inside = checkpoint.get("config")
    if config is not None:
        is_file, origin = isinstance(config, str | Path), "the given config"
        given = load_config(config) if is_file else safe_config(config, origin)
        given = _with_model(given, str(config) if is_file else origin)
        if published is not None and "target" not in given.model:  # arguments that no shape tells
            given.model = OmegaConf.merge(published.model, given.model)
        yield given, None
        return
    if isinstance(inside, dict) and (published is None or _names_model(inside)):
        origin = f"the config inside {path}"
        found = safe_config(inside, origin)
        if "data" in found and files:
            found.data = load_config(files).get("data", found.data)
        yield _with_model(found, origin), None
        return
    if files:
        yield _with_model(load_config(files), ", ".join(map(str, files))), None
        return
    near = next((file for file in beside if file.is_file()), None)
    is_ours = "batches_seen" in checkpoint  # then the config beside it is its own, whatever that names
    if near is not None and (published is None or is_ours or _is_usable(near)):
        yield _with_model(load_config(near), str(near)), None
        if is_ours:
            return
    if published is not None:
        try:
            yield OmegaConf.create({"model": published.model}), published
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    elif near is None:
        looked = ", ".join(map(str, (run / "configs" / "*.yaml", *beside)))
        raise NoConfigError(
            f"no config for {path}: there is none inside it, and none of these exists: {looked}; its tensors "
            f"are those of no published model that is known here, {_shapes(checkpoint['state_dict'])}; "
            "name the YAML file that it was trained with: load_model(path, config=...)"
        )


def _with_model(config: DictConfig, origin: str) -> DictConfig:
    if not OmegaConf.is_dict(config.get("model")):
        raise ValueError(f"{origin} has no section `model`; name another: load_model(path, config=...)")
    return config


def _names_model(config: Mapping[str, Any] | DictConfig) -> bool:
    """Tell whether a config has a section `model` with a target, as those of this package and of 2021 do."""
    section = config.get("model")
    return isinstance(section, Mapping | DictConfig) and isinstance(section.get("target"), str)


def _is_usable(file: Path) -> bool:
    """Tell whether a YAML file beside a published checkpoint names a model of ours."""
    try:
        config = load_config(file)
        with models_only():
            return _names_model(config) and inspect.isclass(get_obj_from_str(config.model.target))
    except (ConfigError, OSError) as error:
        logger.info("%s is not used: %s", file, error)
        return False


def _shapes(state: Mapping[str, Any]) -> str:
    return some_of(f"{key} {tuple(value.shape)}" for key, value in state.items() if isinstance(value, Tensor))


def build_model(
    config: Config, state: Mapping[str, Tensor], source: str, cls: type[nn.Module] | None = None
) -> nn.Module:
    """Build the model of a config's section `model` once, and fill it from `state`, whole or not at all.

    The tensors of `state` become the model's. Where all classes are of this package and torch, which compute
    nothing from initial weights, parameters are initialised only if `state` has no values for them. The
    global random generator is not touched. `source` is for messages.

    Raises:
        ValueError: the config names no model, or none of the class `cls`; it does not build, or is far larger
            than `state`; or `state` does not fit it (see `fill_model`).
    """
    published = identify(state)
    with models_only(), torch.random.fork_rng(devices=[]):
        section = without_ckpt_paths(config).model
        target = get_obj_from_str(section.get("target"))
        if not (inspect.isclass(target) and issubclass(target, nn.Module)):
            raise ValueError(f"target {section.target} in the config of {source} is not a torch module")
        if cls is not None and not issubclass(target, cls):
            raise other_class(f"{source}{_by_names(published)}", target, cls)
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


def fill_model(
    model: nn.Module, state: Mapping[str, Tensor], *, source: str, ignore: str | Sequence[str] = (),
    optional: Sequence[str] = (), assign: bool = False,
) -> LoadReport:
    """Load a state dict into a model as `load_weights` does, also one with the names of another project.

    Raises:
        ValueError: see `load_weights`. Of a published checkpoint it says also what it is by its names, and
            which arguments would fit its sizes.
    """
    published = identify(state)
    options: Any = {"ignore": ignore, "optional": optional, "assign": assign}
    try:
        weights = state
        if published is not None and not _reads_itself(model, state, published.state):
            weights = published.state
        return load_weights(model, weights, source=source, **options)
    except ValueError as error:
        raise ValueError(f"{error}{_remedy(model, published)}") from error


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    fill_model(
        model, state, source=source, ignore=PERCEPTUAL_WEIGHTS, optional=LOSS_WEIGHTS, assign=True
    )


def _reads_itself(model: nn.Module, state: Mapping[str, Tensor], translated: Mapping[str, Tensor]) -> bool:
    """Tell whether a model takes a published state dict as it is, and no translation fits better.

    It reports the weights of the loss, which a translation leaves out. Where names stay the same, the
    translation is needed only to leave out others, and to put running averages in place of weights, if the
    model does not do that.
    """
    as_it_is, by_our_names = _fitting(model, state), _fitting(model, translated)
    if as_it_is != by_our_names:
        return as_it_is > by_our_names
    takes_averages = getattr(model, "takes_averages", False)
    known = ("loss.", AVERAGES) if takes_averages else ("loss.",)
    others = [key for key in state.keys() - translated.keys() if not key.startswith(known)]
    is_same = takes_averages or all(state.get(key) is value for key, value in translated.items())
    return is_same and translated.keys() <= state.keys() and not others


def _fitting(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Count the tensors of a state dict that have the name and the shape of one of the model's."""
    own = model.state_dict()
    return sum(getattr(value, "shape", None) == own[key].shape for key, value in state.items() if key in own)


def _by_names(published: Published | None) -> str:
    return f" (by its names and shapes {published.family.name})" if published else ""


def _remedy(model: nn.Module, published: Published | None) -> str:
    """Say what a published checkpoint is that does not fit a model, and what it fits."""
    if published is None:
        return ""
    try:
        section = published.model
    except ValueError as error:
        return f". By its names it is {published.family.name}: {error}"
    target = get_obj_from_str(section["target"])
    found = f". By its names and shapes it is {published.family.name}"
    if not isinstance(model, target):
        return f"{found}, a {target.__name__}: load_model builds it from the file alone"
    given = _own_config(model).get("model", {}).get("params", {})
    wanted = _differences(section["params"], given)
    return f"{found}, which these arguments fit: {', '.join(wanted)}" if wanted else found


def _own_config(model: nn.Module) -> dict[str, Any]:
    """Return the config that a model was built with, where it remembers it."""
    config: Any = getattr(model, "pretrained_config", dict)
    return config()


def _differences(wanted: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List arguments, as `name=value`, that differ from those given; the loss is not a matter of sizes."""
    found = []
    for key, value in wanted.items():
        other = given.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found += _differences(value, other, f"{prefix}{key}.")
        elif value != other and key not in ("lossconfig", "resolution", "attn_resolutions"):
            found.append(f"{prefix}{key}={value}")
    return found


def _size(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else 0


def other_class(source: str, found: type, cls: type) -> ValueError:
    """Make the error that says which class a checkpoint holds, and how to load that."""
    names = [f"{each.__module__}.{each.__qualname__}" for each in (found, cls)]
    return ValueError(
        f"{source} holds a {names[0]}, not a {names[1]}: call {found.__name__}.from_pretrained, or "
        "load_model without cls, which takes any"
    )
