"""The sections of a training configuration: empty ones are filled in, and keys that nothing reads are errors.

    model:      target, params, base_learning_rate, ema_decay, ema_warmup, freeze
    data:       target, params
    lightning:  trainer, callbacks, modelcheckpoint, logger, seed, compile, activation_checkpointing

A section that is absent, empty or null means the same everywhere: it says nothing. Other keys at the top are
variables, such as `size`, that values refer to as `${size}`.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from taming.config import ConfigError, get_obj_from_str
from taming.parameters import accepted_parameters, did_you_mean, nested_targets

SECTIONS = ("model", "data", "lightning")
OF_LIGHTNING = (
    "trainer", "callbacks", "modelcheckpoint", "logger", "seed", "compile", "activation_checkpointing",
    "threads",
)
OF_MODEL = ("ema_decay", "ema_warmup", "freeze")  # of the model that is trained
BESIDE_TARGET = ("target", "params", "base_learning_rate")  # the last of a model, also where it is a stage
USUAL_CALLBACKS = {  # null in the section `lightning.callbacks` takes one away
    "image_logger": "taming.training.callbacks.ImageLogger",
    "health": "taming.training.callbacks.Health",
    "throughput": "taming.training.callbacks.Throughput",
    "progress": "taming.training.callbacks.Progress",
    "last_checkpoint": "taming.training.callbacks.LastCheckpoint",
}
MODEL_CHECKPOINT = "pytorch_lightning.callbacks.ModelCheckpoint"
VARIABLE = re.compile(r"\$\{\s*([A-Za-z_][\w-]*)")  # the first name in ${name} and ${name.sub}


def complete_sections(config: DictConfig, source: str) -> DictConfig:
    """Return the configuration with every section in place, as a mapping.

    `source` names its files in messages.

    Raises:
        ConfigError: a model or data section without a target; a section that is not a mapping; a key that
            nothing reads, with what is close to it.
    """
    content: Any = OmegaConf.to_container(config)
    check_keys(content)
    for name in ("model", "data"):
        if not isinstance(content.get(name), dict) or not content[name].get("target"):
            raise ConfigError(f"{source}: no section `{name}: {{target: ..., params: ...}}`")
        _fill(content[name], "params", name)
    lightning = _fill(content, "lightning")
    logger = lightning.get("logger")
    if isinstance(logger, dict) and logger and not logger.get("target"):
        raise ConfigError("lightning.logger: nothing reads its params: it has no target")
    for name in ("trainer", "callbacks", "modelcheckpoint", "logger"):
        _fill(lightning, name, "lightning")
    for name, callback in lightning["callbacks"].items():
        if callback is not None:  # null takes one away
            _fill(lightning["callbacks"], name, "lightning.callbacks")
    return OmegaConf.create(content)


def check_keys(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that nothing reads: at the top, in `lightning`, or beside a target."""
    places = {name: f"lightning.{name}" for name in OF_LIGHTNING} | {name: name for name in SECTIONS}
    for name in ("model", "data"):
        places = _places_in(config.get(name), name) | places
    variables = [name for text in _texts(config) for name in VARIABLE.findall(text)]
    _check(config, "", [*SECTIONS, *variables], places)
    lightning = config.get("lightning")
    if isinstance(lightning, Mapping):
        _check(lightning, "lightning.", OF_LIGHTNING, places)
    for path, mapping in [*_usual_targets(lightning), *_targets(config)]:
        beside, params = (*BESIDE_TARGET, *(OF_MODEL if path == "model" else ())), mapping.get("params")
        if path == "model":
            misplaced = {*OF_MODEL} & {*params} if isinstance(params, Mapping) else {}
            for key in sorted({*misplaced} - {*_accepted(mapping)}):
                raise ConfigError(f"nothing reads the key model.params.{key} (did you mean model.{key}?)")
        _check(mapping, f"{path}.", beside, _places_in(mapping, path))
        for name, parameter in _accepted(mapping).items():
            prefix = f"{path}.params.{name}."
            if not isinstance(params, Mapping) or not isinstance(value := params.get(name), Mapping):
                continue
            if nested := nested_targets(parameter.annotation, params):
                known = {key: prefix + key for each in nested for key in accepted_parameters(each)[0]}
                _check(value, prefix, known, known)


def _fill(parent: dict, name: str, path: str = "") -> dict:
    """Put an empty mapping where a section is absent or null, and return the section."""
    if parent.get(name) is None:
        parent[name] = {}
    if not isinstance(parent[name], dict):
        place = f"{path}.{name}".removeprefix(".")
        raise ConfigError(f"{place}: {parent[name]!r} is not a section: write a mapping (key: value) there")
    return parent[name]


def _check(mapping: Mapping[str, Any], prefix: str, known: Iterable[str], places: Mapping[str, str]) -> None:
    for key in mapping:
        if key not in known:
            near, listed = did_you_mean(key, places, places.__getitem__), ", ".join(dict.fromkeys(known))
            raise ConfigError(f"nothing reads the key {prefix}{key}{near}; the keys here are: {listed}")


def _targets(value: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find the mappings that describe an object, at any depth, with their dotted places."""
    if isinstance(value, Mapping):
        misspelt = "params" in value and any(did_you_mean(key, ["target"]) for key in value)
        if path and (isinstance(value.get("target"), str) or misspelt):
            yield path, value
        for key, item in value.items():
            yield from _targets(item, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _targets(item, f"{path}.{number}")


def _usual_targets(lightning: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find the sections whose target need not be written, with it."""
    known = {f"callbacks.{name}": target for name, target in USUAL_CALLBACKS.items()}
    for path, target in {"modelcheckpoint": MODEL_CHECKPOINT, **known}.items():
        section: Any = lightning
        for name in path.split("."):
            section = section.get(name) if isinstance(section, Mapping) else None
        if isinstance(section, Mapping):
            yield f"lightning.{path}", {"target": target, **section}


def _places_in(mapping: Any, path: str) -> dict[str, str]:
    """Where each key that a description of an object may have belongs."""
    accepted = {name: f"{path}.params.{name}" for name in _accepted(mapping)}
    of_model = OF_MODEL if path == "model" else ()
    return {name: f"{path}.{name}" for name in of_model} | accepted | {
        name: f"{path}.{name}" for name in BESIDE_TARGET
    }


def _accepted(mapping: Any) -> dict[str, inspect.Parameter]:
    """The parameters of what a description of an object names; none where that cannot be found."""
    try:
        return accepted_parameters(get_obj_from_str(mapping["target"]))[0]
    except (ConfigError, KeyError, TypeError):
        return {}


def _texts(value: Any) -> Iterator[str]:
    """All texts in a nested configuration."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)
