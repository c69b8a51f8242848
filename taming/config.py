"""YAML files into one configuration, and a `{target, params}` mapping into the object that it describes.

A configuration may come from a stranger, so `target` is not free to name any Python object: what it may name
is the table SAFE_TARGETS, which only trusted code can extend (`allow_targets`), never a YAML file.
"""

import copy
import importlib
import inspect
import logging
import os
import pkgutil
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from taming.parameters import did_you_mean, find_problem

logger = logging.getLogger(__name__)

# What a target may be: (module prefix, whether functions are accepted besides classes). An object is judged
# by the module that *defines* it, so that nothing is reachable merely because a listed module imports it.
# Tuples on purpose: a list that a configuration could reach and append to would be no limit.
SAFE_TARGETS: tuple[tuple[str, bool], ...] = (
    ("taming.models", False),
    ("taming.modules", True),  # networks and losses: no files, no processes
    ("taming.sampling", True),  # pure functions of tensors
    ("taming.lr_scheduler", True),  # pure functions of a batch number
    ("taming.metrics", False),
    ("taming.data", False),  # data sets; the functions beside them unpack archives and write files
    ("taming.training.callbacks", False),
    ("taming.eval", False),
    # Not here: taming.config, taming.checkpoint, taming.training.command, taming.util: they load and write.
    ("torch.optim", False),  # optimizers and schedulers, for custom training recipes
    ("torch.nn", False),  # layers and losses as building blocks
    ("torchvision.transforms", False),  # preprocessing of the data
    ("pytorch_lightning.callbacks", False),  # the `lightning.callbacks` section
    ("pytorch_lightning.loggers", False),  # the `lightning.logger` section
)

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
    ("torchmetrics", "eval"),
    ("torch_fidelity", "eval"),
    ("gradio", "demo"),
    ("datasets", "data"),
    ("transformers", "data"),
    ("huggingface_hub", "hub"),
)

_allowed: tuple[tuple[str, bool], ...] = ()  # what allow_targets added; rebound, never changed in place


class ConfigError(ValueError):
    """A configuration cannot be used as it stands; the message names the file or key, and the remedy."""


def load_config(paths: str | Path | Iterable[str | Path], dotlist: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files from left to right, then `key.sub=value` items; what comes later wins.

    Interpolations (`${...}`) stay as they are until the configuration is used.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ConfigError: a file is not YAML or no mapping, or an item is malformed; the message names the culprit.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
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
        addition = _load_item(item)
        key, _, _ = item.partition("=")
        if _leads_into_list(config, key, item):
            config = copy.deepcopy(config)
            OmegaConf.update(config, key, OmegaConf.select(addition, key), merge=True, force_add=True)
        else:
            config = _merge(config, addition, repr(item))
    return config


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


def allow_targets(*packages: str) -> None:
    """Let configurations name the classes and functions that the given packages define.

    Allow only what you would also run: `my_package`, or more narrowly `my_package.models`. Nothing in a YAML
    file reaches this function.
    """
    global _allowed
    for package in packages:
        name = package.removesuffix(".*").removesuffix(".")
        if not name or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"cannot allow {package!r}: name a package, such as my_package")
        if (name, True) not in _allowed:
            _allowed = (*_allowed, (name, True))


