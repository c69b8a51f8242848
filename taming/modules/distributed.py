"""Sums and means over the processes of a training run."""

import torch.distributed as dist
from torch import Tensor


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
