"""Checkpoints of a run: exact counters, `last.ckpt` by batches, time and signals, files that appear whole.

What is written is a complete state of training: after a kill at any moment the run goes on from `last.ckpt`.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from taming.checkpoint import read_checkpoint, write_checkpoint
from taming.training.distributed import any_process

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP was received: the batch was finished and the run saved, unless it came twice.

    Attributes:
        status: exit status of the command by the shells' convention, 130 after Ctrl-C.
    """

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.status = 128 + number


class NotSaved(RuntimeError):
    """A checkpoint could not be written, because the disk is full for instance; the one before is whole."""

    on_all_ranks = True  # every process raises it


class ExactResume(Callback):
    """Write Lightning's counters into checkpoints so that a run goes on at the exact batch.

    Lightning counts a batch in four places, one after another, and infers from their differences when a
    checkpoint was written. It misreads several moments (an error, a stop within an epoch, Ctrl-C at its end)
    and then loses or repeats a batch, a validation or a step of the curves. With this callback every
    checkpoint says the same: how many batches are finished, in all and in this epoch, and whether validation
    is still due.
    """

    def __init__(self) -> None:
        self._validation_due = False  # a validation after the last finished batch has not been done yet

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._validation_due = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._validation_due = True

    def on_validation_end(self, trainer, pl_module) -> None:
        self._validation_due = False

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._validation_due = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        for scope in ("total", "current"):
            batches = loop["epoch_loop.batch_progress"][scope]
            batches |= dict.fromkeys(("ready", "started", "completed"), batches["processed"])
            epochs = loop["epoch_progress"][scope]
            epochs |= {"processed": epochs["completed"]}
            epochs |= dict.fromkeys(("ready", "started"), epochs["completed"] + 1)
            due = int(self._validation_due)
            loop["epoch_loop.val_loop.batch_progress"][scope] |= {
                "ready": due, "started": due, "processed": 0, "completed": 0
            }

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        loop: Any = trainer.fit_loop.epoch_loop
        if not loop.restarting:
            return
        # The step of the loggers. Lightning adds one itself where a validation follows this batch.
        finished = loop.batch_progress.total.processed
        loop._batches_that_stepped = finished - loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


