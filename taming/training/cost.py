"""What a run would cost on this machine, from a few batches of it: for `--dry-run`."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from taming.modules.frozen import Frozen
from taming.training.callbacks.clock import batches_of_run
from taming.training.callbacks.progress import duration
from taming.training.callbacks.run import StopAfterBatches
from taming.training.callbacks.throughput import GB, Throughput
from taming.util import count_params

BATCHES, SECONDS = 5, 20.0  # that are timed at most; one batch in any case
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient, and two moments of Adam


class _Stopwatch(Callback):
    """Times batches, and ends training when there are enough."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = self._batch = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start = self._batch = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._batch)
        self._batch = now
        trainer.should_stop = len(self.seconds) >= BATCHES or now - self._start > SECONDS


def measure_cost(model: Any, data: Any, arguments: dict[str, Any], max_steps: int | None) -> list[str]:
    """Train a few batches on one device, and return lines that say what a step and the run would cost.

    The model has learned from these batches then. Nothing is written, and no weights of frozen networks in
    the loss are read: random ones take the same time.

    Args:
        model: an `ImageModel`, with its learning rate.
        data: the data module.
        arguments: of the Trainer.
        max_steps: of the whole run.
    """
    needed, free = BYTES_PER_WEIGHT * count_params(model)[0], free_memory(arguments.get("accelerator"))
    if free is not None and needed > free:
        return [
            f"not timed: weights, gradients and Adam's moments take {needed / GB:.1f} GB, of which "
            f"{free / GB:.1f} GB are free here"
        ]
    for part in model.modules():
        if isinstance(part, Frozen):
            part.use_random_weights()
    throughput, stopwatch = Throughput(), _Stopwatch()
    limit = None if max_steps in (None, -1) else int(max_steps)
    callbacks = [throughput, stopwatch, *([] if limit is None else [StopAfterBatches(limit)])]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator=arguments.get("accelerator", "auto"), devices=1,
            precision=arguments.get("precision"), logger=False, callbacks=callbacks,
            max_epochs=arguments.get("max_epochs", None if limit is None else -1),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, num_sanity_val_steps=0,
            use_distributed_sampler=False, default_root_dir=folder,
        )
        trainer.fit(model, data)
    # the first batch is slower: memory is allocated, and operations are counted
    seconds = statistics.median(stopwatch.seconds[1:] or stopwatch.seconds)
    peak = throughput.measured(trainer, model)["perf/peak_memory_gb"]
    operations, count = throughput.operations or 0, len(stopwatch.seconds[1:]) or 1
    lines = [
        f"a step: {operations / 1e9:,.1f} GFLOP, {seconds:.3g} s (median of {count} batches on one device), "
        f"MFU {100 * operations / seconds / throughput.peak:.0f} %, at most {peak:.1f} GB"
    ]
    if (total := batches_of_run(trainer, model)) is not None:
        lines.append(
            f"the whole run: {total:,} steps, {duration(total * model.accumulate_grad_batches * seconds)} at "
            "this rate, without validations"
        )
    return lines


def free_memory(accelerator: str | None) -> int | None:
    """Return the bytes that are free on the first GPU, or of this machine; None where nothing tells."""
    if accelerator in ("gpu", "cuda", "auto", None) and torch.cuda.is_available():
        return torch.cuda.mem_get_info(0)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else 1024 * int(kilobytes)
