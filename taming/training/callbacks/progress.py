"""Progress of a run: batches of the whole run, rate, time left, loss, learning rate, time spent on data."""

import sys
import time
from typing import Any, TextIO

from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from taming.training.callbacks.clock import StepClock
from taming.training.callbacks.throughput import Throughput


class Progress(ProgressBar):
    """Show how far the whole run is: a bar on a terminal, one line every N batches in a log file.

        12%|###   | 1,200/10,000 [3.4 batches/s, 0:43:08 left, epoch 2, loss 0.34, lr 2e-05, data 4%, MFU 31%]

    Batches count from the start of the run, also after a resume. The rate is that of the last hundred batches
    or so; the time left includes validations and saving, as far as this start of the run has seen them.
    "data" is the share of the time that training waits for the next batch: if it is large, raise
    `num_workers`. MFU is what `Throughput` says. Nothing is read from the device between two updates.

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
        self._clock = StepClock()
        self._written = -1  # batches at the last line
        self._shown = 0.0  # time of the last update

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    # ---- training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._clock = StepClock()
        self._clock.start(trainer, pl_module)
        self._written, self._shown = pl_module.batches_seen, 0.0
        self._open(pl_module.batches_seen, self._clock.total)

    def _open(self, batches: int, total: int | None) -> None:
        if self._enabled and self.file.isatty():
            self._bar = tqdm(
                initial=batches, total=total, file=self.file, dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar:20}| {desc}" if total else "{desc}",
            )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._clock.begin()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._clock.end()
        if not self._enabled:
            return
        batches = pl_module.batches_seen
        last = batches == self._clock.total
        if self._bar is not None and (last or time.monotonic() - self._shown >= self.refresh_seconds):
            self._show(self._bar, batches, self._text(trainer, pl_module))
        elif self._bar is None and batches != self._written and (
            last or batches - self._clock.first == 1 or batches % self.every_n_batches == 0
        ):
            self._write(f"batch {self._text(trainer, pl_module)}")
            self._written = batches

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._clock.pause()
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

    def _text(self, trainer: Any, pl_module: Any) -> str:
        """Return a line with all that is known after a batch."""
        batches, total = pl_module.batches_seen, self._clock.total
        seconds = self._clock.seconds_per_batch * pl_module.accumulate_grad_batches
        parts = [f"{1 / seconds:.3g} batches/s" if seconds <= 1 else f"{seconds:.3g} s/batch"]
        if (left := self._clock.seconds_left(trainer, pl_module)) is not None:
            parts.append(f"{duration(left)} left")
        parts.append(f"epoch {trainer.current_epoch}")
        for name, value in {**trainer.progress_bar_metrics, **pl_module.shown}.items():
            parts.append(f"{name.removeprefix('train/')} {float(value):.4g}")
        if trainer.optimizers:
            parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.3g}")
        parts.append(f"data {100 * self._clock.data_share:.0f}%")
        for callback in trainer.callbacks:
            if isinstance(callback, Throughput) and (utilization := callback.utilization()) is not None:
                parts.append(f"MFU {100 * utilization:.0f}%")
        whole = f"{batches:,}/{total:,}" if total else f"{batches:,}"
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


def duration(seconds: float) -> str:
    """Write a number of seconds as `0:43:08`, or `2 d 03:10:00` from a day on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days} d {hour:02}:{minute:02}:{second:02}" if days else f"{hours}:{minute:02}:{second:02}"
