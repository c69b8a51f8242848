"""The time that batches take, and how much of it training waits for data."""

import time
from typing import Any

from pytorch_lightning.callbacks import Timer

from taming.training.callbacks.run import StopAfterBatches

DECAY = 0.99  # of the sums, per batch


class StepClock:
    """Measures the rate of the last hundred batches or so, without a wait for the device.

    Call `start` before the first batch, `begin` and `end` around each, and `pause` after an evaluation.

    Attributes:
        total: batches of the whole run, where it has an end.
        first: batches that the run had when this start of it began.
    """

    def __init__(self) -> None:
        self.total: int | None = None
        self.first, self._start = 0, 0.0
        self._clock = 0.0  # where waiting, or the step, began
        # decaying sums over the last batches: seconds of waiting for data, seconds in all, batches
        self._data = self._busy = self._count = 0.0
        self._waited = 0.0  # seconds that the current batch was waited for
        self._paused = False  # since the last batch

    def start(self, trainer: Any, model: Any) -> None:
        """Begin to count, at the first batch of this start of a run."""
        self.total = batches_of_run(trainer, model)
        self.first, self._start = model.batches_seen, time.monotonic()
        self._clock = self._start

    def begin(self) -> None:
        """Note that a batch has come."""
        now = time.monotonic()
        self._waited = 0.0 if self._paused else now - self._clock  # saving comes after a validation
        self._clock, self._paused = now, False

    def end(self) -> None:
        """Note that the batch has been learned from."""
        now = time.monotonic()
        self._data = DECAY * self._data + self._waited
        self._busy = DECAY * self._busy + self._waited + now - self._clock
        self._count = DECAY * self._count + 1.0
        self._clock = now

    def pause(self) -> None:
        """Leave the time since the last batch out: an evaluation took it."""
        self._paused = True

    @property
    def seconds_per_batch(self) -> float:
        """Seconds from one batch to the next, waiting included."""
        return max(self._busy, 1e-9) / max(self._count, 1e-9)

    @property
    def data_share(self) -> float:
        """Share of the time that training waits for data, 0 to 1."""
        return self._data / max(self._busy, 1e-9)

    def seconds_left(self, trainer: Any, model: Any) -> float | None:
        """Return the seconds that the whole run still takes, validations and saving included, if it ends."""
        left, done = None, model.batches_seen - self.first
        if self.total is not None and done:
            left = (time.monotonic() - self._start) / done * (self.total - model.batches_seen)
        for timer in trainer.callbacks:
            if isinstance(timer, Timer) and (allowed := timer.time_remaining()) is not None:  # max_time
                left = max(0.0, allowed if left is None else min(left, allowed))
        return left


def batches_of_run(trainer: Any, pl_module: Any) -> int | None:
    """Return how many batches the whole run has, from `max_steps` and `max_epochs`; None without an end.

    With accumulation a batch is an optimizer step, as everywhere here.
    """
    limits = [callback.batches for callback in trainer.callbacks if isinstance(callback, StopAfterBatches)]
    per_epoch = trainer.num_training_batches
    if trainer.max_epochs not in (None, -1) and per_epoch != float("inf"):
        limits.append(trainer.max_epochs * -(-int(per_epoch) // pl_module.accumulate_grad_batches))
    return min(limits, default=None)
