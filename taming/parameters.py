"""Check parameters, as YAML files and command lines give them, against the signature that they are for.

A parameter must have a known name, a value of the annotated type, and lie in the annotated range. Ranges, and
the signatures of nested mappings, are part of the annotation:

    def __init__(self, n_embed: PositiveInt, ddconfig: Annotated[dict, ParametersOf(Encoder)]): ...
"""

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Annotated, Any, Literal, Union


@dataclass(frozen=True)
class Range:
    """Metadata of an annotation: a finite number from `least` (or above it) to `most`."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # `least` itself is not allowed

    def holds(self, value: float) -> bool:
        """Tell whether a number lies in the range."""
        return math.isfinite(value) and self.least <= value <= self.most and not (
            self.above and value == self.least
        )

    def __str__(self) -> str:
        if math.isfinite(self.most):
            return f"from {self.least} to {self.most}"
        return f"above {self.least}" if self.above else f"of at least {self.least}"


@dataclass(frozen=True)
class Length:
    """Metadata of an annotation: a list of at least so many elements."""

    least: int

    def holds(self, value: Sequence[Any]) -> bool:
        """Tell whether a list is long enough."""
        return len(value) >= self.least

    def __str__(self) -> str:
        return f"(at least {self.least} of them)"


class ParametersOf:
    """Metadata of an annotation: a mapping that holds parameters of these classes or functions together.

    Those of `named_by`, parameters beside the mapping, are `{target, params}` of others in their place, in
    the same order. What these accept is checked when they are built.
    """

    def __init__(self, *targets: Callable[..., Any], named_by: Sequence[str] = ()):
        self.targets, self.named_by = targets, named_by

    def among(self, parameters: Mapping[str, Any]) -> list[Callable[..., Any]]:
        """Return the targets, unless the parameters name another for one of them: then nothing is known."""
        others = (parameters.get(name) for name in self.named_by)
        named = any(isinstance(other, Mapping) and other.get("target") is not None for other in others)
        return [] if named else [*self.targets]


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
AtLeastMinusOne = Annotated[int, Range(-1)]  # -1: without limit, or off
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]

BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
NAMES_OF_TYPES = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "null",
}
CHECKED_PACKAGES = ("taming", "pytorch_lightning")  # whose annotations say what their code takes


def find_problem(target: Callable[..., Any], parameters: Mapping[str, Any], prefix: str = "") -> str | None:
    """Say in one line what is wrong with the parameters of a class or function; None if nothing is.

    The answer continues a sentence that begins with the name of the target. Types and ranges are checked for
    targets of this package and of Lightning; those of other packages may annotate loosely. `prefix` stands
    before the names.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return None
    accepted, is_open = accepted_parameters(target)
    listed = f"it accepts: {', '.join(accepted) or 'nothing'}"
    unknown = [name for name in parameters if name not in accepted]
    if unknown and not is_open:
        named = ", ".join(f"'{prefix}{name}'{did_you_mean(name, accepted)}" for name in unknown)
        return f"does not accept {named}; {listed}"
    required = [p.name for p in signature.parameters.values() if p.kind in BY_NAME and p.default is p.empty]
    missing = [f"'{prefix}{name}'" for name in required if name not in parameters]
    if missing:
        return f"needs {', '.join(missing)} in its params; {listed}"
    if str(getattr(target, "__module__", "")).split(".")[0] not in CHECKED_PACKAGES:
        return None
    for name, value in parameters.items():
        if name not in accepted or (value is None and accepted[name].default is None):
            continue
        if wrong := mismatch(value, accepted[name].annotation):
            return f"does not accept {prefix}{name}: {value!r}; it must be {wrong}"
        if isinstance(value, Mapping):
            for nested in nested_targets(accepted[name].annotation, parameters):
                if wrong := find_problem(nested, value, f"{prefix}{name}."):
                    return wrong
    return None


