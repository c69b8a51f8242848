"""What the processes of one training agree on, and how they end together when one of them fails."""

import functools
import logging
import signal
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from taming.training.console import first_line, message_for_users

logger = logging.getLogger(__name__)

# What gloo and NCCL say in the processes that wait for one that is gone.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "timed out", "Timed out")


class OtherProcessFailed(RuntimeError):
    """One of the other processes failed, and printed its own error."""


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
