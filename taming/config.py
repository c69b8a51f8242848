"""Read YAML files into one configuration, and build the object that a `{target, params}` mapping describes.

A configuration may come from a stranger. What a `target` may name is the table SAFE_TARGETS; what a callback,
a logger or a data set may write to is the run directory; resolvers (`${oc.env:HOME}`) are off. Only the
caller can allow more (`allow_targets`), never a YAML file.
"""

import copy
import importlib
import inspect
import io
import logging
import os
import pkgutil
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from taming.config_limits import check_interpolations, check_size, resolvers_in, without_resolvers
from taming.parameters import did_you_mean, find_problem

logger = logging.getLogger(__name__)

MODEL, DATA, TRAINING = "model", "data", "training"

# What a target may be: (module prefix, whether functions are accepted besides classes, what it is part of).
# An object is judged by the module that *defines* it, so that nothing is reachable merely because a listed
# module imports it. Tuples on purpose: a list that a configuration could reach and append to would be no
# limit.
SAFE_TARGETS: tuple[tuple[str, bool, str], ...] = (
    ("taming.models", False, MODEL),
    ("taming.modules", True, MODEL),  # networks and losses: no files, no processes
    ("taming.sampling", True, MODEL),  # pure functions of tensors
    ("taming.lr_scheduler", True, MODEL),  # pure functions of a batch number
    ("taming.metrics", False, MODEL),
    ("torch.nn", False, MODEL),  # layers and losses as building blocks
    ("torch.optim", False, MODEL),  # optimizers and schedulers, for custom training recipes
    ("taming.data", False, DATA),  # data sets; the functions beside them unpack archives and write files
    ("torchvision.transforms", False, DATA),  # preprocessing of the data
    ("taming.training.callbacks", False, TRAINING),
    ("taming.eval", False, TRAINING),
    ("pytorch_lightning.callbacks", False, TRAINING),  # the `lightning.callbacks` section
    ("pytorch_lightning.loggers", False, TRAINING),  # the `lightning.logger` section
    # Not here: taming.config, taming.checkpoint, taming.training.command, taming.util: they load and write.
)

# Parameters of callbacks and loggers, and of data sets, that name places to write to.
OUTPUT_PARAMETERS = {
    TRAINING: (
        "dirpath", "save_dir", "log_dir", "logdir", "dir", "root_dir", "path", "exclude_batches_path",
        "offline_directory", "artifact_location", "cache_dir", "file",
    ),
    DATA: ("cache_dir",),  # and `root` with `download: true`
}

