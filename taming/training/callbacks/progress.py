"""Progress of a run: batches of the whole run, rate, time left, loss, learning rate, time spent on data."""

import sys
import time
from typing import Any, TextIO

from pytorch_lightning.callbacks import ProgressBar, Timer
from tqdm import tqdm

from taming.training.callbacks.run import StopAfterBatches

DECAY = 0.99  # of the sums for rate and data, per batch


class Progress(ProgressBar):
    """Show how far the whole run is: a bar on a terminal, one line every N batches in a log file.

        12%|###       | 1,200/10,000 [3.4 batches/s, 0:43:08 left, epoch 2, loss 0.345, lr 0.002, data 4%]

    Batches count from the start of the run, also after a resume. The rate is that of the last hundred batches
    or so; the time left includes validations and saving, as far as this start of the run has seen them.
    "data" is the share of the time that training waits for the next batch: if it is large, raise
    `num_workers`. Nothing is read from the device between two updates.

    Args:
        every_n_batches: batches between two lines of a log file.
        refresh_seconds: least time between two updates of the bar, in seconds.
        file: where to write; standard error when None.

    Raises:
        ValueError: an interval that is not positive.
    """

    def __init__(
        self, every_n_batches: int = 50, refresh_seconds: float = 0.5, file: TextIO | None = None
    ):
        super().__init__()
        if not (every_n_batches > 0 and refresh_seconds > 0):
            raise ValueError(
                "progress.every_n_batches and progress.refresh_seconds must be above 0, got "
                f"{every_n_batches} and {refresh_seconds}"
            )
        self.every_n_batches, self.refresh_seconds = every_n_batches, refresh_seconds
        self.file = file or sys.stderr
        self._enabled = True
        self._bar: tqdm | None = None  # on a terminal
        self._total: int | None = None  # batches of the whole run, where it has an end
        self._first, self._start = 0, 0.0  # batches and clock when this start of the run began to train
        self._written = -1  # batches at the last line
        self._shown = self._clock = 0.0  # clock at the last update; where waiting, or the step, began
        # decaying sums over the last batches: seconds of waiting for data, seconds in all, batches
        self._data = self._busy = self._count = 0.0
        self._waited = 0.0  # seconds that the current batch was waited for
        self._evaluated = False  # since the last batch

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # ---- training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._total = batches_of_run(trainer, pl_module)
        self._first, self._start = pl_module.batches_seen, time.monotonic()
        self._written, self._shown, self._clock = pl_module.batches_seen, 0.0, self._start
        self._open(pl_module.batches_seen, self._total)

    def _open(self, batches: int, total: int | None) -> None:
        if self._enabled and self.file.isatty():
            self._bar = tqdm(
                initial=batches, total=total, file=self.file, dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar:20}| {desc}" if total else "{desc}",
            )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        now = time.monotonic()
        self._waited = 0.0 if self._evaluated else now - self._clock  # saving comes after a validation
        self._clock, self._evaluated = now, False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now, batches = time.monotonic(), pl_module.batches_seen
        self._data = DECAY * self._data + self._waited
        self._busy = DECAY * self._busy + self._waited + now - self._clock
        self._count = DECAY * self._count + 1.0
        if self._enabled:
            last = batches == self._total
            if self._bar is not None and (last or now - self._shown >= self.refresh_seconds):
                self._show(self._bar, batches, self._text(trainer, pl_module, now))
            elif self._bar is None and batches != self._written and (
                last or batches - self._first == 1 or batches % self.every_n_batches == 0
            ):
                self._write(f"batch {self._text(trainer, pl_module, now)}")
                self._written = batches
        self._clock = time.monotonic()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._evaluated = True
        monitor, batches = pl_module.monitor, pl_module.batches_seen
        value = trainer.callback_metrics.get(monitor) if monitor else None
        if self._enabled and value is not None and not trainer.sanity_checking:
            self._write(f"validated after {batches:,} batches: {monitor} {value:.4g}")

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._show_evaluation("validation", batch_idx, trainer.num_val_batches, dataloader_idx)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._open(0, None)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._show_evaluation("test", batch_idx, trainer.num_test_batches, dataloader_idx)

    def _show_evaluation(self, split: str, batch_idx: int, totals: Any, dataloader_idx: int) -> None:
        """Count the batches of an evaluation on the terminal."""
        now = time.monotonic()
        if self._enabled and self._bar is not None and now - self._shown >= self.refresh_seconds:
            total = totals[dataloader_idx] if isinstance(totals, list) else totals
            self._show(self._bar, int(self._bar.n), f"{split} {batch_idx + 1:,}/{total:,}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(
        self, trainer: Any, pl_module: Any, exception: BaseException
    ) -> None:
        self._close()

    # ---- what is shown

    def _text(self, trainer: Any, pl_module: Any, now: float) -> str:
        """Return a line with all that is known after a batch."""
        batches, done = pl_module.batches_seen, pl_module.batches_seen - self._first
        rate = self._count / pl_module.accumulate_grad_batches / max(self._busy, 1e-9)  # per second
        parts = [f"{rate:.3g} batches/s" if rate >= 1 else f"{1 / rate:.3g} s/batch"]
        left = None
        if self._total is not None and done:
            left = (now - self._start) / done * (self._total - batches)
        for timer in trainer.callbacks:
            if isinstance(timer, Timer) and (allowed := timer.time_remaining()) is not None:  # max_time
                left = max(0.0, allowed if left is None else min(left, allowed))
        if left is not None:
            parts.append(f"{duration(left)} left")
        parts.append(f"epoch {trainer.current_epoch}")
        for name, value in trainer.progress_bar_metrics.items():
            parts.append(f"{name.removeprefix('train/')} {value:.4g}")
        if trainer.optimizers:
            parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.3g}")
        parts.append(f"data {100 * self._data / max(self._busy, 1e-9):.0f}%")
        whole = f"{batches:,}/{self._total:,}" if self._total else f"{batches:,}"
        return f"{whole} [{', '.join(parts)}]"

    def _show(self, bar: tqdm, batches: int, text: str) -> None:
        self._shown = time.monotonic()
        try:
            bar.n = batches
            bar.set_description_str(text)
        except OSError:  # the terminal is gone; training is not
            self._bar = None

    def _write(self, line: str) -> None:
        try:
            if self._bar is not None:
                self._bar.write(line, file=self.file)
            else:
                print(line, file=self.file, flush=True)
        except OSError:
            self._bar = None

    def _close(self) -> None:
        if self._bar is not None:
            try:
                self._bar.close()
            except OSError:
                pass
            self._bar = None


def batches_of_run(trainer: Any, pl_module: Any) -> int | None:
    """Return how many batches the whole run has, from `max_steps` and `max_epochs`; None without an end.

    With accumulation a batch is an optimizer step, as everywhere here.
    """
    limits = [callback.batches for callback in trainer.callbacks if isinstance(callback, StopAfterBatches)]
    per_epoch = trainer.num_training_batches
    if trainer.max_epochs not in (None, -1) and per_epoch != float("inf"):
        limits.append(trainer.max_epochs * -(-int(per_epoch) // pl_module.accumulate_grad_batches))
    return min(limits, default=None)


def duration(seconds: float) -> str:
    """Write a number of seconds as `0:43:08`, or `2 d 03:10:00` from a day on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02}:{minute:02}:{second:02}" if days else f"{hours}:{minute:02}:{second:02}"
