"""What the processes of one training agree on, and how they end together when one of them fails."""

import functools
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from taming.training.console import first_line, message_for_users

logger = logging.getLogger(__name__)

# What gloo and NCCL say in the processes that wait for one that is gone.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "timed out", "Timed out")


# Launchers that Lightning recognizes; they set rank and number of processes themselves.
LAUNCHERS = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)
# What Lightning tells the processes that it starts about their group, and this command about the start.
OF_GROUP = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TAMING_START")


class OtherProcessFailed(RuntimeError):
    """One of the other processes failed, and printed its own error."""


def check_launch(devices: int, nodes: int) -> list[str]:
    """Check what the environment says of a group of processes, where no launcher has started this one.

    Lightning believes variables that an earlier start or a shell has left: it would wait for processes that
    nobody starts, or, with a rank above 0, write nothing. Returns a note if this start will wait for others
    that are started by hand.

    Raises:
        ValueError: this start cannot be part of such a group; the message says what to unset.
    """
    told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    ranks = {name: rank for name, rank in told.items() if name != "WORLD_SIZE"}
    if not ranks or any(launcher.detect() for launcher in LAUNCHERS):
        return []
    said = ", ".join(f"{name}={value}" for name, value in told.items())
    count = devices * nodes
    if count > 1 and "LOCAL_RANK" in told and "MASTER_PORT" in os.environ:  # each started by hand
        if told.get("WORLD_SIZE", str(count)) == str(count):
            return [f"the environment says {said}: one of {count} processes, which waits for the others"]
    elif set(ranks.values()) == {"0"} and (count == 1 or "LOCAL_RANK" not in told):
        return []
    raise ValueError(
        f"the environment says {said}, which no launcher has set for this start of {count} "
        f"process{'es' if count > 1 else ''}: unset {' '.join(told)}, or start it with torchrun"
    )


@contextmanager
def same_environment() -> Iterator[None]:
    """Forget, after the block, what Lightning writes to the environment for the processes that it starts.

    The next start in this process, of a notebook for instance, would take itself for one of them, and wait.
    """
    before = {name: os.environ.get(name) for name in OF_GROUP}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def any_process(trainer: pl.Trainer, flag: bool) -> bool:
    """Return whether `flag` is True in any process; all of them must ask.

    The processes talk over gloo, from CPU to CPU: over NCCL each batch would wait for the GPU.
    """
    if trainer.world_size == 1:
        return flag
    flags, group = torch.tensor(int(flag)), None if dist.get_backend() == "gloo" else _gloo_group()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return bool(flags)


@functools.cache
def _gloo_group() -> Any:
    """Make a group of all processes beside that of the GPUs, once."""
    return dist.new_group(backend="gloo")


def has_lost_another(error: BaseException) -> bool:
    """Return whether an error is due to another process that is gone."""
    text = str(error)
    raised_by_torch = isinstance(error, RuntimeError) and not type(error).__module__.startswith("taming.")
    return raised_by_torch and any(words in text for words in LOST) and ("gloo" in text or "NCCL" in text)


class FailTogether(Callback):
    """Let the error of the process that failed come first, and end the processes that it has started."""

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        together = getattr(exception, "on_all_ranks", False) or not isinstance(exception, Exception)
        if trainer.world_size == 1 or together or has_lost_another(exception):
            return
        if message_for_users(exception) is None:  # else the command prints it, and nothing before
            number, count = trainer.global_rank + 1, trainer.world_size
            reason = f"{type(exception).__name__}: {first_line(exception)}"
            logger.error("process %d of %d failed: %s", number, count, reason)
        launcher = trainer.strategy.launcher
        if launcher is not None:  # the others may wait for this one until a timeout of half an hour
            launcher.kill(signal.SIGKILL)