# What older files say, and where that lives now. `main` itself is never imported: the main.py of the current
# folder may be anybody's.
HISTORIC_TARGETS: tuple[tuple[str, str], ...] = (
    ("main.DataModuleFromConfig", "taming.data.datamodule.DataModuleFromConfig"),
    ("main.WrappedDataset", "taming.data.datamodule.WrappedDataset"),
    ("cutlit.DataModuleFromConfig", "taming.data.datamodule.DataModuleFromConfig"),
    ("main.ImageLogger", "taming.training.callbacks.ImageLogger"),
    ("main.SetupCallback", "taming.training.callbacks.SetupCallback"),
    ("main.instantiate_from_config", "taming.config.instantiate_from_config"),
    ("main.get_obj_from_str", "taming.config.get_obj_from_str"),
    # Latent diffusion's first stages are VQGANs; its YAML files name them so, and its copies of our parts.
    ("ldm.models.autoencoder.VQModel", "taming.models.latent_diffusion.VQModel"),
    ("ldm.models.autoencoder.VQModelInterface", "taming.models.latent_diffusion.VQModelInterface"),
    ("ldm.models.autoencoder.AutoencoderKL", "taming.models.autoencoder_kl.AutoencoderKL"),
    (
        "ldm.modules.losses.LPIPSWithDiscriminator",
        "taming.modules.losses.latent_diffusion.LPIPSWithDiscriminator",
    ),
    (
        "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
        "taming.modules.losses.latent_diffusion.LPIPSWithDiscriminator",
    ),
    (
        "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "taming.modules.losses.latent_diffusion.VQLPIPSWithDiscriminator",
    ),
    ("ldm.modules.losses.vqperceptual.DummyLoss", "taming.modules.losses.vqperceptual.DummyLoss"),
    ("ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "taming.lr_scheduler.LambdaWarmUpCosineScheduler"),
    ("ldm.lr_scheduler.LambdaWarmUpCosineScheduler2", "taming.lr_scheduler.LambdaWarmUpCosineScheduler2"),
    ("ldm.lr_scheduler.LambdaLinearScheduler", "taming.lr_scheduler.LambdaLinearScheduler"),
    # Lightning removed test-tube, the default logger of 2021; this one takes its save_dir, name and version.
    ("pytorch_lightning.loggers.TestTubeLogger", "pytorch_lightning.loggers.TensorBoardLogger"),
)

# Modules of this package's first version that have moved since, with all that they hold.
HISTORIC_MODULES: tuple[tuple[str, str], ...] = (
    ("taming.callbacks", "taming.training.callbacks"),
    ("taming.modules.misc.label_grid", "taming.modules.conditioners.label_grid"),
    ("taming.modules.metrics", "taming.metrics"),
    ("taming.sampling.settings", "taming.sampling.schedules"),
    ("taming.data.imagenet_images", "taming.data.imagenet.images"),
    ("taming.data.paired", "taming.data.transforms.joint"),
)

# Optional packages, and the extra of this package that installs each.
EXTRAS: tuple[tuple[str, str], ...] = (
    ("gradio", "demo"),
    ("datasets", "data"),
    ("transformers", "data"),
    ("huggingface_hub", "hub"),
)

MAX_YAML = 1 << 18  # bytes of a file, which take seconds to read

_allowed: tuple[str, ...] = ()  # what allow_targets added; rebound, never changed in place
_parts: ContextVar[tuple[str, ...]] = ContextVar("parts", default=(MODEL, DATA, TRAINING))
_run: ContextVar[Path | None] = ContextVar("run", default=None)


class ConfigError(ValueError):
    """A configuration cannot be used as it stands; the message names the file or key, and the remedy."""


def load_config(paths: str | Path | Iterable[str | Path], dotlist: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files from left to right, then `key.sub=value` items; what comes later wins.

    Interpolations (`${...}`) stay as they are until the configuration is used. Resolvers (`${oc.env:...}`)
    that are not allowed become text.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ConfigError: a file is not YAML, no mapping or too large, or an item is malformed; the message names
        it.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    config = OmegaConf.create({})
    for path in paths:
        config = _merge(config, _load_yaml(Path(path).expanduser()), str(path))
    return override_config(config, dotlist)


def override_config(config: DictConfig, dotlist: Sequence[str]) -> DictConfig:
    """Return the configuration with `key.sub=value` items set in their order; values are YAML.

    A key may lead into an element of a list of mappings: `stages.0.params.size=3`.

    Raises:
        ConfigError: an item is malformed, or sets one element of a list of values, or a key of a list.
    """
    for item in dotlist:
        addition = safe_config(_load_item(item), repr(item))
        key, _, _ = item.partition("=")
        if _leads_into_list(config, key, item):
            config = copy.deepcopy(config)
            OmegaConf.update(config, key, OmegaConf.select(addition, key), merge=True, force_add=True)
        else:
            config = _merge(config, addition, repr(item))
    try:
        check_interpolations(OmegaConf.to_container(config))
    except ValueError as error:
        raise ConfigError(f"the configuration {error}") from error
    return config


def missing_keys(config: DictConfig) -> list[str]:
    """List the keys of values that are ???, `data.params.train.params.folder` for instance.

    `OmegaConf.missing_keys` of version 2.3 fails where another value refers to one of them.
    """

    def within(value: Any, key: str) -> Iterator[str]:
        parts = dict(enumerate(value)) if isinstance(value, list) else value
        for name, item in parts.items() if isinstance(parts, dict) else ():
            yield from within(item, f"{key}.{name}" if key else str(name))
        if value == "???":
            yield key

    return list(within(OmegaConf.to_container(config, resolve=False), ""))


def config_folder() -> Path:
    """Return the folder of the configurations that come with the package, in a checkout or installed."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str | Path) -> Path:
    """Return the file that a name stands for: `demo/vqgan` is `configs/demo/vqgan.yaml`, wherever one is.

    In this order: the path as it is; in the folder `configs` here; in that of the package. `~`, a leading
    `configs/` and the ending `.yaml` may be written or left out.

    Raises:
        FileNotFoundError: none of these exists; the message says what is near.
    """
    path = Path(name).expanduser()
    within = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for place in (path, "configs" / within, config_folder() / within):  # an absolute path replaces the folder
        for file in (place, Path(f"{place}.yaml")):
            if file.is_file():
                return file
    if path.is_dir():
        raise FileNotFoundError(f"config file {path} is a folder, not a YAML file")
    near = did_you_mean(within.as_posix().removesuffix(".yaml"), config_names())
    raise FileNotFoundError(f"config file {path} does not exist{near}; `taming configs` lists what there is")


def config_names() -> list[str]:
    """Return the names of all configurations that `find_config` finds without a path."""
    folders = Path("configs"), config_folder()
    files = {file.relative_to(folder) for folder in folders for file in folder.rglob("*.yaml")}
    return sorted(file.with_suffix("").as_posix() for file in files)


def allow_targets(*names: str) -> None:
    """Allow configurations more than the usual; what each name is shows from its form.

    - A package, `my_package`, or more narrowly `my_package.models`: the classes and functions that it defines
    may
      be targets. Allow only what you would also run.
    - A folder, with a `/` in its path, or an address: callbacks, loggers and data sets may write there.
    - A resolver, `oc.env`: configurations that are read from now on may use it.

    Nothing in a YAML file reaches this function. Raises ConfigError for a name that is none of these.
    """
    global _allowed
    for each in names:
        name = each.removesuffix(".*").removesuffix(".")
        if "/" in each or each.startswith("~"):
            name = each if "://" in each else str(Path(each).expanduser().resolve())
        elif not name or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"cannot allow {each!r}: name a package, my_package, or a folder, ./name")
        if name not in _allowed:
            _allowed = (*_allowed, name)


@contextmanager
def models_only() -> Iterator[None]:
    """Within the block, configurations may name models and networks only: what a checkpoint may hold."""
    token = _parts.set((MODEL,))
    try:
        yield
    finally:
        _parts.reset(token)


@contextmanager
def run_directory(folder: str | Path) -> Iterator[None]:
    """Within the block, callbacks, loggers and data sets of configurations may write below `folder`."""
    token = _run.set(Path(folder).resolve())
    try:
        yield
    finally:
        _run.reset(token)


def is_foreign(config: Any) -> bool:
    """Tell whether a mapping or list has a target of a package that the caller allowed, at any depth."""
    if isinstance(config, Mapping):
        target = config.get("target")
        packages = tuple((name, True, MODEL) for name in _allowed)
        is_one = isinstance(target, str) and _lies_within(target, packages)
        return is_one or any(map(is_foreign, config.values()))
    return isinstance(config, list | tuple) and any(map(is_foreign, config))


def safe_config(config: Any, source: str) -> DictConfig:
    """Make an OmegaConf configuration of dicts and lists that may come from a stranger.

    Resolvers that are not allowed are kept as text. `source` is for messages. Raises ConfigError where the
    configuration is not a mapping, or stands for too much (see `taming.config_limits`).
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config)
    if not isinstance(config, Mapping):
        raise ConfigError(f"{source} must hold a mapping (key: value), not a {type(config).__name__}")
    try:
        check_size(config)
        plain = without_resolvers(dict(config), _allowed)
        check_interpolations(plain)
        return OmegaConf.create(plain)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source} {one_line(error)}") from error


