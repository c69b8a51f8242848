"""Compile the blocks of a model, or compute them again in the backward pass to save memory.

    lightning:
      compile: true                    # torch.compile, of each block by itself
      activation_checkpointing: true   # keep the inputs of blocks only (Chen et al. 2016)

`ImageModel.blocks` names the blocks. Names in checkpoints stay the same, and both are off outside of training
steps: validation, sampling and export run the modules as they are.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from taming.modules.losses.adversarial import differentiated_twice
from taming.training.console import rank_zero_print

logger = logging.getLogger(__name__)

COMPILE_KEYS = ("mode", "dynamic", "fullgraph", "backend", "on_failure")
ON_FAILURE = ("warn", "stop")
_state = {"counting": False, "recomputing": 0}


def counting(on: bool) -> None:
    """Run blocks uncompiled while operations are counted: a compiled block hides its own."""
    _state["counting"] = on


def is_recomputing() -> bool:
    """Tell whether a block is computed again, for its backward pass."""
    return _state["recomputing"] > 0


class _Recomputing:
    """Marks what is computed again. A graph that is differentiated several times enters it each time."""

    def __enter__(self) -> None:
        _state["recomputing"] += 1

    def __exit__(self, *_: object) -> None:
        _state["recomputing"] -= 1


def accelerate(model: Any, lightning: Mapping[str, Any]) -> None:
    """Compile and checkpoint the blocks of a model as `lightning.compile` and its sibling say.

    Args:
        model: an `ImageModel`.
        lightning: the section. `compile` is True, False, or a mapping: `mode` ("default", "reduce-overhead"
            for small models on a GPU, "max-autotune"), `dynamic`, `fullgraph` and `backend` as
            `torch.compile` takes them, and `on_failure`: "warn" (default) goes on without the block that does
            not compile, "stop" ends.

    Raises:
        ValueError: another value; a model that names no blocks.
    """
    options, recompute = lightning.get("compile"), lightning.get("activation_checkpointing")
    if isinstance(options, bool) or options is None:
        options = {} if options else None
    if not (options is None or isinstance(options, Mapping)):
        keys = ", ".join(COMPILE_KEYS)
        raise ValueError(f"lightning.compile: {options!r} must be True, False, or a mapping with {keys}")
    if not isinstance(recompute, bool | None):
        raise ValueError(f"lightning.activation_checkpointing: {recompute!r} must be True or False")
    if options is None and not recompute:
        return
    blocks = model.blocks()
    if not blocks:
        raise ValueError(
            f"lightning.compile, lightning.activation_checkpointing: {type(model).__name__} names no blocks: "
            "leave them out"
        )
    if options is not None:
        rank_zero_print(f"{len(blocks)} blocks are compiled in the first batches, which can take minutes")
    for name, block in blocks.items():
        forward = block.forward if options is None else _compiled(name, block, dict(options))
        if recompute and not name.startswith("loss."):  # batch normalization would count its batch twice
            forward = _checkpointed(block, forward)
        block.forward = forward


def _compiled(name: str, block: nn.Module, options: dict[str, Any]) -> Callable:
    """Return a forward of a block that is compiled in training steps."""
    unknown = [key for key in options if key not in COMPILE_KEYS]
    on_failure = options.pop("on_failure", "warn")
    if unknown or on_failure not in ON_FAILURE:
        raise ValueError(
            f"lightning.compile: {', '.join(unknown) or on_failure} is unknown; it takes "
            f"{', '.join(COMPILE_KEYS)}, the last of these {' or '.join(ON_FAILURE)}"
        )
    _set_up_compiler()
    eager, failed = block.forward, False
    try:
        compiled = torch.compile(eager, **options)
    except RuntimeError as error:
        raise ValueError(f"lightning.compile: {options!r} is not possible ({error})") from error

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        in_step = block.training and torch.is_grad_enabled()
        if failed or _state["counting"] or not in_step or differentiated_twice():
            return eager(*args, **kwargs)  # what is compiled has no second derivative
        try:
            return compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            if on_failure == "stop":
                raise ValueError(
                    f"lightning.compile: {name} does not compile ({reason}); on_failure: warn goes on without"
                ) from error
            failed = True
            logger.warning("note: %s does not compile and runs as it is (%s)", name, reason)
            return eager(*args, **kwargs)

    return forward


def _set_up_compiler() -> None:
    """Set the compiler up: gradients are taken twice, and failures must show in the forward pass.

    The adaptive weight keeps the graph for the step's own backward pass. A backward pass that is compiled
    when it first runs would fail where nothing can take over.
    """
    config: Any = torch._functorch.config
    config.donated_buffer = False
    if hasattr(config, "force_non_lazy_backward_lowering"):
        config.force_non_lazy_backward_lowering = True


def _checkpointed(block: nn.Module, forward: Callable) -> Callable:
    """Return a forward of a block that keeps its inputs only, and runs again in the backward pass."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()) or differentiated_twice():
            return forward(*args, **kwargs)  # the graph of a gradient keeps what is computed again
        with set_checkpoint_early_stop(False):  # by an exception, which a compiled block cannot pass on
            return checkpoint(
                forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _Recomputing()),
                **kwargs,
            )

    return run
