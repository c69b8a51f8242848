"""Load a state dict into a module: all of it or nothing, with a report of what was left out."""

import logging
import re
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("taming.checkpoint")  # one name for the reports of the whole package

# What other software puts before the names of weights, and what becomes of the other names beside them.
PREFIXES = {
    "module.": "kept",  # DataParallel, DistributedDataParallel
    "_orig_mod.": "kept",  # torch.compile; it stands inside of names as well
    "first_stage_model.": "dropped",  # the tokenizer in the file of a transformer or a diffusion model
    "model_ema.": "replaced",  # running averages, of latent diffusion for instance: see take_averages
}
AVERAGES = "model_ema."
COUNTERS = ("decay", "num_updates")  # of the averaging; nothing to load


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did: how many tensors it loaded, and which keys were left out, and why."""

    source: str
    module: str
    loaded: int
    ignored: tuple[str, ...] = ()  # in the file, and to be ignored
    unexpected: tuple[str, ...] = ()  # in the file, optional, and not in the model
    missing: tuple[str, ...] = ()  # in the model, optional, and not in the file
    kept: tuple[str, ...] = ()  # in the model, to be ignored: as initialised
    prefixes: tuple[str, ...] = ()  # of names in the file, that names in the model do not have

    def __str__(self) -> str:
        lists = {
            "without the prefix": self.prefixes, "ignored": self.ignored, "kept as initialised": self.kept,
            "not in the model": self.unexpected, "not in the file": self.missing,
        }
        parts = [f"; {reason}: {some_of(keys)}" for reason, keys in lists.items() if keys]
        return f"loaded {self.loaded} tensors from {self.source} into {self.module}{''.join(parts)}"


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    ignore: str | Sequence[str] = (),
    optional: Sequence[str] = (),
    assign: bool = False,
) -> LoadReport:
    """Load a state dict into a module, all of it or nothing, and log what was left out.

    Names with one of PREFIXES are understood where the module's have none.

    Args:
        source: where the weights come from, for messages.
        ignore: keys of `state` to leave out, whatever their shapes; those of the module stay as initialised.
            An entry is a prefix (`loss.`) or a regular expression for a key.
        optional: keys, in the same notation, that may be in one of `state` and module alone.
        assign: put the tensors of `state` themselves in place of the module's, with the dtype and device of
            those. An optimizer that was built before would go on with the old ones.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ. The message lists them, and the words
            for `ignore_keys` that would leave them out; nothing was changed.
    """
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    plain, prefixes, dropped = _without_prefixes(state, module)
    errors: list[str] = []
    if any(key.startswith(AVERAGES) for key in plain) and not hasattr(module, AVERAGES.rstrip(".")):
        plain, prefixes = dict(plain), (*prefixes, AVERAGES)
        take_averages(module, plain, "", {}, True, [], [], errors)
    wanted = OrderedDict((key, value) for key, value in plain.items() if not _matches(key, ignore))
    ignored = (*dropped, *(key for key in plain if key not in wanted))
    if plain is state and hasattr(state, "_metadata"):
        wanted._metadata = state._metadata  # type: ignore[attr-defined]  # versions, for load hooks of layers
    before = list(_slots(module))
    try:
        absent, unexpected, others = _exchange(module, wanted)
        errors += others
        kept = tuple(key for key in absent if _matches(key, ignore))
        missing = [key for key in absent if key not in kept]
        lacking = [key for key in missing if not _matches(key, optional)]
        strange = [key for key in unexpected if not _matches(key, optional)]
        if lacking or strange or errors:
            names = {*module.state_dict(), *plain}
            raise ValueError(_mismatch(type(module).__name__, str(source), lacking, strange, errors, names))
    except BaseException:
        for owner, name, tensor in before:
            setattr(owner, name, tensor)
        raise
    _settle(before, assign)
    report = LoadReport(
        str(source), type(module).__name__,
        len(module.state_dict()) - len(absent),  # load hooks may have dropped some of the file's
        ignored, tuple(unexpected), tuple(missing), kept, prefixes,
    )
    logger.info("%s", report)
    return report


def take_averages(
    module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: dict[str, Any], _strict: bool,
    _missing: list[str], _unexpected: list[str], errors: list[str],
) -> None:
    """Put running averages in place of the weights that they belong to, in a state dict on its way in.

    This is a load hook of torch. The names of averages have lost the dots, so they are found by the names of
    the file's weights and the module's. One that belongs to nothing stays, and is unexpected.
    """
    mark = prefix + AVERAGES
    averages = {key.removeprefix(mark).replace(".", ""): key for key in state if key.startswith(mark)}
    if not averages:
        return
    weights = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    parameters = {name for name, _ in module.named_parameters()}
    by_short_name = defaultdict(set)
    for name in weights | parameters:
        if not name.startswith(AVERAGES):
            by_short_name[name.replace(".", "")].add(name)
    taken = set()
    for short, key in averages.items():
        found = by_short_name[short]
        if key.removeprefix(mark) in COUNTERS:
            del state[key]
        elif len(found) == 1:
            state[prefix + next(iter(found))] = state.pop(key)
            taken |= found
    lacking = sorted(name for name in parameters - taken if not name.startswith("loss."))
    if lacking:
        errors.append(f"model_ema has averages, but none of {', '.join(lacking[:5])}")
    logger.info("%d weights are their running averages (model_ema)", len(taken))


def _without_prefixes(
    state: Mapping[str, Tensor], module: nn.Module
) -> tuple[Mapping[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Rename the keys of a state dict where more of them are names of the module then, or all have a prefix.

    Returns the state dict, the prefixes that were removed, and the keys that were dropped on the way.
    """
    names = module.state_dict().keys()
    removed: list[str] = []
    dropped: list[str] = []
    for prefix in [*PREFIXES][:3] * 2:  # one may stand before another: module.first_stage_model.
        inside = prefix == "_orig_mod."
        having = [key for key in state if key.startswith(prefix) or (inside and prefix in key)]
        if not having or any(name.startswith(prefix) for name in names):
            continue
        chosen = [*state] if PREFIXES[prefix] == "kept" else having
        new = {key.replace(prefix, "") if inside else key.removeprefix(prefix): state[key] for key in chosen}
        gain = len(names & new.keys()) - len(names & state.keys())
        if gain > 0 or (gain == 0 and (inside or len(having) == len(state))):
            dropped += [key for key in state if key not in chosen]
            removed.append(prefix)
            state = new
    return state, tuple(removed), tuple(dropped)


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield every place of a module tree that holds a parameter or buffer: owner, attribute, tensor."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield owner, name, parameter
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
            yield owner, name, buffer


