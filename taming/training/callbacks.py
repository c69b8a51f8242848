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
from taming.images import image_grid, save_png, to_pil

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM was received: the batch was finished and the run saved, unless it came twice.

    Attributes:
        status: exit status of the command by the shells' convention, 130 after Ctrl-C.
    """

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.status = 128 + number


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
        parts = {"project": project, "lightning": {"lightning": self.config.get("lightning", {})}}
        for kind, part in parts.items():
            OmegaConf.save(OmegaConf.create(part), self.logdir / "configs" / f"{self.now}-{kind}.yaml")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
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
        self, batch_frequency: int = 750, max_images: int = 4, clamp: bool = True,
        increase_log_steps: bool = True, log_images_kwargs: dict | None = None,
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

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            self.log_images(trainer, pl_module, batch, "val")

    @rank_zero_only
    def log_images(self, trainer: pl.Trainer, pl_module, batch: dict, split: str) -> None:
        """Draw and save the pictures of one batch; training goes on as if this had not been called.

        Random numbers for pictures are the same each time, so that only the model changes them. Where a GPU's
        memory does not suffice there are no pictures, and a warning.
        """
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        few = {key: value[: self.max_images] for key, value in batch.items() if hasattr(value, "__getitem__")}
        was_training = pl_module.training
        pl_module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
                torch.manual_seed(0)
                drawn = pl_module.log_images(few, **self.log_images_kwargs)
                pictures = {name: self._grid(images.float().cpu()) for name, images in drawn.items()}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            logger.warning("no pictures: the GPU's memory is full; lower image_logger.params.max_images")
            return
        finally:
            pl_module.train(was_training)
        for name, grid in pictures.items():
            self._save(trainer, f"{split}/{name}", grid, pl_module.batches_seen)

    def _save(self, trainer: pl.Trainer, name: str, grid: Tensor, batches: int) -> None:
        """Write a grid (C, H, W) as a PNG, and to the loggers that show pictures."""
        save_png(grid, Path(trainer.default_root_dir, "images", f"{name}_{batches:06d}.png"))
        for target in trainer.loggers:
            if hasattr(target.experiment, "add_image"):  # TensorBoard
                target.experiment.add_image(name, (grid + 1.0) / 2.0, batches)
            elif hasattr(target, "log_image"):  # W&B
                target.log_image(key=name, images=[to_pil(grid)])

    def _grid(self, images: Tensor) -> Tensor:
        images = images[: self.max_images]
        if not self.clamp:
            images = images / images.abs().max().clamp_min(1e-8)
        return image_grid(images.clamp(-1.0, 1.0))


class ExactResume(Callback):
    """Write Lightning's counters into checkpoints so that a run goes on at the exact batch.

    Lightning counts a batch in four places one after another, and tells from their differences at which
    moment a checkpoint was written; several moments (an error, a stop amid an epoch, Ctrl-C at its end) are
    misread, and lose or repeat a batch, a validation or a step of the curves. Here every checkpoint says the
    same: so many batches are finished, of them so many in this epoch, and validation is still due or not.
    """

    def __init__(self) -> None:
        self._validation_due = False  # if a validation belongs after the last finished batch, it is to come

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._validation_due = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._validation_due = True

    def on_validation_end(self, trainer, pl_module) -> None:
        self._validation_due = False

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._validation_due = False

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        if not loop.restarting:
            return
        # the step of the loggers; where a validation belongs here, done or not, Lightning adds one itself
        finished = loop.batch_progress.total.processed
        loop._batches_that_stepped = finished - loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


class LastCheckpoint(Checkpoint):
    """Keep `last.ckpt` current: every N batches, after validations and epochs, on Ctrl-C, SIGTERM and errors.

    Ctrl-C finishes the batch, saves and raises `Interrupted`; a second one stops at once. SIGUSR1 saves and
    goes on. An error (a NaN in the loss, a broken data set) saves the state before the batch it happened in.

    Args:
        path: the file.
        every_n_batches: batches between saves; None saves only after validations and epochs.
    """

    def __init__(self, path: str | Path, every_n_batches: int | None = None):
        self.path, self.every_n_batches = Path(path), every_n_batches
        self._stop: int | None = None  # the signal that asked to stop
        self._save_now = False  # a signal asked to save
        self._previous: dict[int, object] = {}
        self._saved_at = -1

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file, on all ranks together."""
        for target in trainer.loggers:
            target.save()  # curves reach as far as the checkpoint
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_at, self._save_now = pl_module.batches_seen, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        # of the last batch, which by now is in the curves and validated
        self._stop_if_asked(trainer, pl_module)
        due = self.every_n_batches and pl_module.batches_seen % self.every_n_batches == 0
        due = due and pl_module.batches_seen not in (0, self._saved_at)
        if due or trainer.strategy.reduce_boolean_decision(self._save_now, all=False):
            self.save(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._stop_if_asked(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.save(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if pl_module.batches_seen != self._saved_at:
            self.save(trainer, pl_module)
        self._stop_if_asked(trainer, pl_module)

    def on_exception(self, trainer, pl_module, exception) -> None:
        started = pl_module.batches_seen > 0 and trainer.optimizers
        if isinstance(exception, Interrupted) or not started:
            return
        if trainer.world_size > 1 and not getattr(exception, "on_all_ranks", False):
            # the other processes may be waiting elsewhere: saving together would hang
            logger.warning("not saved: one of several processes failed; the last checkpoint is %s", self.path)
            return
        self.save(trainer, pl_module)
        logger.warning("saved the state after %d batches: %s", pl_module.batches_seen, self.path)

    # ---- signals

    def on_train_start(self, trainer, pl_module) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals reach only the main thread; a notebook's or a test's other threads do without
        self._previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        usr1 = getattr(signal, "SIGUSR1", None)
        if usr1 is not None and signal.getsignal(usr1) == signal.SIG_DFL:  # else SLURM's requeueing has it
            self._previous[usr1] = signal.signal(usr1, self._receive)

    def teardown(self, trainer, pl_module, stage) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self._save_now = True
        elif self._stop is not None:
            raise Interrupted(number)
        else:
            self._stop = number
            logger.warning("stopping after this batch; once more to stop at once")

    def _stop_if_asked(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._previous:  # no signals here, or not yet: a sanity check
            return
        if not trainer.strategy.reduce_boolean_decision(self._stop is not None, all=False):
            return
        self.save(trainer, pl_module)
        raise Interrupted(self._stop or signal.SIGTERM)


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

    def on_fit_start(self, trainer, pl_module) -> None:
        trainer.should_stop = pl_module.batches_seen >= self.batches  # a resumed run may be there already

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.should_stop = trainer.should_stop or pl_module.batches_seen >= self.batches


class SeededBatches(Callback):
    """Make dropout, pkeep and noise a function of (seed, rank, batch), which a resumed run repeats."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        number = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # batches before this one
        torch.manual_seed((self.seed * 1_000_003 + number) * 4099 + trainer.global_rank)


def plain(config: Mapping) -> dict:
    """An OmegaConf configuration as plain dicts and lists, which a safely read checkpoint may hold."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
