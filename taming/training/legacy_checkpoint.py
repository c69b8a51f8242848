"""Resume a run of 2020-2021: counters and optimizer states of Lightning 1, put where they are read now."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch.optim import Optimizer

COUNTS = ("ready", "started", "processed", "completed")


def batches_seen(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of batches that the model of a checkpoint has learned from."""
    return int(checkpoint.get("batches_seen", checkpoint.get("global_step", 0)))


class ResumeLegacyRun(Callback):
    """Take over epochs, batches and optimizer states of a checkpoint that has no `batches_seen`.

    Lightning 1 wrote the number of finished epochs, and that of batches as steps, also for a GAN. The states
    of its callbacks are not needed.
    """

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if "batches_seen" in checkpoint:
            return
        checkpoint["callbacks"] = {}
        loop = checkpoint["loops"]["fit_loop"]  # made by Lightning's own migration, but for these counts
        for scope in ("total", "current"):
            loop["epoch_progress"][scope] |= dict.fromkeys(COUNTS, checkpoint["epoch"])
        loop["epoch_loop.batch_progress"]["total"] |= dict.fromkeys(COUNTS, checkpoint["global_step"])
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]  # of the curves
        optimizers = pl_module.configure_optimizers()  # the trainer has not made its own yet
        optimizers = optimizers[0] if isinstance(optimizers, tuple) else optimizers
        if isinstance(optimizers, Optimizer) and len(optimizers.param_groups) > 1:  # a transformer's
            sort_by_name(checkpoint["optimizer_states"][0], optimizers, pl_module)


def sort_by_name(state: dict[str, Any], optimizer: Optimizer, model: pl.LightningModule) -> None:
    """Bring a state whose groups are in the order of their names, as in 2021, into the optimizer's order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        own = [names[parameter] for parameter in group["params"]]
        position = dict(zip(sorted(own), saved["params"], strict=True))
        saved["params"] = [position[name] for name in own]
