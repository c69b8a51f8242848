"""Build modules without the time and memory of initialising parameters whose values come from a file."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

MAX_CALLS = 200_000  # of torch, while one model is built: 3 s; a GPT of 48 layers makes 6,000
_SIZED = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)  # factories that take a shape
_COUNTED = (torch.arange, torch.randperm, torch.eye)  # factories that take a number


class DeferredInit(TorchFunctionMode):
    """Within the block, put off the initialisation of parameters of the modules that this thread builds.

    Parameters get memory, which the system provides when it is first written to, but in-place operations on
    them (`normal_`, `fill_`, ...) are recorded instead of run. Buffers and all other tensors are computed,
    since not every one of them comes from a file. After the block, load values with `assign=True`, and call
    `finish`.

    Args:
        max_bytes: the block raises ValueError where tensors of more bytes are asked for, all together, or
            MAX_CALLS is exceeded: a small file may describe a model of any size.
    """

    def __init__(self, max_bytes: int):
        super().__init__()
        self._left, self._calls = max_bytes, 0
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

    @torch.no_grad()
    def finish(self, module: nn.Module) -> None:
        """Initialise those parameters of a module that were built in the block and got no other values."""
        for parameter in module.parameters():
            for operation in self._recorded.pop(_address(parameter), ()):
                operation()
        self._parameters.clear()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes it by name
        if isinstance(target, Tensor) and _changes_it(func) and _address(target) in self._recorded:
            self._recorded[_address(target)].append(partial(func, *args, **kwargs))
            return target
        self._count()
        self._left -= 4 * _elements(func, args, kwargs)
        if self._left < 0:
            raise ValueError("it describes a model that is far larger than the weights that are there")
        return func(*args, **kwargs)

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


def _changes_it(func: Any) -> bool:
    """Tell whether a function writes to its first argument: `normal_`, `__setitem__`, `__imul__`."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
    return name.endswith("_") and name != "requires_grad_"


def _elements(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Count the elements of the tensor that a factory function is about to make."""
    if func not in _SIZED and func not in _COUNTED:
        return 0
    shape = (*args, *kwargs.get("size", ()))
    flat = [number for arg in shape for number in (arg if isinstance(arg, Sequence) else [arg])]
    numbers = [number for number in flat if isinstance(number, int)]
    if func in _COUNTED:
        return max(map(abs, numbers), default=0) ** (2 if func is torch.eye else 1)
    return math.prod(numbers)
