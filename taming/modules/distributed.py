"""Sums and means over the processes of a training run."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether a process group is there."""
    return dist.is_available() and dist.is_initialized()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if is_distributed():
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    return all_reduce_sum(x.clone()) / (dist.get_world_size() if is_distributed() else 1)


def is_sharded(x: Tensor) -> bool:
    """Whether each process holds a part of a tensor, as FSDP2 has it."""
    if not is_distributed():
        return False
    from torch.distributed.tensor import DTensor  # takes a while to import

    return isinstance(x, DTensor)


def whole(x: Tensor) -> Tensor:
    """Return a tensor whose parts are on several processes as a whole one, any other as it is.

    All processes must call it.
    """
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def sharded_like(x: Tensor, other: Tensor) -> Tensor:
    """Return the part of a whole tensor as this process holds one of `other`, if that has the same shape."""
    if not is_sharded(other) or x.shape != other.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements)  # type: ignore[attr-defined]


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather the weights that FSDP2 has sharded for the time of the block; all processes call it.

    Training steps gather layer by layer; this is for what uses single layers, such as sampling, and for what
    the first process does alone.
    """
    parts = []
    if is_distributed():
        from torch.distributed.fsdp import FSDPModule

        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()
        # a forward pass of one process alone would be noted in the order in which all gather again
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, (before, after) in zip(parts, hooks, strict=True):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()
