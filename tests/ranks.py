"""Several processes that talk over gloo: for what is counted or averaged over ranks."""

import gc
import os
import socket
import sys
import weakref

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401 - keeps the group that it finds; so import it before there is one
import torch.multiprocessing as mp

# A server imports the package once, with what training would import later, and forks each rank: that takes a
# second or so instead of five.
mp.set_forkserver_preload([
    "tests.ranks", "tests.tiny", "taming.training.command", "taming.models.vqgan",
    "taming.models.cond_transformer", "taming.data.datamodule", "taming.data.landscapes", "torch._dynamo",
    "torch.utils.tensorboard",
])


def on_ranks(count, function, folder, *arguments):
    """What ``function(rank, *arguments)`` returns on each of ``count`` ranks; files go to ``folder``."""
    folder.mkdir(exist_ok=True)
    mp.start_processes(_rank, (count, function, str(folder), arguments), count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def on_two_ranks(function, folder, *arguments):
    """What ``function(rank, *arguments)`` returns on each of two ranks; files go to ``folder``."""
    return on_ranks(2, function, folder, *arguments)


def _rank(rank, count, function, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    # A group's threads end with it. Those of one that is left would let go of tensors while the
    # interpreter shuts down, which now and then aborts the process.
    assert group() is None


def main_on_ranks(count, *words):
    """Run the training command with ``words`` in ``count`` processes, as if another one had started them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*map(str, words), "--accelerator", "cpu", "--devices", str(count), "--allow", "tests"]
    mp.start_processes(_command, (count, port, words), count, start_method="forkserver")


def start_main(*words, output=os.devnull):
    """Start the training command with ``words`` in a process of its own, whose output goes to a file."""
    arguments = (0, 1, 0, [*map(str, words)], output)
    process = mp.get_context("forkserver").Process(target=_command, args=arguments)
    process.start()
    return process


def _command(rank, count, port, words, output=None):
    from pytorch_lightning.utilities import rank_zero_only

    from taming.training.command import main

    rank_zero_only.rank = rank  # which was read from the environment when the server imported it
    torch.set_num_threads(1)
    if output is not None:
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if count > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TAMING_START": f"at-{port}"}
    status = main(words)
    if status:
        sys.exit(status)
