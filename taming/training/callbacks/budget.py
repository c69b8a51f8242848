"""Training for a given time of the processor, with schedules that end when it is spent."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from taming.parameters import PositiveFloat, PositiveInt

SCHEDULES = ("scheduler", "temperature_scheduler", "kl_scheduler")  # of a model: from batches to a number
STARTS = ("discriminator_iter_start", "gen_start")  # of a loss: batches before a term


class Budget(Callback):
    """End training when a budget is spent, and stretch the schedules of the configuration over it.

        lightning:
          callbacks:
            budget:
              target: taming.training.callbacks.Budget
              params: {planned_batches: 2000, cpu_minutes: 10}

    Models can then be compared at equal time. The budget counts the training steps alone: the time that all
    threads of this process spend on the processor, without loading, validation and saving, and without what
    other work on the machine costs. A resumed run goes on with the rest of its budget.

    Schedules (of the learning rate, of temperatures and weights, and where a discriminator begins) are
    written for `planned_batches`: after the share s of the budget they are those of batch
    s * planned_batches.

    Args:
        planned_batches: batches for which the schedules are written.
        cpu_minutes: minutes of the processor.
        batches: a budget of batches in place of time: either of the two.

    Raises:
        ValueError: no budget, or two.
    """

    def __init__(
        self, planned_batches: PositiveInt, cpu_minutes: PositiveFloat | None = None,
        batches: PositiveInt | None = None,
    ):
        if (cpu_minutes is None) == (batches is None):
            raise ValueError("a budget is of cpu_minutes or of batches: give one of both")
        self.planned_batches, self.cpu_minutes, self.batches = planned_batches, cpu_minutes, batches
        self.seconds = 0.0  # spent
        self._started = 0.0
        self._batches_seen = 0
        self._begun: dict[str, int] = {}  # by the name in STARTS, the batch at which a term began
        self._originals: dict[str, Any] = {}

    @property
    def share(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        if self.batches is not None:
            return min(1.0, self._batches_seen / self.batches)
        assert self.cpu_minutes is not None
        return min(1.0, self.seconds / (60 * self.cpu_minutes))

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds that are spent, and which terms have begun."""
        return {"seconds": self.seconds, "begun": dict(self._begun)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the rest of the budget."""
        self.seconds, self._begun = float(state_dict["seconds"]), dict(state_dict["begun"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stretch the schedules."""
        for name in SCHEDULES:
            if (schedule := getattr(pl_module, name, None)) is not None:
                setattr(pl_module, name, self._stretched(schedule))
        loss = getattr(pl_module, "loss", None)
        self._originals = {name: getattr(loss, name) for name in STARTS if hasattr(loss, name)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop at once where a resumed run has spent its budget."""
        self._batches_seen = pl_module.batches_seen
        trainer.should_stop = trainer.should_stop or self.share >= 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Let the terms of the loss begin that are due, and start the clock."""
        for name, start in self._originals.items():
            if self.share * self.planned_batches >= start:
                self._begun.setdefault(name, pl_module.batches_seen)
            setattr(pl_module.loss, name, self._begun.get(name, math.inf))
        self._started = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Stop the clock, and training when the budget is spent."""
        self.seconds += time.process_time() - self._started
        self._batches_seen = pl_module.batches_seen
        trainer.should_stop = trainer.should_stop or self.share >= 1

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Give the loss its own numbers back."""
        for name, start in self._originals.items():
            setattr(pl_module.loss, name, start)

    def _stretched(self, schedule: Callable[[float], float]) -> Callable[[float], float]:
        return lambda batches: schedule(self.share * self.planned_batches)