class LastCheckpoint(Checkpoint):
    """Keep `checkpoints/last.ckpt` in the run directory current, from the first batch on.

    It is written after the first batch (so that a full disk or a missing permission shows at once), then by
    batches and by time, after validations and epochs, and on Ctrl-C, SIGTERM, SIGHUP and errors. Ctrl-C,
    SIGTERM and SIGHUP finish the batch, save and raise `Interrupted`; a second one stops at once. SIGUSR1
    saves and goes on. An error (a NaN in the loss, a broken data set) saves the state before its batch.

    Weights that are not finite are never written: see `AtomicCheckpointIO`, which the trainer must use.

    Args:
        every_n_batches: batches between saves; None: only by time.
        every_n_minutes: minutes between saves; None: only by batches.
        on_write_error: "stop" ends training with `NotSaved` where the file cannot be written, for instance
            because the disk is full; "continue" warns, trains on and tries again at the next save.

    Raises:
        ValueError: an interval that is not positive, or an unknown `on_write_error`.
    """

    def __init__(
        self, every_n_batches: int | None = None, every_n_minutes: float | None = 10.0,
        on_write_error: str = "stop",
    ):
        for name, value in (("every_n_batches", every_n_batches), ("every_n_minutes", every_n_minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"last_checkpoint.{name} must be above 0, or null for none, got {value}")
        if on_write_error not in ("stop", "continue"):
            raise ValueError(f"last_checkpoint.on_write_error: {on_write_error!r} is not stop or continue")
        self.every_n_batches, self.every_n_minutes = every_n_batches, every_n_minutes
        self.on_write_error = on_write_error
        self._stop: int | None = None  # the signal that asked to stop
        self._save_now = False  # a signal asked to save
        self._previous: dict[int, Any] = {}  # signal handlers to restore
        self._saved_batches = -1
        self._saved_time = time.monotonic()  # seconds

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return the place of the file in the run directory."""
        return Path(trainer.default_root_dir, "checkpoints", "last.ckpt")

    def save(self, trainer: pl.Trainer, pl_module: Any) -> bool:
        """Write the file, on all ranks together, and return whether that worked.

        Raises:
            NotSaved: it did not, and `on_write_error` is "stop".
        """
        for target in trainer.loggers:
            target.save()  # curves reach as far as the checkpoint
        trainer.save_checkpoint(self.path(trainer), weights_only=False)
        self._saved_batches, self._saved_time = pl_module.batches_seen, time.monotonic()
        self._save_now = False
        # only the first process has written, and its error must end or spare all of them
        failure = trainer.strategy.broadcast(getattr(trainer.strategy.checkpoint_io, "failure", None))
        if isinstance(failure, OSError) and self.on_write_error == "stop":
            raise NotSaved(
                f"{failure.filename or self.path(trainer)}: {failure.strerror or failure}. Training goes on "
                "without saving if you set lightning.callbacks.last_checkpoint.params.on_write_error=continue"
            )
        return failure is None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Remove the partial files that a start of this run left when it was killed."""
        if trainer.global_rank == 0 and stage == "fit":
            run = Path(trainer.default_root_dir)
            for pattern in ("checkpoints/.*.part", "images/*/.*.part", ".*.part"):
                for partial in run.glob(pattern):
                    partial.unlink(missing_ok=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        # what is saved is the state after the last batch, which by now is in the curves and validated
        asked = self._stop is not None or self._save_now or self._is_due(pl_module.batches_seen)
        if any_process(trainer, asked):  # the only exchange in most batches
            self._stop_if_asked(trainer, pl_module)
            self.save(trainer, pl_module)

    def _is_due(self, batches: int) -> bool:
        if batches in (0, self._saved_batches):
            return False
        minutes = (time.monotonic() - self._saved_time) / 60
        return (
            self._saved_batches < 0
            or (self.every_n_batches is not None and batches % self.every_n_batches == 0)
            or (self.every_n_minutes is not None and minutes >= self.every_n_minutes)
        )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.batches_seen != self._saved_batches:
            self.save(trainer, pl_module)
        self._stop_if_asked(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: Any, exception: BaseException
    ) -> None:
        started = pl_module.batches_seen > 0 and trainer.optimizers
        if isinstance(exception, Interrupted | NotSaved) or not started:
            return
        path = self.path(trainer)
        if trainer.world_size > 1 and not getattr(exception, "on_all_ranks", False):
            return  # the other processes may be waiting elsewhere: saving together would hang
        reset_running_statistics(pl_module)
        try:
            saved = self.save(trainer, pl_module)
        except NotSaved:  # `exception` is the news; the IO has warned
            return
        if saved:
            logger.warning("saved the state after %d batches: %s", pl_module.batches_seen, path)

    # ---- signals

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._saved_time = time.monotonic()
        if pl_module.batches_seen:  # a resumed run: its state is in the checkpoint that it comes from
            self._saved_batches = pl_module.batches_seen
        if threading.current_thread() is not threading.main_thread():
            return  # signals reach the main thread only; other threads of a notebook or a test do without
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        for name in ("SIGHUP", "SIGUSR1"):  # absent on Windows
            number = getattr(signal, name, None)
            # nohup has switched SIGHUP off, and Lightning requeues SLURM's jobs on SIGUSR1: both stay
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                self._previous[number] = signal.signal(number, self._receive)

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: object) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self._save_now = True
        elif self._stop is not None:
            raise Interrupted(number)
        else:
            self._stop = number
            logger.warning("stopping after this batch; once more to stop at once")

    def _stop_if_asked(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self._previous:  # no signals here, or not yet: a sanity check
            return
        if not any_process(trainer, self._stop is not None):
            return
        self.save(trainer, pl_module)
        raise Interrupted(self._stop or signal.SIGTERM)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside their place and rename them; leave the old file where there is a fault.

    Lightning's own writing may overwrite a file in place, and with it the weights of a model that was loaded
    from it and is still mapped to it.

    Weights that are NaN or infinite, and files that the system cannot write, are reported in one line and do
    not raise, since only the first process writes, and the others would wait for it forever.

    Attributes:
        failure: what was wrong with the last write; None if it is there.
    """

    failure: OSError | ValueError | None = None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of any year without executing what is in it."""
        return read_checkpoint(Path(path))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        self.failure = None
        try:
            if bad := non_finite(checkpoint["state_dict"]):
                more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                raise ValueError(f"NaN or infinite weights ({bad[0]}{more})")
            write_checkpoint(checkpoint, path)
        except (OSError, ValueError) as error:
            self.failure = error
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            before = "; the checkpoint before it is whole" if Path(path).exists() else ""
            logger.warning("not saved: %s: %s%s", path, reason, before)


def reset_running_statistics(model: nn.Module) -> None:
    """Let BatchNorm layers begin again whose running statistics a batch with NaN has spoiled.

    Only evaluation reads them, and some tens of batches bring them back; the weights are fine.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and non_finite(dict(module.named_buffers())):
            module.reset_running_stats()


def non_finite(state: Mapping[str, Any]) -> list[str]:
    """Return the keys of the tensors that hold NaN or positive infinity; masks hold negative infinity."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return [
        key for key, value in tensors.items()
        if value.is_floating_point() and not bool((value < math.inf).all())
    ]
