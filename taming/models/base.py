"""What both stages share: batches from HWC to BCHW, an own batch counter, parts of the step, guards.

B batch, C channels, H W pixels.
"""

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from taming.checkpoint import checkpoint_weights, fill_model, find_checkpoint, read_checkpoint
from taming.checkpoint.pretrained import Pretrained
from taming.config import instantiate_from_config
from taming.models.averages import WeightAverages
from taming.modules.distributed import sharded_like, whole
from taming.parameters import did_you_mean, mismatch

logger = logging.getLogger(__name__)

NORM = "the norm of gradient"
MOST_SKIPPED = 10  # batches in a row with a gradient that is not finite; the weights are beyond repair then


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; the weights are still those from before the batch."""

    on_all_ranks = True  # every process raises it, so that they can save together


class LatentGenerator:
    """The contract of a model that turns noise into images without codes: a VAE's decoder, a GAN."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Generate images (n, C, H, W), about in [-1, 1]; the generator makes the noise."""
        raise NotImplementedError


class ImageModel(Pretrained, pl.LightningModule):
    """A LightningModule that steps its optimizers by hand and counts the batches it has learned from.

    `save_pretrained(folder)` and `from_pretrained(folder)` are there for all models: see `Pretrained`.

    `trainer.global_step` rises once per optimizer, twice a batch for a GAN; `batches_seen` is what schedules,
    checkpoints and logs count. With accumulation it counts optimizer steps, as Lightning 1.0 did. It is kept
    in checkpoints, outside the state dict.

    Attributes:
        learning_rate: step size of every optimizer; set it before training (main.py does).
        accumulate_grad_batches, gradient_clip_val: what Lightning does not do under manual optimization.
        scheduler: batches seen -> factor on the learning rate, of `scheduler_config`; None: constant.
        skips_losses: leave a batch out whose loss is not finite, as one whose gradient is not; see `Health`.
        averages: of the weights, for validation and use; None: they are not kept. See `keep_averages`.
        frozen: names of the parts that are not trained; see `freeze_parts`.
    """

    PARTNERS: ClassVar[dict[str, str]] = {}  # a part -> another that is frozen with it

    def __init__(self, monitor: str | None = None, scheduler_config: dict | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.monitor = monitor
        self.learning_rate: float | None = None
        self.accumulate_grad_batches = 1
        self.gradient_clip_val: float | None = None
        self.batches_seen = 0
        self.skips_losses = False
        self.skipped_batches = 0  # in a row, since their gradient was not finite
        self._accumulated = 0  # batches whose gradients wait for the next step
        self._before = (0, 0, 0)  # the counters when the batch came
        self._restored_gradients: dict[str, Tensor] = {}  # such gradients of a run that is resumed
        self.shown: dict[str, Any] = {}  # numbers of the last batch for the progress bar, on the device
        self._watched: dict[str, Tensor] = {}  # losses and gradient norms of the batch
        self._waiting: _Copied | None = None  # those of the batch before, on their way from the device
        self.scheduler = instantiate_from_config(scheduler_config) if scheduler_config else None
        self.frozen: tuple[str, ...] = ()
        self.averages: WeightAverages | None = None
        self._averaged_batches = 0  # `batches_seen` at their last update
        self._trained: dict[str, Tensor] = {}  # the trained weights while their averages are in place

    # ---- data

    def get_input(self, batch: dict, key: str) -> Tensor:
        """Entry `key` of a batch: images (B, H, W, C) or (B, H, W) become (B, C, H, W), others pass.

        The result is float32, in channels-last memory: no copy is made. Integers that are not images stay as
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

    def batch_size_of(self, batch: dict) -> int:
        """Return the number of items of a batch."""
        return next(len(value) for value in batch.values() if isinstance(value, Tensor))

    def check_batch(self, batch: dict) -> None:
        """Raise ValueError if a batch, on the CPU, does not fit the model: called before training."""

    @property
    def validation_metrics(self) -> tuple[str, ...] | None:
        """Names that validation logs, without "val/"; None if they are not known before."""
        return None

    def validators(self) -> Mapping[str, Any]:
        """Return what checks entries of a batch by their keys, each with a method `validate(value)`."""
        return {}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check values of the batch while they are on the CPU, where no device must be waited for."""
        if isinstance(batch, dict):
            for key, part in self.validators().items():
                if isinstance(batch.get(key), Tensor):
                    part.validate(batch[key])
        return batch

    # ---- what a step consists of

    tokens_per_image: int | None = None  # that a prior learns from

    def blocks(self) -> dict[str, nn.Module]:
        """Return the parts in which a training step spends its time, by name.

        They are compiled, or computed again in the backward pass, each by itself: see
        `taming.training.acceleration`. By default these are the composite parts of all networks that are
        trained, and the discriminator of the loss.
        """
        found: dict[str, nn.Module] = {}
        for name, network in self.named_children():
            if name == "loss" or not any(p.requires_grad for p in network.parameters()):
                continue
            for part, child in network.named_children():
                several = isinstance(child, nn.ModuleList | nn.Sequential)
                for key, block in child.named_children() if several else [("", child)]:
                    if any(True for _ in block.children()):
                        found[".".join(filter(None, (name, part, key)))] = block
        discriminator = getattr(getattr(self, "loss", None), "discriminator", None)
        return found if discriminator is None else {**found, "loss.discriminator": discriminator}

    # ---- optimization, by hand: the pieces of `training_step`

    def base_learning_rate(self) -> float:
        """Return the learning rate, or raise a ValueError that says how to set it."""
        if self.learning_rate is None:
            raise ValueError("no learning rate: set model.learning_rate = ... before trainer.fit(model)")
        return self.learning_rate

    @property
    def has_fused_step(self) -> bool:
        """Whether torch takes a whole step of Adam in one kernel on the model's device."""
        return self.device.type in ("cpu", "cuda")

    def gradients_complete(self) -> bool:
        """Count a batch's gradients; False while they wait for the rest of `accumulate_grad_batches`."""
        self._accumulated += 1
        if self._accumulated < self.accumulate_grad_batches and not self.trainer.is_last_batch:
            return False
        self._accumulated = 0
        return True

    def set_learning_rate(self, optimizer: Optimizer) -> float:
        """Set the rate for the batches seen so far, times a parameter group's `lr_factor`; return it."""
        factor = float(self.scheduler(self.batches_seen)) if self.scheduler else 1.0
        rate = self.base_learning_rate() * factor
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        return rate

    def clip_grad_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clip gradients to the norm `gradient_clip_val`, if it is set; return their norm before, ()."""
        parameters = [p for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16 gradients
        scale = scaler.get_scale() if scaler else 1.0
        if self.gradient_clip_val:
            nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_val * scale, norm)
        return whole(norm) / scale

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep a gradient that is not finite out of the weights, whatever callbacks did to it."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters or getattr(self.trainer.precision_plugin, "scaler", None):  # which does the same
            return
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters]))
        self._watched[f"{NORM} {len(self._watched)}"] = norm
        if norm.device.type != "cpu":
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # read by fused steps
        elif not norm.isfinite():
            for p in parameters:
                p.grad = None  # the step then leaves the weights, and its own state, alone

    # ---- parts that are not trained

    def freeze_parts(self, names: str | Sequence[str]) -> None:
        """Leave parts as they are: without gradients, in eval mode, and out of the averages.

        Running statistics, and codebooks that follow running means, then stay as well. Call it before
        training.

        Args:
            names: of submodules, `encoder` or `decoder.up.0` for instance.

        Raises:
            ValueError: there is no such part, it is part of the loss, or nothing would be left to train.
        """
        if wrong := mismatch(names, str | list[str]):
            raise ValueError(f"freeze: {names!r} must be {wrong}, names of parts: [encoder, quantize]")
        names = [names] if isinstance(names, str) else list(names)
        parts = {name for name, _ in self.named_modules() if name and name.split(".")[0] != "loss"}
        for name in names:
            if name.split(".")[0] == "loss":
                raise ValueError(f"freeze: {name} is of the loss; disc_factor: 0 trains no discriminator")
            if name not in parts:
                there = ", ".join(part for part in self._modules if part != "loss")
                raise ValueError(
                    f"freeze: {type(self).__name__} has no part {name!r}{did_you_mean(name, parts)}; its "
                    f"parts are {there}, and parts of these"
                )
        names += [other for name in names if (other := self.PARTNERS.get(name)) in self._modules]
        self.frozen = tuple(dict.fromkeys((*self.frozen, *names)))
        for name in names:
            self.get_submodule(name).requires_grad_(False).eval()
        if not any(p.requires_grad for n, p in self.named_parameters() if not n.startswith("loss.")):
            raise ValueError(f"freeze: {', '.join(self.frozen)} is all there is: nothing is left to train")

    def train(self, mode: bool = True) -> Self:
        """Switch all but the frozen parts, which stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    # ---- averages of the weights

    def keep_averages(self, decay: float | None, warmup: bool = True) -> None:
        """Average the weights from now on, in training; a `decay` of None does not.

        Validation and tests, `save_pretrained`, and what is loaded from the run's checkpoints use the
        averages. Weights of the loss, and of frozen parts and stages, are not averaged; buffers that are
        no whole numbers are. Each optimizer step updates them once, after the batch.

        Raises:
            ValueError: `decay` is out of range; see `WeightAverages`.
        """
        self.averages = None if decay is None else WeightAverages(decay, warmup)

    def averaged_tensors(self) -> dict[str, Tensor]:
        """Return the weights that are averaged, by their names in the state dict."""
        others = tuple(f"{name}." for name in ("loss", *self.frozen))
        return {
            name: tensor for name, tensor in self.state_dict(keep_vars=True).items()
            if tensor.is_floating_point() and not name.startswith(others)
        }

    def update_averages(self) -> None:
        """Let the averages follow, if there was a step since the last call."""
        if self.averages is not None and self.batches_seen != self._averaged_batches:
            self.averages.update(self.averaged_tensors())
            self._averaged_batches = self.batches_seen

    def _use_averages(self, use: bool) -> None:
        """Put the averages in place of the trained weights, or these back; no data is copied."""
        if use and not self._trained and self.averages is not None and self.averages.updates:
            tensors = self.averaged_tensors()
            self.averages.match_devices(tensors)
            self._trained = {name: tensor.data for name, tensor in tensors.items()}
            with torch.inference_mode(False):
                for name, tensor in tensors.items():
                    tensor.data = self.averages.weights[name].to(tensor.dtype)
        elif not use and self._trained:
            tensors = self.averaged_tensors()
            for name, trained in self._trained.items():
                tensors[name].data = trained
            self._trained = {}

    @contextmanager
    def averaged_weights(self, use: bool = True) -> Iterator[None]:
        """Return a context in which the weights are their averages, if any are kept; or the trained ones."""
        before = bool(self._trained)
        self._use_averages(use)
        try:
            yield
        finally:
            self._use_averages(before)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights, the averages if any are kept, and config; see `Pretrained.save_pretrained`."""
        with self.averaged_weights():
            return super().save_pretrained(folder)

    def on_validation_start(self) -> None:
        """Validate the averages."""
        self._use_averages(True)

    def on_validation_end(self) -> None:
        """Go on with the trained weights."""
        self._use_averages(False)

    def on_test_start(self) -> None:
        """Test the averages."""
        self._use_averages(True)

    def on_test_end(self) -> None:
        """Go on with the trained weights."""
        self._use_averages(False)

    # ---- guards

    def check_finite(self, losses: Mapping[str, Tensor | float], batch_idx: int) -> None:
        """Raise `NonFiniteLoss`, on all processes, naming every term that is NaN or infinite.

        On the CPU before the weights change. On an accelerator one batch later, so that nothing waits for
        the device; a gradient that is not finite leaves the weights alone in the meantime.
        """
        values = {key: torch.as_tensor(v, device=self.device).float().mean() for key, v in losses.items()}
        if self.device.type == "cpu":
            fine = all(value.isfinite() for value in values.values())
            fine = self.trainer.strategy.reduce_boolean_decision(fine, all=True)
            if not fine and not self.skips_losses:
                raise _not_finite(values, self._where(batch_idx))
        else:
            self._watched |= values

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forget what was watched in the batch before."""
        self._watched = {}
        self._before = self.trainer.global_step, self.batches_seen, self._accumulated

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at losses and gradients; see `check_finite`. Stop a `training_step` that trains nothing."""
        idle = self._before == (self.trainer.global_step, self.batches_seen, self._accumulated)
        returned = isinstance(outputs, Mapping) and "loss" in outputs
        if returned and idle and all(p.grad is None for p in self.parameters()):
            raise ValueError(
                f"{type(self).__name__}.training_step returned a loss, which nothing learns from here: call "
                "self.manual_backward(loss) and step the optimizers in it, as VQModel.training_step does"
            )
        self.update_averages()
        now = _Copied(self._watched, self._where(batch_idx))
        self.on_train_end()  # the batch before
        if now.event is None:  # nothing to wait for
            self._look_at(now)
        else:
            self._waiting = now

    def on_train_end(self) -> None:
        """Look at the batch that is still on its way."""
        before, self._waiting = self._waiting, None
        if before is not None:
            self._look_at(before)

    def _look_at(self, copied: "_Copied") -> None:
        values = copied.read()
        norms = {key: value for key, value in values.items() if key.startswith(NORM)}
        losses = {key: value for key, value in values.items() if key not in norms}
        if not self.skips_losses and not all(map(math.isfinite, losses.values())):
            raise _not_finite(losses, copied.where)
        if all(map(math.isfinite, norms.values())):
            self.skipped_batches = 0
            return
        self.skipped_batches += 1
        logger.warning("the gradient is not finite %s: the weights were left as they are", copied.where)
        if self.skipped_batches >= MOST_SKIPPED:
            raise _not_finite(norms, copied.where)

    def _where(self, batch_idx: int) -> str:
        epoch, seen = self.current_epoch, self.batches_seen
        return f"at batch {batch_idx} of epoch {epoch} ({seen} batches learned from)"

    def setup(self, stage: str) -> None:
        """Stop what was written for Lightning 1, and would train nothing or not as meant."""
        self._use_averages(False)  # an error may have ended a validation
        name = type(self).__name__
        if "optimizer_idx" in inspect.signature(self.training_step).parameters:
            raise ValueError(
                f"{name}.training_step takes optimizer_idx, which Lightning no longer gives: write "
                "training_step(self, batch, batch_idx) with one forward for all losses, self.manual_backward "
                "of their sum, and a step of each optimizer, as VQModel.training_step does"
            )

    def on_validation_model_zero_grad(self) -> None:
        """Free the gradients during a validation, but not those that wait for the rest of their batches."""
        if not self._accumulated:
            super().on_validation_model_zero_grad()

    # ---- test: the same evaluation as validation, under "test/" names

    def log(self, name: str, value: Any, prog_bar: bool = False, *args, **kwargs) -> None:
        """Log a value; what validation calls val/... is test/... in a test.

        Lightning reads values for its progress bar in every batch, and would wait for the device: those of
        training steps are kept in `shown` instead, where `Progress` reads them when it shows a line.
        """
        if self._trainer is not None and self._trainer.testing and name.startswith("val/"):
            name = "test/" + name.removeprefix("val/")
        if prog_bar and self._trainer is not None and self._trainer.training:
            prog_bar = False
            self.shown[name] = value.detach() if isinstance(value, Tensor) else value
        super().log(name, value, prog_bar, *args, **kwargs)

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    # ---- checkpoints

    def init_from_ckpt(self, path: str, ignore_keys: str | Sequence[str] = ()) -> None:
        """Take the weights of a checkpoint, all but keys that begin with one of `ignore_keys`.

        Those of a published checkpoint get the names that they have here. Where the checkpoint has averages
        of its weights, these are taken.
        """
        state = checkpoint_weights(read_checkpoint(find_checkpoint(path), tensors=("state_dict", "ema")))
        # a stage that is only used has no loss, and an old one's loss holds networks that are kept apart now
        fill_model(self, state, source=str(path), ignore=ignore_keys, optional=("loss.",))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["batches_seen"] = self.batches_seen
        if self._trained:  # in validation the averages are in their place
            checkpoint["state_dict"] |= self._trained
        self.update_averages()  # a callback may save before this batch has ended here
        if self.averages is not None and self.averages.updates:
            checkpoint["ema"] = self.averages.state_dict()
        if self._accumulated:
            gradients = {
                name: whole(p.grad) for name, p in self.named_parameters() if p.grad is not None
            }
            checkpoint["accumulated"] = {"batches": self._accumulated, "gradients": gradients}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.batches_seen = int(checkpoint.get("batches_seen", checkpoint.get("global_step", 0)))
        waiting = checkpoint.get("accumulated", {"batches": 0, "gradients": {}})
        self._accumulated = waiting["batches"]
        self._restored_gradients = waiting["gradients"]
        self._averaged_batches = self.batches_seen
        if "ema" in checkpoint:
            if self.averages is None:
                logger.warning("the checkpoint's averages of weights are left out: set model.ema_decay")
            else:
                self.averages.load_state_dict(checkpoint["ema"], self.averaged_tensors())

    def on_train_start(self) -> None:
        """Put the gradients of a resumed run in place: the trainer has cleared all by now."""
        if self.lr_schedulers():
            raise ValueError(
                f"{type(self).__name__}.configure_optimizers returned a scheduler of the learning rate, "
                "which nothing steps here: give scheduler_config, a callable from batches to a factor"
            )
        for name, gradient in self._restored_gradients.items():
            parameter = self.get_parameter(name)
            gradient = gradient.to(parameter.device, parameter.dtype, copy=True)
            parameter.grad = sharded_like(gradient, parameter)
        self._restored_gradients = {}


class _Copied:
    """Numbers of one batch on their way from a GPU to the CPU, read when they have arrived.

    NaN of any process comes to all of them.

    Args:
        values: scalars by name.
        where: the batch, for messages.
    """

    def __init__(self, values: Mapping[str, Tensor], where: str):
        self.names, self.where = list(values), where
        self.event: torch.cuda.Event | None = None
        numbers = [value.detach().float() for value in values.values()]
        self.numbers = torch.stack(numbers) if numbers else torch.zeros(0)
        if self.numbers.is_cuda:
            if dist.is_initialized():
                dist.all_reduce(self.numbers)  # a sum with a NaN is NaN
            pinned = torch.empty(len(values), pin_memory=True)
            self.numbers = pinned.copy_(self.numbers, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> dict[str, float]:
        """Return the numbers by name; waits for the copy alone."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.numbers.tolist(), strict=True))


def _not_finite(values: Mapping[str, Tensor | float], where: str) -> NonFiniteLoss:
    bad = [f"{name} = {float(value)}" for name, value in values.items() if not math.isfinite(value)]
    return NonFiniteLoss(
        f"{', '.join(bad) or 'the loss of another process is not finite'} {where}. Try a lower learning "
        "rate, gradient_clip_val: 1.0, or precision bf16-mixed instead of 16-mixed"
    )