def storable(config: Any) -> dict[str, Any]:
    """Copy a whole configuration as plain dicts and lists for a file.

    Interpolations are replaced by their values, but resolvers are kept as text, so that no value of this
    machine's environment gets into a file.
    """
    plain = OmegaConf.to_container(config) if OmegaConf.is_config(config) else dict(config)
    resolved: Any = OmegaConf.to_container(OmegaConf.create(without_resolvers(plain)), resolve=True)
    return resolved


def instantiate_from_config(config: Mapping[str, Any] | DictConfig, **extra: Any) -> Any:
    """Import what `config["target"]` names and call it with `config["params"]` and `extra`; `extra` wins.

    Parameters arrive as plain dicts, lists and numbers with interpolations resolved, so that what a model
    saves as its hyper-parameters can be read back safely. Nested `{target, params}` mappings are left for the
    object to instantiate.

    Raises:
        ConfigError: no target, a target that is missing or not allowed, parameters that do not fit its
            signature, or a place to write to that is not allowed. What the constructor itself raises passes
            through, with a note that names the target.
    """
    if not isinstance(config, Mapping | DictConfig):
        raise ConfigError(f"expected a mapping with the keys target and params, got {config!r}")
    if "target" not in config:
        keys = ", ".join(map(str, config)) or "none"
        raise ConfigError(f'Expected key "target" to instantiate; the mapping has the keys: {keys}')
    target = config["target"]
    try:
        params = _plain(config.get("params"))
    except MissingMandatoryValue as error:  # its own message has three lines
        raise ConfigError(
            f"{error.full_key} of target {target} is ???, which the user must give: add {error.full_key}=... "
            "to the command, or write it into the file"
        ) from error
    except InterpolationKeyError as error:
        raise ConfigError(
            f"params of target {target}: {one_line(error)}. If this section was taken out of a file, "
            "take it after OmegaConf.resolve(config)"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"params of target {target}: {one_line(error)}") from error
    params = {} if params is None else params
    if not isinstance(params, dict):
        raise ConfigError(f"params of target {target} must be a mapping, got {params!r}")
    obj = get_obj_from_str(target)
    _check_texts(target, obj, params)
    params = params | extra
    if problem := find_problem(obj, params):
        raise ConfigError(f"target {target} {problem}")
    try:
        return obj(**params)
    except Exception as error:
        error.add_note(f"(while building the target {target})")
        raise


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import the class or function that a dotted path names, if a configuration may name it.

    `reload` imports its module again. Raises ConfigError for what is missing or not allowed.
    """
    if not isinstance(string, str) or string.count(".") < 1:
        raise ConfigError(f"a target is a dotted path such as taming.models.vqgan.VQModel, got {string!r}")
    historic = dict(HISTORIC_TARGETS)
    if (home := historic.get(string, "")).startswith("taming.config."):
        return globals()[home.rsplit(".", 1)[1]]
    if home:
        if home.rsplit(".", 1)[1] != string.rsplit(".", 1)[1]:
            logger.warning("%s no longer exists: using %s instead", string, home)
        string = home
    module_name, _, name = string.rpartition(".")
    if module_name in (moved := dict(HISTORIC_MODULES)):
        string = f"{moved[module_name]}.{name}"
    if string.startswith("main."):
        known = [name for name in historic if name.startswith("main.")]
        near = did_you_mean(string, known)
        raise ConfigError(f"target {string!r} is unknown{near}; known: {_names(known)}")
    parts = string.split(".")
    if any(not part.isidentifier() or part.startswith("_") for part in parts):
        raise ConfigError(f"target {string!r} is not allowed: every part must be a public Python name")
    module_name, name = ".".join(parts[:-1]), parts[-1]
    if not _lies_within(module_name, _listed()):  # before the import, which would run its code
        near = _closest_module(".".join(parts[:2])) if parts[0] == "taming" else ""
        raise ConfigError(_not_allowed(string, parts[0], f"{module_name} is not on the allowed list{near}"))
    module = _import(module_name, string, reload)
    if not hasattr(module, name):
        found = [key for key, value in vars(module).items() if _is_callable(value)]
        own = [key for key in found if vars(module)[key].__module__ == module_name and key[0] != "_"]
        near = did_you_mean(name, found) or f"; it has: {_names(own)}"
        raise ConfigError(f"target {string!r}: the module {module_name} has no {name!r}{near}")
    obj = getattr(module, name)
    _check_object(string, obj)
    return obj


def _load_yaml(path: Path) -> DictConfig:
    """Read one YAML file that holds a mapping (or nothing)."""
    if not path.is_file():
        kind = "is a folder or device, not a YAML file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"config file {path} {kind}")
    if path.stat().st_size > MAX_YAML:
        raise ConfigError(f"config file {path} is larger than {MAX_YAML >> 10} KB: it is not a configuration")
    try:
        text = path.read_text(encoding="utf-8")
        root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"config file {path} must hold a mapping (key: value), not a {root.id}")
        check_size(root)
        return safe_config(OmegaConf.load(io.StringIO(text)) if root else {}, f"config file {path}")
    except ConfigError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"config file {path} has too many levels") from error
    except ValueError as error:
        raise ConfigError(f"config file {path} {one_line(error)}") from error


def _load_item(item: str) -> DictConfig:
    """Read one `key.sub=value` from a command line; the value is YAML."""
    key, equals, _ = item.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"{item!r} is not of the form key.sub=value, e.g. model.params.embed_dim=256")
    try:
        return OmegaConf.from_dotlist([item])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"the value of {item!r} is not valid YAML: {one_line(error)}") from error


def _leads_into_list(config: DictConfig, key: str, item: str) -> bool:
    """Tell whether a dotted key leads to an element of a list, or below; raise where that cannot be set."""
    node: Any = OmegaConf.to_container(config)
    parts = key.split(".")
    found = False
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            found, place = True, ".".join(parts[:depth])
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(f"{item!r}: {place} is a list of {len(node)}: name an element, {place}.0")
            if depth == len(parts) - 1 and not isinstance(node[int(part)], dict):
                values = list(node)
                values[int(part)] = item.partition("=")[2]
                whole = shlex.quote(f"{place}=[{','.join(map(str, values))}]")
                raise ConfigError(f"{item!r} sets one element of a list: give the whole list, {whole}")
            node = node[int(part)]
        else:
            node = node.get(part) if isinstance(node, dict) else None
    return found


def _merge(config: DictConfig, addition: DictConfig, source: str) -> DictConfig:
    try:
        merged: Any = OmegaConf.merge(config, addition)
        return merged
    except (TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source} does not fit what was loaded before it: {one_line(error)}") from error


def _plain(value: Any) -> Any:
    """Turn OmegaConf nodes, also inside plain containers, into dicts and lists without interpolations.

    Texts that begin with `~/` become paths below the home folder.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(_without_resolvers(value), resolve=True, throw_on_missing=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return os.path.expanduser(value) if is_home else value


def _without_resolvers(node: Any) -> Any:
    """Return an OmegaConf node, or one of a copy in which resolvers that are not allowed are text."""
    root = OmegaConf.to_container(node._get_root())
    safe = without_resolvers(root, _allowed)
    if safe == root:
        return node
    key = node._get_full_key(None)
    return OmegaConf.select(OmegaConf.create(safe), key) if key else OmegaConf.create(safe)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in dicts and lists with the key that it stands under, but not of nested targets."""
    if isinstance(value, Mapping) and "target" not in value:
        for name, item in value.items():
            yield from _texts(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str | os.PathLike):
        yield key, os.fspath(value)


def _check_texts(target: str, obj: Any, params: Mapping[str, Any]) -> None:
    """Raise where a parameter has a resolver that is off, or names a place that must not be written to."""
    part = next((entry[2] for entry in SAFE_TARGETS if _lies_within(obj.__module__, (entry,))), "")
    outputs = OUTPUT_PARAMETERS.get(part, ()) + (("root",) if part == DATA and params.get("download") else ())
    for key, text in _texts(params):
        if resolvers := resolvers_in(text):
            raise ConfigError(
                f"{key}: {text} of target {target} uses the resolver {resolvers[0]}, which is off since it "
                f"reads more than the file: write the value itself, or allow it with --allow {resolvers[0]}"
            )
        leads_away = os.path.isabs(text) or text.startswith("~") or "://" in text or ".." in Path(text).parts
        is_output = key in outputs or (part == TRAINING and leads_away)
        if is_output and not _may_write(text):
            raise ConfigError(
                f"{key}: {text} of target {target} lies outside of {_run.get() or 'a run directory'}, and "
                f"configurations write nothing there: leave it out, or allow it with --allow {text}"
            )


def _may_write(place: str) -> bool:
    """Tell whether a path lies below the run directory or an allowed folder, or is an allowed address."""
    if "://" in place:
        return any(place == name or place.startswith(name.rstrip("/") + "/") for name in _allowed)
    path = Path(place).expanduser().resolve()
    run = _run.get()
    roots = [Path(name) for name in _allowed if os.path.isabs(name)] + ([run] if run else [])
    return any(path.is_relative_to(root) for root in roots)


def _listed() -> tuple[tuple[str, bool, str], ...]:
    """List what a target may be here and now."""
    parts = _parts.get()
    usual = tuple(entry for entry in SAFE_TARGETS if entry[2] in parts)
    return usual + tuple((name, True, MODEL) for name in _allowed)


def _lies_within(dotted: str, entries: Iterable[tuple[str, bool, str]]) -> bool:
    return any(dotted == prefix or dotted.startswith(prefix + ".") for prefix, _, _ in entries)


def _is_callable(obj: Any) -> bool:
    """Tell whether this is a plain class or function, whose defining module is known."""
    return inspect.isclass(obj) or inspect.isfunction(obj)


def _check_object(target: str, obj: Any) -> None:
    """Raise unless it is a class, or a function where those are accepted, that is defined inside the list."""
    if not _is_callable(obj):
        kind = type(obj).__name__
        raise ConfigError(f"target {target!r} is not allowed: it is a {kind}, not a class or function")
    home = str(getattr(obj, "__module__", None))
    package = home.split(".")[0]
    listed = _listed()
    if not _lies_within(home, listed):
        raise ConfigError(_not_allowed(target, package, f"it is defined in {home}, not on the allowed list"))
    if inspect.isfunction(obj) and not _lies_within(home, (entry for entry in listed if entry[1])):
        raise ConfigError(_not_allowed(target, package, f"only classes of {home} may be named"))


def _not_allowed(target: str, package: str, reason: str) -> str:
    """Phrase why a target is not allowed, what would allow it, and what is allowed."""
    remedy = f'if you trust {package}, allow it: --allow {package}, or allow_targets("{package}") from Python'
    if package == "taming":
        remedy = "call it from your own code instead"
    if _lies_within(target, SAFE_TARGETS) and not _lies_within(target, _listed()):
        remedy = "models are loaded from this file, which needs no data set, callback or logger"
    listed = _names(f"{entry[0]}.*" for entry in _listed())
    return f"target {target!r} is not allowed: {reason}; {remedy}. Allowed now: main.*, {listed}"


def _import(module_name: str, target: str, reload: bool) -> ModuleType:
    try:
        module = importlib.import_module(module_name)
        return importlib.reload(module) if reload else module
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(missing + "."):
            near = _closest_module(missing)
            raise ConfigError(f"target {target!r}: there is no module {missing}{near}") from error
        package = missing.split(".")[0]
        extra = dict(EXTRAS).get(package)
        install = f'pip install "taming[{extra}]"' if extra else f"pip install {package}"
        raise ConfigError(
            f"target {target!r}: {module_name} needs the package {package}, which is missing: {install}"
        ) from error
    except ImportError as error:
        raise ConfigError(f"target {target!r}: {module_name} cannot be imported: {error}") from error


def _closest_module(missing: str) -> str:
    """Name the modules that exist where this one is missing."""
    parent, _, name = missing.rpartition(".")
    try:
        paths = importlib.import_module(parent).__path__ if parent else []
    except (ImportError, AttributeError):
        return ""
    names = [found.name for found in pkgutil.iter_modules(paths)]
    if name in names or not names:
        return ""
    return did_you_mean(name, names) or f"; {parent} has: {_names(names)}"


def one_line(error: BaseException) -> str:
    """Return an error's message in one line of at most 300 characters, or the name of its class."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
