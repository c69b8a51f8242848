"""Keep configurations of strangers small and without effects: limits on their size, and no resolvers.

A few hundred bytes of YAML can stand for gigabytes, by aliases (`*a`) or by interpolations (`${a}`) of things
that are such references themselves. A resolver (`${oc.env:HOME}`) runs code when it is read.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml

MAX_VALUES = 20_000  # with every reference written out; the largest config of this package has 300
MAX_DEPTH = 50  # levels of mappings and lists inside each other
MAX_INTERPOLATIONS = 1_000  # `${...}` in one configuration
MAX_TEXT = 1_000  # characters of a text with interpolations
MAX_NESTING = 4  # of interpolations inside each other

Path = tuple[str | int, ...]


def check_size(value: Any) -> None:
    """Raise ValueError where YAML nodes, or dicts and lists, stand for too many values; see the limits above.

    The message continues a sentence that begins with the name of the file. The time does not depend on how
    often something is referred to.
    """
    sizes: dict[int, int] = {}
    opened: set[int] = set()
    interpolations = 0

    def size_of(node: Any, depth: int) -> int:
        nonlocal interpolations
        if isinstance(node, yaml.ScalarNode):
            node = node.value
        if isinstance(node, str):
            interpolations += node.count("${")
            if "${" in node:
                _check_text(node)
            return 1 + len(node) // 100
        if not isinstance(node, yaml.CollectionNode | Mapping | list | tuple):
            return 1
        if id(node) in opened:
            raise ValueError("contains itself")
        if depth > MAX_DEPTH:
            raise ValueError(f"has more than {MAX_DEPTH} levels")
        if id(node) not in sizes:
            opened.add(id(node))
            sizes[id(node)] = 1 + sum(size_of(child, depth + 1) for child in _children(node))
            opened.remove(id(node))
        if sizes[id(node)] > MAX_VALUES:
            raise ValueError(f"stands for more than {MAX_VALUES:,} values")
        return sizes[id(node)]

    size_of(value, 0)
    if interpolations > MAX_INTERPOLATIONS:
        raise ValueError(f"has more than {MAX_INTERPOLATIONS:,} interpolations")


def check_interpolations(config: Any) -> None:
    """Raise ValueError where dicts and lists would be too large, or endless, with their interpolations
    resolved.

    `config` has passed `check_size`. Interpolations that lead nowhere are left to OmegaConf to report.
    """
    sizes: dict[Path, int | None] = {}  # None: being counted

    def size_at(path: Path, value: Any) -> int:
        if not isinstance(value, dict | list) and not (isinstance(value, str) and "${" in value):
            return 1
        known = sizes.get(path, 0)
        if known is None:
            raise ValueError(f"refers to itself at {'.'.join(map(str, path))}")
        if known:
            return known
        sizes[path] = None
        if isinstance(value, str):
            places = [_lookup(config, target) for target in _targets(value, path[:-1])]
        else:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            places = [((*path, key), item) for key, item in items]
        size = 1
        for place in places:
            size += size_at(*place)
            if size > MAX_VALUES:
                raise ValueError(f"stands for more than {MAX_VALUES:,} values, interpolations resolved")
        sizes[path] = size
        return size

    try:
        size_at((), config)
    except RecursionError:
        raise ValueError("has a chain of interpolations that is too long") from None


def without_resolvers(value: Any, allowed: Collection[str] = ()) -> Any:
    """Copy dicts and lists, with texts changed so that OmegaConf keeps their resolvers as text:
    `\\${oc.env:HOME}`.

    Resolvers in `allowed` stay as they are. Ordinary interpolations always do.
    """
    if isinstance(value, dict):
        return {key: without_resolvers(item, allowed) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_resolvers(item, allowed) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    for start, content in reversed(list(_interpolations(value))):
        if set(_resolvers(content)) - set(allowed):
            end = start + len("${") + len(content)  # what is inside must not be called either
            literal = re.sub(r"(\\*)\$\{", _escape, value[start:end])
            value = value[:start] + literal + value[end:]
    return value


def _escape(opening: re.Match) -> str:
    """Return backslashes and `${` with an odd number of backslashes, which OmegaConf keeps as text."""
    return opening[0] if len(opening[1]) % 2 else "\\" + opening[0]


def resolvers_in(text: str) -> list[str]:
    """List the resolvers that a text, read literally, would call: `["oc.env"]`."""
    return [name for _, content in _interpolations(text) for name in _resolvers(content)]


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            yield key
            yield item
    elif isinstance(node, Mapping):
        yield from node.keys()
        yield from node.values()
    else:
        yield from node.value if isinstance(node, yaml.SequenceNode) else node


def _check_text(text: str) -> None:
    deepest = depth = 0
    for brace in re.findall(r"\$\{|\}", text):
        depth = max(0, depth - 1) if brace == "}" else depth + 1
        deepest = max(deepest, depth)
    if len(text) > MAX_TEXT or deepest > MAX_NESTING:
        raise ValueError(
            f"has a text with interpolations of {len(text)} characters, nested {deepest} deep, where "
            f"{MAX_TEXT} and {MAX_NESTING} are the most"
        )


def _interpolations(text: str) -> Iterator[tuple[int, str]]:
    """Yield where each outermost `${...}` that is not escaped begins, and what stands between its braces."""
    position = 0
    while (start := text.find("${", position)) >= 0:
        backslashes = len(text[:start]) - len(text[:start].rstrip("\\"))
        position = start + 2
        if backslashes % 2:
            continue
        depth, end = 1, position
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        yield start, text[position : end - 1 if depth == 0 else end]
        position = end


def _resolver_of(content: str) -> str | None:
    """Name the resolver that an interpolation with this content calls, if it is a call: `name:arguments`."""
    depth = 0
    for i, character in enumerate(content):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == ":" and depth == 0:
            return content[:i].strip()
    return None


def _resolvers(content: str) -> list[str]:
    """Name the resolvers of an interpolation with this content: its own, and those inside it."""
    own = _resolver_of(content)
    inner = [name for _, part in _interpolations(content) for name in _resolvers(part)]
    return inner if own is None else [own, *inner]


def _targets(text: str, parent: Path) -> Iterator[Path]:
    """Yield the places that the interpolations of a text refer to; of `${a.${b}}` all of `a`."""
    for _, content in _interpolations(text):
        yield from _targets(content, parent)
        if _resolver_of(content) is not None:
            continue  # kept as text, or allowed by the caller
        fixed, computed, _ = content.partition("${")
        keys = [key for key in re.split(r"[.\[\]]+", fixed) if key]
        if computed and not fixed.endswith((".", "[")):
            keys = keys[:-1]
        dots = len(fixed) - len(fixed.lstrip("."))
        base = parent[: len(parent) - dots + 1] if dots else ()
        yield (*base, *keys)


def _lookup(config: Any, path: Path) -> tuple[Path, Any]:
    """Find what lies at a path; an interpolation on the way stands for all behind it."""
    value, found = config, []
    for key in path:
        if isinstance(value, list) and str(key).isdecimal() and int(key) < len(value):
            key = int(key)
        elif not (isinstance(value, dict) and key in value):
            break
        value = value[key]  # type: ignore[index]
        found.append(key)
    return (tuple(found), value) if isinstance(value, str) or len(found) == len(path) else ((), 0)