def accepted_parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters that may be given by name, and whether others may be given too.

    A class of this package that takes `**kwargs` passes them to its parent, by convention, whose names count,
    or to the class that its attribute OPTIONS names.
    """
    init = getattr(target, "__init__", None)
    origin = getattr(init, "__module__", ""), getattr(init, "__qualname__", "")
    if inspect.isclass(target) and origin == ("torch.nn.modules.module", "Module.__init__"):
        return {}, False  # a network without a constructor: the signature is open, but nothing is accepted
    functions: list[Any] = [target]
    if inspect.isclass(target):
        of_ours = target.__module__.startswith("taming.")
        bases = [*target.__mro__[:-1], *getattr(target, "OPTIONS", object).__mro__]
        inits = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)]
        functions = inits if of_ours else inits[:1] or functions
    accepted: dict[str, inspect.Parameter] = {}
    is_open = True
    for number, function in enumerate(functions):
        parameters = inspect.signature(function if number else target).parameters.values()
        hints = _type_hints(function)
        for parameter in parameters:
            if parameter.kind in BY_NAME and parameter.name != "self":
                annotated = parameter.replace(annotation=hints.get(parameter.name, Any))
                accepted.setdefault(parameter.name, annotated)
        is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        if not is_open:
            break
    return accepted, is_open


def mismatch(value: Any, annotation: Any) -> str | None:
    """Say what a value must be to fit an annotation; None if it fits. Other objects always fit."""
    return None if _fits(value, annotation) else _describe(annotation)


def did_you_mean(name: str, candidates: Iterable[str], shown: Callable[[str], str] = str) -> str:
    """Phrase the names closest to a misspelt one as a question in brackets, or return an empty text.

    `shown` gives what to print for a name.
    """
    matches = difflib.get_close_matches(str(name), list(candidates), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(shown, matches))}?)" if matches else ""


def _type_hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that only type checkers import
        return {}


def _parts(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split an annotation into origin and arguments: list[int] into list and (int,)."""
    return typing.get_origin(annotation) or annotation, typing.get_args(annotation)


def _is_union(origin: Any) -> bool:
    return origin in (Union, types.UnionType)


def nested_targets(annotation: Any, parameters: Mapping[str, Any]) -> list[Callable[..., Any]]:
    """Return the targets of `ParametersOf` in an annotation of one of the parameters; see `among`."""
    origin, args = _parts(annotation)
    if _is_union(origin):
        return [target for arg in args for target in nested_targets(arg, parameters)]
    extras = (extra for extra in args[1:] if isinstance(extra, ParametersOf))
    return [target for extra in extras for target in extra.among(parameters)]


def _fits(value: Any, annotation: Any) -> bool:
    origin, args = _parts(annotation)
    if origin is Annotated:
        ranges = [extra for extra in args[1:] if isinstance(extra, Range | Length)]
        return _fits(value, args[0]) and all(each.holds(value) for each in ranges)
    if _is_union(origin):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin in (bool, str, type(None)):
        return isinstance(value, origin)
    if not inspect.isclass(origin) or origin in (Any, object):
        return True  # Any, a type variable
    if issubclass(origin, PathLike):
        return isinstance(value, str | PathLike)
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if issubclass(origin, Collection) or origin in (Iterable, Sequence):
        is_list = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
        return is_list and _elements_fit(value, origin, args)
    is_plain = value is None or isinstance(value, bool | int | float | str | list | tuple | dict)
    return not is_plain or getattr(origin, "_is_protocol", False) or isinstance(value, origin)


def _elements_fit(values: Iterable[Any], origin: Any, args: tuple[Any, ...]) -> bool:
    if not args or not isinstance(values, Sequence):
        return True
    if origin is tuple and args[-1] is not Ellipsis:
        return len(values) == len(args) and all(map(_fits, values, args))
    return all(_fits(value, args[0]) for value in values)


def _describe(annotation: Any) -> str:
    origin, args = _parts(annotation)
    if origin is Annotated:
        ranges = [f" {extra}" for extra in args[1:] if isinstance(extra, Range | Length)]
        return _describe(args[0]) + "".join(ranges)
    if _is_union(origin):
        choices = [arg for arg in args if typing.get_origin(arg) is Literal]
        values = [value for arg in choices for value in typing.get_args(arg)]
        parts = [_describe(Literal[tuple(values)])] if values else []
        return " or ".join(dict.fromkeys([*parts, *(_describe(arg) for arg in args if arg not in choices)]))
    if origin is Literal:
        return "one of " + ", ".join(dict.fromkeys(map(str, args)))
    if origin in NAMES_OF_TYPES:
        return NAMES_OF_TYPES[origin]
    if not inspect.isclass(origin):
        return str(origin)
    if issubclass(origin, PathLike):
        return "a path"
    if issubclass(origin, Mapping):
        return "a mapping (key: value)"
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)} ({', '.join(map(_describe, args))})"
    if issubclass(origin, Collection) or origin in (Iterable, Sequence):
        return f"a list, each element {_describe(args[0])}" if args else "a list"
    return f"a {origin.__name__}"