def instantiate_from_config(config: Mapping[str, Any] | DictConfig, **extra: Any) -> Any:
    """Import what `config["target"]` names and call it with `config["params"]` and `extra`; `extra` wins.

    Parameters arrive as plain dicts, lists and numbers with interpolations resolved, so that what a model
    saves as its hyper-parameters can be read back safely. Nested `{target, params}` mappings are left for the
    object to instantiate.

    Raises:
        ConfigError: no target, a target that is missing or not allowed, or parameters that do not fit its
            signature. What the constructor itself raises passes through, with a note that names the target.
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
    except OmegaConfBaseException as error:
        raise ConfigError(f"params of target {target}: {error}") from error
    params = {} if params is None else params
    if not isinstance(params, dict):
        raise ConfigError(f"params of target {target} must be a mapping, got {params!r}")
    params = params | extra
    obj = get_obj_from_str(target)
    if problem := find_problem(obj, params):
        raise ConfigError(f"target {target} {problem}")
    try:
        return obj(**params)
    except Exception as error:
        error.add_note(f"(while building the target {target})")
        raise


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import the class or function that a dotted path names, if a configuration may name it.

    `reload` imports its module anew. Raises ConfigError for what is missing or not allowed.
    """
    if not isinstance(string, str) or string.count(".") < 1:
        raise ConfigError(f"a target is a dotted path such as taming.models.vqgan.VQModel, got {string!r}")
    historic = dict(HISTORIC_TARGETS)
    if string in historic:
        module_name, name = historic[string].rsplit(".", 1)
        if name != string.rsplit(".", 1)[1]:
            logger.warning("%s no longer exists: using %s instead", string, historic[string])
        return getattr(_import(module_name, string, reload), name)
    module_name, _, name = string.rpartition(".")
    if module_name in (moved := dict(HISTORIC_MODULES)):
        string = f"{moved[module_name]}.{name}"
    if string.startswith("main."):
        known = [name for name in historic if name.startswith("main.")]
        near = did_you_mean(string, known)
        raise ConfigError(f"target {string!r} is unknown{near}; known: {_names(known)}")
    parts = string.split(".")
    if any(not part.isidentifier() or part.startswith("_") for part in parts):
        raise ConfigError(f"target {string!r} is refused: every part must be a public Python name")
    module_name, name = ".".join(parts[:-1]), parts[-1]
    if not _lies_within(module_name, SAFE_TARGETS + _allowed):  # before the import, which would run its code
        near = _closest_module(".".join(parts[:2])) if parts[0] == "taming" else ""
        raise ConfigError(_refusal(string, parts[0], f"{module_name} is not on the allowed list{near}"))
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
        kind = "is a folder, not a YAML file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"config file {path} {kind}")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"config file {path} must hold a mapping (key: value), not a {root.id}")
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    return loaded if isinstance(loaded, DictConfig) else OmegaConf.create({})


def _load_item(item: str) -> DictConfig:
    """Read one `key.sub=value` from a command line; the value is YAML."""
    key, equals, _ = item.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"{item!r} is not of the form key.sub=value, e.g. model.params.embed_dim=256")
    try:
        return OmegaConf.from_dotlist([item])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the value of {item!r} is not valid YAML: {error}") from error


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
        return OmegaConf.merge(config, addition)
    except (TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source} does not fit what was loaded before it: {error}") from error


def _plain(value: Any) -> Any:
    """Turn OmegaConf nodes, also inside plain containers, into dicts and lists without interpolations.

    Texts that begin with `~/` become paths below the home folder.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return os.path.expanduser(value) if is_home else value


def _lies_within(dotted: str, prefixes: tuple[tuple[str, bool], ...]) -> bool:
    return any(dotted == prefix or dotted.startswith(prefix + ".") for prefix, _ in prefixes)


def _is_callable(obj: Any) -> bool:
    """Tell whether this is a plain class or function, of which the defining module is known."""
    return inspect.isclass(obj) or inspect.isfunction(obj)


def _check_object(target: str, obj: Any) -> None:
    """Refuse whatever is not a class, or a function where those are accepted, defined inside the list."""
    if not _is_callable(obj):
        kind = type(obj).__name__
        raise ConfigError(f"target {target!r} is refused: it is a {kind}, not a class or function")
    home = str(getattr(obj, "__module__", None))
    package = home.split(".")[0]
    listed = SAFE_TARGETS + _allowed
    if not _lies_within(home, listed):
        raise ConfigError(_refusal(target, package, f"it is defined in {home}, not on the allowed list"))
    if inspect.isfunction(obj) and not _lies_within(home, tuple(entry for entry in listed if entry[1])):
        raise ConfigError(_refusal(target, package, f"only classes of {home} may be named, not functions"))


def _refusal(target: str, package: str, reason: str) -> str:
    """Phrase why a target is refused, what would allow it, and what is allowed."""
    remedy = f'if you trust {package}, allow it: --allow {package}, or allow_targets("{package}") from Python'
    if package == "taming":
        remedy = "call it from your own code instead"
    listed = _names(prefix + ".*" for prefix, _ in SAFE_TARGETS + _allowed)
    return f"target {target!r} is refused: {reason}; {remedy}. Allowed now: main.*, {listed}"


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


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
