"""The run directory, the random numbers of each batch, and the end of training after so many batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback


class SetupCallback(Callback):
    """Make the run directory, and write the configuration into it and into every checkpoint.

    The run directory is the trainer's `default_root_dir`.

    Args:
        now: time stamp of this start, the prefix of the config files' names.
        config: the whole resolved configuration as plain dicts: {"model", "data", "lightning"}.
    """

    def __init__(self, now: str, config: dict[str, Any]):
        self.now, self.config = Path(now).name, config

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.global_rank != 0 or stage != "fit":
            return
        run = Path(trainer.default_root_dir)
        for name in ("configs", "checkpoints", "images"):
            (run / name).mkdir(parents=True, exist_ok=True)
        project = {key: value for key, value in self.config.items() if key != "lightning"}
        parts = {"project": project, "lightning": {"lightning": self.config.get("lightning", {})}}
        for kind, part in parts.items():
            OmegaConf.save(OmegaConf.create(part), run / "configs" / f"{self.now}-{kind}.yaml")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self.config


class StopAfterBatches(Callback):
    """End training after so many batches: `max_steps`, which Lightning would count once per optimizer."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
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


def plain(config: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Return a configuration as plain dicts and lists, which a safely read checkpoint may hold."""
    found: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
    return found
