"""Load a state dict into a module: all of it or nothing, with a report of what was left out."""

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("taming.checkpoint")  # whose work this is: one name for reports of both files


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did: how many tensors it loaded, and which keys were left out, and why."""

    source: str
    module: str
    loaded: int
    ignored: tuple[str, ...] = ()  # in the file, and to be ignored
    left_over: tuple[str, ...] = ()  # in the file, optional, and not in the model
    missing: tuple[str, ...] = ()  # in the model, optional, and not in the file

    def __str__(self) -> str:
        lists = {"ignored": self.ignored, "not in the model": self.left_over, "not in the file": self.missing}
        parts = [f"; {reason}: {some_of(keys)}" for reason, keys in lists.items() if keys]
        return f"loaded {self.loaded} tensors from {self.source} into {self.module}{''.join(parts)}"


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str | Path,
    ignore: Sequence[str] = (),
    optional: Sequence[str] = (),
    assign: bool = False,
) -> LoadReport:
    """Load a state dict into a module, all of it or nothing, and log what was left out.

    Args:
        source: where the weights come from, for messages.
        ignore: keys of `state` to drop; an entry is a prefix (`loss.`) or a regular expression for a key.
        optional: keys, in the same notation, that may be in one of `state` and module alone; reported, too.
        assign: put the tensors of `state` themselves (which may lie on disk) in place of the module's, with
            the dtype and device of those. An optimizer that was built before would go on with the old ones.

    Raises:
        ValueError: keys are missing, left over or misshapen. The message lists them; nothing was changed.
    """
    report = fill(module, state, source=str(source), ignore=ignore, optional=optional, assign=assign)
    logger.info("%s", report)
    return report


def fill(
    module: nn.Module, state: Mapping[str, Tensor], *,
    source: str, ignore: Sequence[str], optional: Sequence[str], assign: bool,
) -> LoadReport:
    """Do what `load_weights` says, but log nothing: exchange tensors, which can be undone, then copy."""
    ignored = tuple(key for key in state if _matches(key, ignore))
    wanted = OrderedDict((key, value) for key, value in state.items() if not _matches(key, ignore))
    if hasattr(state, "_metadata"):
        wanted._metadata = state._metadata  # versions, for the load hooks of layers
    before = list(_slots(module))
    try:
        missing, left_over, errors = _exchange(module, wanted)
        lacking = [key for key in missing if not _matches(key, optional)]
        strange = [key for key in left_over if not _matches(key, optional)]
        if lacking or strange or errors:
            raise ValueError(_mismatch(type(module).__name__, source, lacking, strange, errors))
    except BaseException:
        for owner, name, tensor in before:
            setattr(owner, name, tensor)
        raise
    _settle(before, assign)
    loaded = len(module.state_dict()) - len(missing)  # load hooks may have dropped some of the file's
    return LoadReport(source, type(module).__name__, loaded, ignored, tuple(left_over), tuple(missing))


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield every place of a module tree that holds a parameter or buffer: owner, attribute, tensor."""
    for owner in module.modules():
        for name, tensor in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield owner, name, tensor
        for name, tensor in owner.named_buffers(recurse=False, remove_duplicate=False):
            yield owner, name, tensor


def _exchange(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Put the tensors of `state` in place of the module's; return missing keys, left-over keys, errors.

    load_state_dict itself compares the keys, since load hooks beside the layers may rename or drop some.
    """
    missing: list[str] = []
    left_over: list[str] = []
    errors: list[str] = []

    def note(_module: nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)
        left_over.extend(keys.unexpected_keys)

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
    return missing, left_over, errors


def _settle(before: Iterable[tuple[nn.Module, str, Tensor]], assign: bool) -> None:
    """End an exchange: give the new tensors the old dtype, device and ties, or copy them into the old."""
    final: dict[int, Tensor] = {}
    for owner, name, old in before:
        new = getattr(owner, name, old)
        if new is old:
            continue
        if assign or old.is_meta:
            value = new.detach().to(dtype=old.dtype, device=new.device if old.is_meta else old.device)
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value, requires_grad=old.requires_grad)
            setattr(owner, name, final.setdefault(id(old), value))  # tied weights stay tied
        else:
            with torch.no_grad():
                old.copy_(new)
            setattr(owner, name, old)


def _mismatch(module: str, source: str, missing: list[str], left_over: list[str], errors: list[str]) -> str:
    pattern = r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)"
    shapes = [re.search(pattern, line) for line in errors]
    lists = {
        "missing in the file": missing,
        "left over in the file": left_over,
        "misshapen": [f"{found[1]}: file ({found[2]}), model ({found[3]})" for found in shapes if found],
        "other errors": [line for line, found in zip(errors, shapes, strict=True) if not found],
    }
    found = "\n".join(f"  {reason}: {some_of(keys)}" for reason, keys in lists.items() if keys)
    return (
        f"the weights in {source} do not fit {module}; nothing was loaded:\n{found}\n"
        "The file belongs to another model, or the config is not the one it was trained with: change either."
    )


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(key.startswith(pattern) or re.fullmatch(pattern, key) for pattern in patterns)


def some_of(keys: Iterable[Any], count: int = 5) -> str:
    """How many keys there are, and the first of them: `7 (a; b; c; d; e; ...)`."""
    keys = [str(key) for key in keys]
    return f"{len(keys)} ({'; '.join(keys[:count])}{'; ...' if len(keys) > count else ''})"
