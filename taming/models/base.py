"""What both stages share: batches from HWC to BCHW, an own batch counter, the optimizer step, guards.

B batch, C channels, H W pixels.
"""

import math
from collections.abc import Iterable

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from taming.checkpoint import find_checkpoint, load_weights, read_checkpoint
from taming.checkpoint.pretrained import Pretrained
from taming.config import instantiate_from_config


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the weights are still those from before the batch."""

    on_all_ranks = True  # every process raises it, so that they can save together


class ImageModel(Pretrained, pl.LightningModule):
    """A LightningModule that steps its optimizers by hand and counts the batches it has learnt from.

    `save_pretrained(folder)` and `from_pretrained(folder)` are there for all models: see `Pretrained`.

    `trainer.global_step` rises once per optimizer, twice a batch for a GAN; `batches_seen` is what schedules,
    checkpoints and logs count. With accumulation it counts optimizer steps, as Lightning 1.0 did. It is kept
    in checkpoints, outside the state dict.

    Attributes:
        learning_rate: step size of every optimizer; set it before training (main.py does).
        accumulate_grad_batches, gradient_clip_val: what Lightning refuses under manual optimization.
        scheduler: batches seen -> factor on the learning rate, of `scheduler_config`; None: constant.
    """

    def __init__(self, monitor: str | None = None, scheduler_config: dict | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.monitor = monitor
        self.learning_rate: float | None = None
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.batches_seen = 0
        self._accumulated = 0  # batches whose gradients wait for the next step
        self._restored_gradients: dict[str, Tensor] = {}  # such gradients of a run that is resumed
        self.scheduler = instantiate_from_config(scheduler_config) if scheduler_config else None

    # ---- data

    def get_input(self, batch: dict, key: str) -> Tensor:
        """Entry `key` of a batch: images (B, H, W, C) or (B, H, W) become (B, C, H, W), others pass.

        The result is float32, in channels-last memory: no copy is made. Integers that are no images stay as
        they are: labels (B,), tokens (B, M), label maps (B, H, W). The 2021 transformer took (key, batch);
        both orders work.
        """
        if isinstance(batch, str):
            batch, key = key, batch
        if key not in batch:
            raise ValueError(
                f"the batch has no {key!r}, only {sorted(batch)}: check the model's *_key and the dataset"
            )
        x = batch[key]
        if x.ndim == 3 and x.is_floating_point():
            x = x[..., None]
        return x.permute(0, 3, 1, 2).float() if x.ndim == 4 else x

    # ---- optimization

    def base_learning_rate(self) -> float:
        """The learning rate, or an error that says how to set it."""
        if self.learning_rate is None:
            raise ValueError("no learning rate: set model.learning_rate = ... before trainer.fit(model)")
        return self.learning_rate

    def update_weights(
        self, loss: Tensor, optimizers: Iterable[tuple[Optimizer, Iterable[nn.Parameter]]]
    ) -> None:
        """Backpropagate one batch's loss; on the last of `accumulate_grad_batches`, clip, step and count.

        All losses come in one sum, and go through one backward pass: what plain `ddp` needs. Optimizers whose
        parameters got no gradient are left alone. A parameter group's `lr_factor` multiplies its rate.
        """
        self.manual_backward(loss / self.accumulate_grad_batches)
        self._accumulated += 1
        if self._accumulated < self.accumulate_grad_batches and not self.trainer.is_last_batch:
            return
        factor = float(self.scheduler(self.batches_seen)) if self.scheduler else 1.0
        for optimizer, parameters in optimizers:
            parameters = [p for p in parameters if p.grad is not None]
            if not parameters:
                continue
            for group in optimizer.param_groups:
                group["lr"] = self.base_learning_rate() * factor * group.get("lr_factor", 1.0)
            if self.gradient_clip_val:
                scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16 gradients
                limit = self.gradient_clip_val * (scaler.get_scale() if scaler else 1.0)
                nn.utils.clip_grad_norm_(parameters, limit)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.batches_seen += 1
        self._accumulated = 0

    def on_validation_model_zero_grad(self) -> None:
        """Free the gradients during a validation, but not those that wait for the rest of their batches."""
        if not self._accumulated:
            super().on_validation_model_zero_grad()

    def check_finite(self, losses: dict[str, Tensor], batch_idx: int) -> None:
        """Raise `NonFiniteLoss`, on all processes, naming every term that is NaN or infinite.

        Called before the weights change.
        """
        tensors = [torch.as_tensor(value, device=self.device).float().mean() for value in losses.values()]
        fine = bool(torch.stack(tensors).isfinite().all())  # one wait for the device
        if self.trainer.strategy.reduce_boolean_decision(fine, all=True):
            return
        values = dict(zip(losses, map(float, tensors), strict=True))
        bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        raise NonFiniteLoss(
            f"{', '.join(bad) or 'the loss of another process is not finite'} at batch {batch_idx} of epoch "
            f"{self.current_epoch} ({self.batches_seen} batches learnt from). Try a lower learning rate, "
            "gradient_clip_val: 1.0, or precision bf16-mixed instead of 16-mixed"
        )

    # ---- test: the same evaluation as validation, under "test/" names

    def log(self, name: str, *args, **kwargs) -> None:
        """Log a value; what validation calls val/... is test/... in a test."""
        if self._trainer is not None and self._trainer.testing and name.startswith("val/"):
            name = "test/" + name.removeprefix("val/")
        super().log(name, *args, **kwargs)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    # ---- checkpoints

    def init_from_ckpt(self, path: str, ignore_keys: Iterable[str] = ()) -> None:
        """Take the weights of a checkpoint, all but keys that begin with one of `ignore_keys`."""
        checkpoint = read_checkpoint(find_checkpoint(path))
        # a stage that is only used has no loss, and an old one's loss holds networks that are kept apart now
        load_weights(
            self, checkpoint["state_dict"], source=str(path), ignore=tuple(ignore_keys), optional=("loss.",)
        )

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["batches_seen"] = self.batches_seen
        if self._accumulated:
            gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
            checkpoint["accumulated"] = {"batches": self._accumulated, "gradients": gradients}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.batches_seen = int(checkpoint.get("batches_seen", checkpoint.get("global_step", 0)))
        waiting = checkpoint.get("accumulated", {"batches": 0, "gradients": {}})
        self._accumulated = waiting["batches"]
        self._restored_gradients = waiting["gradients"]

    def on_train_start(self) -> None:
        """Put the gradients of a resumed run in place: the trainer has cleared all by now."""
        for name, gradient in self._restored_gradients.items():
            parameter = self.get_parameter(name)
            parameter.grad = gradient.to(parameter, copy=True)
        self._restored_gradients = {}
