"""Build modules without the time and memory of initialising parameters whose values come from a file."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

MAX_CALLS = 100_000  # of torch, while one model is built: 2 s; a GPT of 48 layers makes 6,000
# Functions that do not depend on the values of their arguments; building a network calls them all the time.
WITHOUT_VALUES = frozenset((
    "__get__", "__getitem__", "__hash__", "data_ptr", "detach", "dim", "element_size", "is_contiguous",
    "is_floating_point", "new_empty", "new_tensor", "numel", "requires_grad_", "size", "storage_offset",
    "stride", "untyped_storage", "view", "view_as",
))
BYTES_OF_A_THREAD = 80 << 20  # of addresses: its stack, and what malloc reserves
_STATM = Path("/proc/self/statm")
_limit_lock = threading.RLock()


class DeferredInit(TorchFunctionMode):
    """Within the block, put off the initialisation of parameters of the modules that this thread builds.

    Parameters get memory, which the system provides when it is first written to, but in-place operations on
    them (`normal_`, `fill_`, ...) are recorded instead of run. Buffers and all other tensors are computed,
    since not every one of them comes from a file. After the block, load values with `assign=True`, and call
    `finish`.

    The block raises ValueError after MAX_CALLS, since a small file may describe a model of any size.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = 0
        self._thread = threading.get_ident()
        self._recorded: dict[int, list[Callable[[], Any]]] = {}  # address of a parameter's data -> operations
        self._parameters: list[nn.Parameter] = []  # kept, so that no other tensor gets such an address
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks = [
            register_module_parameter_registration_hook(self._register),
            register_module_module_registration_hook(self._count),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def finish(self, module: nn.Module) -> None:
        """Initialise those parameters of a module that were built in the block and got no other values."""
        self._run(module.parameters())
        self._parameters.clear()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes it by name
        parameters = [tensor for tensor in _tensors((args, kwargs)) if _address(tensor) in self._recorded]
        if _changes_it(func) and len(parameters) == 1 and parameters[0] is target:
            self._recorded[_address(target)].append(partial(func, *args, **kwargs))
            return target
        if getattr(func, "__name__", "") not in WITHOUT_VALUES:
            self._run(parameters)
        self._count()
        return func(*args, **kwargs)

    @torch.no_grad()
    def _run(self, tensors: Iterable[Tensor]) -> None:
        """Run what was put off for tensors: in the end, or when their values are asked for.

        `trunc_normal_` does so, and a copy of a network.
        """
        for tensor in tensors:
            if operations := self._recorded.get(_address(tensor)):
                self._recorded[_address(tensor)] = []
                for operation in operations:
                    operation()

    def _register(self, _module: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        if threading.get_ident() == self._thread and parameter.numel():
            self._recorded.setdefault(_address(parameter), [])
            self._parameters.append(parameter)

    def _count(self, *_: object) -> None:
        self._calls += 1
        if self._calls > MAX_CALLS and threading.get_ident() == self._thread:
            raise ValueError(f"it describes a model that takes over {MAX_CALLS:,} steps to build")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, at any depth of lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _changes_it(func: Any) -> bool:
    """Tell whether a function writes to its first argument: `normal_`, `__setitem__`, `__imul__`."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
    return name.endswith("_") and name != "requires_grad_"


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Within the block, let the process have `extra` bytes more; beyond them MemoryError is raised.

    It is a limit on addresses, with some for new threads. Systems that have no such limit, Windows for
    instance, go without one. Other threads are under it as well, for the short time of building a model.
    """
    if resource is None or not _STATM.exists():
        yield
        return
    with _limit_lock:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        now = int(_STATM.read_text().split()[0]) * resource.getpagesize()
        limit = now + extra + BYTES_OF_A_THREAD * (os.cpu_count() or 1)
        if soft != resource.RLIM_INFINITY:
            limit = min(limit, soft)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