def _exchange(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Put the tensors of `state` in place of the module's; return missing keys, unexpected keys, errors.

    load_state_dict itself compares the keys, since load hooks beside the layers may rename or drop some.
    """
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []

    def note(_module: nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)
        unexpected.extend(keys.unexpected_keys)

    handle = module.register_load_state_dict_post_hook(note)  # is called even if shapes are wrong
    try:
        module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        first, *lines = str(error).splitlines()
        if not first.startswith("Error(s) in loading state_dict"):
            raise
        errors.extend(line.strip() for line in lines)
    finally:
        handle.remove()
    return missing, unexpected, errors


def _settle(before: Iterable[tuple[nn.Module, str, Tensor]], assign: bool) -> None:
    """End an exchange: give the new tensors the old dtype, device and ties, or copy them into the old."""
    final: dict[int, Tensor] = {}
    for owner, name, old in before:
        new = getattr(owner, name, old)
        if new is old:
            continue
        if assign:
            value = new.detach().to(dtype=old.dtype, device=old.device)
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(owner, name, final.setdefault(id(old), value))  # tied weights stay tied
        else:
            with torch.no_grad():
                old.copy_(new)
            setattr(owner, name, old)


def _mismatch(
    module: str, source: str, missing: list[str], unexpected: list[str], errors: list[str],
    names: Collection[str],
) -> str:
    pattern = r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)"
    shapes = [re.search(pattern, line) for line in errors]
    lists = {
        "missing in the file": missing,
        "unexpected in the file": unexpected,
        "shape mismatch": [f"{found[1]}: file ({found[2]}), model ({found[3]})" for found in shapes if found],
        "other errors": [line for line, found in zip(errors, shapes, strict=True) if not found],
    }
    found = "; ".join(f"{reason}: {some_of(keys)}" for reason, keys in lists.items() if keys)
    wrong = {*missing, *unexpected, *(found[1] for found in shapes if found)}
    hint = ""
    if wrong and 2 * len(wrong) < len(names):  # else it is another model
        hint = f"; to start from the rest of the file: ignore_keys=[{','.join(_words(wrong, names))}]"
    return (
        f"the weights in {source} do not fit {module}; nothing was loaded; {found}. The file belongs to "
        f"another model, or the config is not the one it was trained with: change either{hint}"
    )


def _words(keys: Collection[str], names: Collection[str]) -> list[str]:
    """Find the shortest prefixes, ending in a dot, that cover these keys and no other of the names."""
    words = []
    others = [name for name in names if name not in keys]
    for key in keys:
        parts = key.split(".")
        prefixes = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
        words.append(next((p for p in prefixes if not any(name.startswith(p) for name in others)), key))
    return sorted(set(words))


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(key.startswith(pattern) or _is_match(pattern, key) for pattern in patterns)


def _is_match(pattern: str, key: str) -> bool:
    try:
        return re.fullmatch(pattern, key) is not None
    except re.error:  # a prefix that is not a regular expression
        return False


def some_of(keys: Iterable[Any], count: int = 5) -> str:
    """Give the number of keys, and the first of them: `7 (a; b; c; d; e; ...)`."""
    keys = [str(key) for key in keys]
    return f"{len(keys)} ({'; '.join(keys[:count])}{'; ...' if len(keys) > count else ''})"
