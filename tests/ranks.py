"""Two processes that talk over gloo: for what is counted or averaged over ranks."""

import gc
import weakref

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401 - keeps the group that it finds; so import it before there is one
import torch.multiprocessing as mp

COUNT = 2


def on_two_ranks(function, folder, *arguments):
    """What ``function(rank, *arguments)`` returns on each of two ranks; files go to ``folder``."""
    mp.spawn(_rank, (function, str(folder), arguments), nprocs=COUNT)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(COUNT)]


def _rank(rank, function, folder, arguments):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=COUNT)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    # A group's threads end with it. Those of one that is left would let go of tensors while the
    # interpreter shuts down, which now and then aborts the process.
    assert group() is None
