"""What happens around training: the run directory, pictures, checkpoints, stopping. All of it counts batches.

A model here is a `taming.models.base.ImageModel`: it has `batches_seen` and `log_images`.
"""

import logging
import signal
import threading
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from taming.checkpoint import write_checkpoint
from taming.images import image_grid, save_png

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 (it is no error: the user asked for it)
    """Ctrl-C or SIGTERM was received, the batch was finished and the run was saved."""


class SetupCallback(Callback):
    """Make the run directory, write the configuration into it, and into every checkpoint.

    Args:
        logdir: the run directory.
        now: time stamp of this start, the beginning of the config files' names.
        config: the whole resolved configuration as plain dicts: {"model", "data", "lightning"}.
    """

    def __init__(self, logdir: str | Path, now: str, config: dict):
        self.logdir, self.now, self.config = Path(logdir), now, config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.global_rank != 0 or stage != "fit":
            return
        for name in ("configs", "checkpoints", "images"):
            (self.logdir / name).mkdir(parents=True, exist_ok=True)
        project = {key: value for key, value in self.config.items() if key != "lightning"}
        for kind, part in (("project", project), ("lightning", {"lightning": self.config.get("lightning", {})})):
            OmegaConf.save(OmegaConf.create(part), self.logdir / "configs" / f"{self.now}-{kind}.yaml")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["config"] = self.config


class ImageLogger(Callback):
    """Write PNG grids of what `model.log_images(batch)` returns, and show them in TensorBoard.

    Pictures come at batches 1, 2, 4, 8, ... (unless `increase_log_steps` is False) and every
    `batch_frequency` batches, and for the first batch of every validation:
    `images/train/reconstructions_000128.png`.

    Args:
        batch_frequency: batches between pictures; 0 for none in training.
        max_images: pictures per grid.
        clamp: cut values to [-1, 1]; else each grid is scaled by its largest value.
        increase_log_steps: log at powers of two as well.
        log_images_kwargs: passed on to `model.log_images`.
    """

    def __init__(
        self, batch_frequency: int = 750, max_images: int = 4, clamp: bool = True, increase_log_steps: bool = True,
        log_images_kwargs: dict | None = None,
    ):
        self.batch_frequency, self.max_images, self.clamp = batch_frequency, max_images, clamp
        self.increase_log_steps, self.log_images_kwargs = increase_log_steps, log_images_kwargs or {}
        self._last_logged = -1

    def is_due(self, batches: int) -> bool:
        """Whether pictures are wanted after so many batches."""
        if batches < 1 or self.batch_frequency < 1:
            return False
        power_of_two = batches & (batches - 1) == 0 and batches < self.batch_frequency
        return batches % self.batch_frequency == 0 or (self.increase_log_steps and power_of_two)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.is_due(pl_module.batches_seen) and pl_module.batches_seen != self._last_logged:
            self._last_logged = pl_module.batches_seen  # once, however many batches are accumulated
            self.log_images(trainer, pl_module, batch, "train")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            self.log_images(trainer, pl_module, batch, "val")

    @rank_zero_only
    def log_images(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict, split: str) -> None:
        """Draw the pictures of one batch in eval mode, and save them; a GPU's memory is freed afterwards."""
        was_training = pl_module.training
        pl_module.eval()
        few = {key: value[: self.max_images] for key, value in batch.items()}
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            pictures = pl_module.log_images(few, **self.log_images_kwargs)
        pl_module.train(was_training)
        for name, images in pictures.items():
            grid = self._grid(images.detach().float().cpu())
            save_png(grid, Path(trainer.default_root_dir, "images", split, f"{name}_{pl_module.batches_seen:06d}.png"))
            for target in trainer.loggers:
                if hasattr(target.experiment, "add_image"):
                    target.experiment.add_image(f"{split}/{name}", (grid + 1.0) / 2.0, pl_module.batches_seen)

    def _grid(self, images: Tensor) -> Tensor:
        images = images[: self.max_images]
        if not self.clamp:
            images = images / images.abs().max().clamp_min(1e-8)
        return image_grid(images.clamp(-1.0, 1.0))


class LastCheckpoint(Checkpoint):
    """Keep `last.ckpt` current: every N batches, after each validation and epoch, on Ctrl-C, SIGTERM and
    errors.

    Ctrl-C finishes the batch, saves and raises `Interrupted`; a second one stops at once. SIGUSR1 saves and
    goes on. An error (a NaN in the loss, a broken data set) saves the state before the batch it happened in.

    Args:
        path: the file.
        every_n_batches: batches between saves; None saves only after validation and epochs.
    """

    def __init__(self, path: str | Path, every_n_batches: int | None = None):
        self.path, self.every_n_batches = Path(path), every_n_batches
        self._wanted: str | None = None  # what a signal asked for: "stop" or "save"
        self._previous: dict[int, object] = {}
        self._saved_at = -1

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, on all ranks together."""
        trainer.save_checkpoint(self.path)
        self._saved_at = pl_module.batches_seen

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        stop = trainer.strategy.reduce_boolean_decision(self._wanted == "stop", all=False)
        due = self.every_n_batches and pl_module.batches_seen % self.every_n_batches == 0
        if stop or (due and pl_module.batches_seen != self._saved_at) or self._wanted == "save":
            self.save(trainer, pl_module)
        if stop:
            raise Interrupted
        self._wanted = None

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.save(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if pl_module.batches_seen != self._saved_at:
            self.save(trainer, pl_module)

    def on_exception(self, trainer, pl_module, exception) -> None:
        if isinstance(exception, Interrupted) or pl_module.batches_seen in (0, self._saved_at):
            return
        if trainer.world_size > 1:  # the other ranks may be waiting elsewhere: saving together would hang
            logger.warning("not saved: one of several processes failed; the last checkpoint is %s", self.path)
            return
        self.save(trainer, pl_module)
        logger.warning("saved the state after %d batches: %s", pl_module.batches_seen, self.path)

    # ---- signals

    def on_fit_start(self, trainer, pl_module) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals reach only the main thread; a notebook's or a test's other threads do without
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        if hasattr(signal, "SIGUSR1"):
            self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._receive)

    def teardown(self, trainer, pl_module, stage) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self._wanted = self._wanted or "save"
        elif self._wanted == "stop":
            raise KeyboardInterrupt
        else:
            self._wanted = "stop"
            logger.warning("stopping after this batch; once more to stop at once")


class WholeFileIO(TorchCheckpointIO):
    """Write checkpoints beside their place and rename them.

    Lightning's own writing may overwrite a file in place, and with it the weights of a model that was loaded
    from it and is still mapped to it.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        write_checkpoint(checkpoint, path)


class StopAfterBatches(Callback):
    """End training after so many batches: `max_steps`, which Lightning would count once per optimizer."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.should_stop or pl_module.batches_seen >= self.batches


class SeededBatches(Callback):
    """Make dropout, pkeep and noise of a batch a function of (seed, rank, batch): a resumed run repeats
    them."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed((self.seed * 1_000_003 + number) * 4099 + trainer.global_rank)


def plain(config: Mapping) -> dict:
    """An OmegaConf configuration as plain dicts and lists, which a safely read checkpoint may hold."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
