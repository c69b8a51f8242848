"""Health of a run: faults that training alone does not end, said, written into the curves, and acted on.

A fault is said once when it begins, and is a column `health/NAME` of the curves: 1 where it begins or is
acted on, 0 where it is over.
"""

import logging
from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from taming.modules.dvae.relaxation import GumbelSoftmax
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from taming.training.callbacks.saving import reset_running_statistics

logger = logging.getLogger(__name__)

ACTIONS = {
    "non_finite": ("warn", "skip", "lower", "stop"),
    "adaptive_weight": ("warn", "lower", "restart", "stop"),
    "discriminator": ("warn", "lower", "restart", "stop"),
    "codes": ("warn", "restart", "stop"),
}


class Unhealthy(RuntimeError):
    """A fault for which `Health` was told to stop; the state is saved, since all processes raise it."""

    on_all_ranks = True


class Health(Callback):
    """Watch for gradients that are not finite, a discriminator that has won, and codes that nothing uses.

    Each fault has an action; None does not look for it. "warn" says it. "stop" saves and ends training with
    `Unhealthy`. The others change training, and the change is part of the checkpoint. The faults:

    * `non_finite`, a NaN or infinite loss or gradient. "warn" leaves it to the model: a loss ends the run, a
      gradient is left out, and several in a row end the run. "skip": a loss is left out as well. "lower":
      and all learning rates are halved. "stop": a gradient ends the run at once.
    * `adaptive_weight`, `train/d_weight` above `d_weight_max`. "lower": bound it there from now on.
      "restart": initialise the discriminator again.
    * `discriminator`, `train/disc_loss` below `disc_loss_min`: it has won, and teaches nothing. "lower":
      halve its learning rate. "restart": initialise it again.
    * `codes`, `val/codebook_usage_percent` below `usage_min` in a validation. "restart": make unused codes
      copies of used ones, in proportion to their use, with noise.

    Args:
        non_finite, adaptive_weight, discriminator, codes: the actions.
        every_n_batches: batches between two looks at losses; a look waits for the device.
        patience: looks in a row that must find a fault.
        d_weight_max: of the adaptive weight, which is 0.1 to 10 in a healthy run.
        disc_loss_min: of the discriminator's loss; it begins at 1.0 (hinge) or 0.7 (vanilla).
        usage_min: percent of the codes.

    Raises:
        ValueError: an unknown action, or an interval that is not positive; at the start of training, an
            action that the model has no part for.
    """

    def __init__(
        self, non_finite: str | None = "warn", adaptive_weight: str | None = "warn",
        discriminator: str | None = "warn", codes: str | None = "warn", *, every_n_batches: int = 20,
        patience: int = 5, d_weight_max: float = 1000.0, disc_loss_min: float = 0.02, usage_min: float = 5.0,
    ):
        self.actions = {
            "non_finite": non_finite, "adaptive_weight": adaptive_weight, "discriminator": discriminator,
            "codes": codes,
        }
        for fault, action in self.actions.items():
            if action is not None and action not in ACTIONS[fault]:
                known = ", ".join(ACTIONS[fault])
                raise ValueError(f"health.{fault}: {action!r} is unknown; choose {known} or null")
        if every_n_batches < 1 or patience < 1:
            raise ValueError(
                "health.every_n_batches and health.patience must be at least 1, got "
                f"{every_n_batches} and {patience}"
            )
        self.every_n_batches, self.patience = every_n_batches, patience
        self.d_weight_max, self.disc_loss_min, self.usage_min = d_weight_max, disc_loss_min, usage_min
        self._looks = dict.fromkeys(ACTIONS, 0)  # in a row that found the fault
        self._present: set[str] = set()  # faults that were said and are not over
        self._bounded: float | None = None  # the adaptive weight, from now on
        self._last_look = self._skipped = 0

    def state_dict(self) -> dict[str, Any]:
        return {"looks": dict(self._looks), "present": sorted(self._present), "bounded": self._bounded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._looks |= state_dict["looks"]
        self._present, self._bounded = set(state_dict["present"]), state_dict["bounded"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Check that the model has what the actions change; bound the adaptive weight of a resumed run."""
        discriminator = getattr(getattr(pl_module, "loss", None), "discriminator", None)
        for fault in ("adaptive_weight", "discriminator"):
            if self.actions[fault] in ("lower", "restart") and discriminator is None:
                raise ValueError(f"health.{fault}: {self.actions[fault]} needs a loss with a discriminator")
        if self.actions["codes"] == "restart" and not can_restart_codes(pl_module):
            raise ValueError(f"health.codes: restart {why_no_restart(pl_module)}")
        pl_module.skips_losses = self.actions["non_finite"] in ("skip", "lower")
        if self._bounded is not None:
            pl_module.loss.disc_weight_max = self._bounded
        self._last_look = pl_module.batches_seen

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        skipped = pl_module.skipped_batches  # without this batch, which the model looks at next
        if skipped > self._skipped:
            self._found(trainer, pl_module, "non_finite", "a loss or gradient is not finite")
        elif skipped < self._skipped:
            self._over(trainer, "non_finite")
        self._skipped = skipped
        batches = pl_module.batches_seen
        if batches == self._last_look or batches % self.every_n_batches:
            return
        self._last_look = batches
        weight, loss = self._mean(trainer, "train/d_weight"), self._mean(trainer, "train/disc_loss")
        self._judge(
            trainer, pl_module, "adaptive_weight", weight is not None and weight > self.d_weight_max,
            f"the adaptive weight is {weight or 0.0:.3g} (d_weight_max: {self.d_weight_max}); the generator "
            "gets no gradient from the discriminator",
        )
        self._judge(
            trainer, pl_module, "discriminator", loss is not None and loss < self.disc_loss_min,
            f"the discriminator has won: its loss is {loss or 0.0:.3g} (disc_loss_min: {self.disc_loss_min})",
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        usage = self._mean(trainer, "val/codebook_usage_percent")
        if usage is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._looks["codes"] = self.patience - 1  # one validation is enough
        self._judge(
            trainer, pl_module, "codes", usage < self.usage_min,
            f"{usage:.3g} % of the codes are in use (usage_min: {self.usage_min})",
        )

    @staticmethod
    def _mean(trainer: pl.Trainer, name: str) -> float | None:
        """Return a logged value, averaged over all processes, which must come to the same verdict."""
        value = trainer.callback_metrics.get(name)
        return None if value is None else float(trainer.strategy.reduce(value, reduce_op="mean"))

    def _judge(
        self, trainer: pl.Trainer, pl_module: Any, fault: str, bad: bool, words: str
    ) -> None:
        """Count looks that found a fault, and act on each `patience` of them in a row."""
        self._looks[fault] = self._looks[fault] + 1 if bad else 0
        if not bad:
            self._over(trainer, fault)
        elif self._looks[fault] >= self.patience:
            self._looks[fault] = 0
            self._found(trainer, pl_module, fault, words)

    def _over(self, trainer: pl.Trainer, fault: str) -> None:
        if fault in self._present:
            self._present.remove(fault)
            self._log(trainer, fault, 0.0)

    def _found(self, trainer: pl.Trainer, pl_module: Any, fault: str, words: str) -> None:
        action = self.actions[fault]
        if action is None or (action == "warn" and fault in self._present):
            return
        self._present.add(fault)
        self._log(trainer, fault, 1.0)
        batches = f"health: after {pl_module.batches_seen} batches {words}"
        if action == "stop":
            raise Unhealthy(f"{batches}. Stopped, as lightning.callbacks.health.params.{fault} says")
        done = self._act(trainer, pl_module, fault, action)
        if trainer.is_global_zero:
            logger.warning("%s%s", batches, f": {done}" if done else "")

    @staticmethod
    def _log(trainer: pl.Trainer, fault: str, value: float) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for curves in trainer.loggers:  # not by self.log, which would lose it between two logged batches
            curves.log_metrics({f"health/{fault}": value}, step=step)

    # ---- actions

    def _act(self, trainer: pl.Trainer, pl_module: Any, fault: str, action: str) -> str:
        """Change training, on all processes alike, and return what was done."""
        if action == "warn":
            return ""
        if fault == "codes":
            with pl_module.averaged_weights(False):  # which were validated
                return f"{restart_codes(pl_module)} of them moved to codes in use"
        if fault == "non_finite":
            reset_running_statistics(pl_module)
            if action == "skip":
                return "skipped"
            lower_rate(trainer, pl_module.parameters())
            return "skipped, and all learning rates halved"
        discriminator = pl_module.loss.discriminator
        if action == "restart":
            restart_discriminator(trainer, pl_module.loss, seed=pl_module.batches_seen)
            return "the discriminator begins again"
        if fault == "discriminator":
            lower_rate(trainer, discriminator.parameters())
            return "its learning rate halved"
        self._bounded = pl_module.loss.disc_weight_max = self.d_weight_max
        return f"bounded at {self.d_weight_max}"


def lower_rate(trainer: pl.Trainer, parameters: Iterable[nn.Parameter]) -> None:
    """Halve the learning rate of the optimizer groups that hold any of these parameters."""
    concerned = {id(parameter) for parameter in parameters}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if any(id(parameter) in concerned for parameter in group["params"]):
                group["lr_factor"] = 0.5 * group.get("lr_factor", 1.0)  # see ImageModel.set_learning_rate


def restart_discriminator(trainer: pl.Trainer, loss: Any, seed: int) -> None:
    """Initialise a loss's discriminator again, alike on all processes, and forget its gradients' moments."""
    with torch.random.fork_rng(devices=[]):  # random numbers of the CPU are the same everywhere
        torch.manual_seed(seed)
        fresh = loss.build_discriminator()
    loss.discriminator.load_state_dict(fresh.state_dict())
    for optimizer in trainer.optimizers:
        for parameter in loss.discriminator.parameters():
            optimizer.state.pop(parameter, None)


def can_restart_codes(pl_module: Any) -> bool:
    """Return whether the model has codes that can be moved, each counted on its own in validation."""
    quantizer = getattr(pl_module, "quantize", None)
    frozen = "quantize" in getattr(pl_module, "frozen", ())
    return isinstance(quantizer, VectorQuantizer2) and quantizer.remap is None and not frozen


def why_no_restart(pl_module: Any) -> str:
    """Say why no codes can be moved."""
    quantizer = getattr(pl_module, "quantize", None)
    if isinstance(quantizer, GumbelQuantize | GumbelSoftmax):  # an unused code keeps its low logits
        return (
            f"moves the vectors of codes, but {type(quantizer).__name__} chooses codes by logits, which that "
            "leaves as they are: raise kl_weight, or begin with a higher temperature, and set codes: warn"
        )
    return "needs a codebook of vectors, not frozen, without remap"


@torch.no_grad()
def restart_codes(pl_module: Any) -> int:
    """Move the codes that the last validation did not use next to codes that it did; return how many.

    A used code is copied in proportion to its use and moved by 1 % of the codebook's deviation, so that both
    share its latents (Linde, Buzo and Gray 1980, "An Algorithm for Vector Quantizer Design").
    """
    counts = pl_module.val_codes.histogram.cpu()  # (K,), the same on all processes
    codes = pl_module.quantize.embedding.weight.detach().float().cpu()  # (K, C)
    unused = counts == 0
    if unused.all():
        return 0
    generator = torch.Generator().manual_seed(pl_module.batches_seen)
    copied = torch.multinomial(counts.float(), len(counts), replacement=True, generator=generator)
    noise = 0.01 * codes.std() * torch.randn(codes.shape, generator=generator)
    device = pl_module.device
    pl_module.quantize.move_codes(unused.to(device), (codes[copied] + noise).to(device))
    return int(unused.sum())
