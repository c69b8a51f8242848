"""Build modules without memory for their parameters, where these come from a file at once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode


class _NoNormal(TorchFunctionMode):
    """Skips normal_ on tensors without memory, for which torch would first import 900 modules (1.7 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.normal_ and args[0].is_meta else func(*args, **(kwargs or {}))


@contextmanager
def hollow_parameters() -> Iterator[None]:
    """Within the block, parameters of modules that this thread builds get no memory (the meta device).

    Buffers and all other tensors are real, since not every one of them comes from a checkpoint.
    """
    thread = threading.get_ident()

    def hollow(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if not hasattr(parameter, "hollow"):  # registered under a second name, it becomes the same again
            empty = torch.empty_like(parameter, device="meta")
            parameter.hollow = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return parameter.hollow

    handle = register_module_parameter_registration_hook(hollow)
    try:
        with _NoNormal():
            yield
    finally:
        handle.remove()


def is_whole(model: nn.Module) -> bool:
    """Tell whether no tensor of a model, registered or a plain attribute, is still without memory."""
    values = [value for module in model.modules() for value in vars(module).values()]
    values += [*model.parameters(), *model.buffers()]
    return not any(isinstance(value, Tensor) and value.is_meta for value in values)
