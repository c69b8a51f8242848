"""What both stages share: batches, accumulation, clipping, guards and counters."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from taming.models.base import ImageModel, NonFiniteLoss


class Linear(ImageModel):
    """One weight that the loss w * mean(x) pulls down; it notes each batch's gradient and step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weight = nn.Parameter(torch.ones(()))
        self.history, self.norms = [], []

    def training_step(self, batch, batch_idx):
        loss = self.weight * batch.mean()
        self.check_finite({"train/loss": loss.detach(), "constant": 1.0}, batch_idx)
        self.manual_backward(loss / self.accumulate_grad_batches)
        if self.gradients_complete():
            optimizer = self.optimizers()
            self.set_learning_rate(optimizer)
            self.norms.append(float(self.clip_grad_norm([self.weight])))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.batches_seen += 1
        self.history.append((self.batches_seen, round(float(self.weight), 4)))

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=self.base_learning_rate())


def fit(model, batches, tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.tensor(batches)[:, None], batch_size=1))
    return model.history


def test_batches_become_channels_first_without_a_copy():
    batch = {"image": torch.rand(2, 4, 6, 3), "mask": torch.rand(2, 4, 6), "label": torch.tensor([1, 2])}
    model = ImageModel()
    x = model.get_input(batch, "image")
    assert x.shape == (2, 3, 4, 6) and x.data_ptr() == batch["image"].data_ptr()
    assert model.get_input("mask", batch).shape == (2, 1, 4, 6)  # the order of 2021
    assert torch.equal(model.get_input(batch, "label"), batch["label"])
    with pytest.raises(ValueError, match=r"no 'depth', only \['image', 'label', 'mask'\]"):
        model.get_input(batch, "depth")


def test_accumulated_batches_are_averaged_and_the_last_group_may_be_smaller(tmp_path):
    model = Linear()
    model.learning_rate, model.accumulate_grad_batches = 0.1, 2
    history = fit(model, [1.0, 3.0, 2.0, 2.0, 4.0], tmp_path)
    assert history == [(0, 1.0), (1, 0.8), (1, 0.8), (2, 0.6), (3, 0.4)]  # the last: 0.1 * 4 / 2


def test_gradients_are_clipped_by_norm(tmp_path):
    model = Linear()
    model.learning_rate, model.gradient_clip_val = 0.1, 1.0
    assert fit(model, [5.0, 0.5], tmp_path) == [(1, 0.9), (2, 0.85)]
    assert model.norms == [5.0, 0.5]  # before they were clipped


class Poisoned(Linear):
    """The gradient of some batches is NaN under a finite loss, as of sqrt(0)."""

    at = ()

    def on_after_backward(self):
        if self.batches_seen in self.at:
            self.weight.grad.fill_(torch.nan)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tmp_path, caplog):
    model = Poisoned()
    model.learning_rate, model.at = 0.1, (1,)
    assert fit(model, [1.0, 1.0, 1.0], tmp_path) == [(1, 0.9), (2, 0.9), (3, 0.8)]
    assert "the gradient is not finite at batch 1 of epoch 0" in caplog.text and model.skipped_batches == 0
    model = Poisoned()
    model.learning_rate, model.at = 0.1, range(100)
    with pytest.raises(NonFiniteLoss, match="the norm of gradient 0 = nan at batch 9 of epoch 0"):
        fit(model, [1.0] * 20, tmp_path)


def test_a_fused_step_leaves_weights_and_moments_alone_where_it_is_told_of_infinities():
    """What keeps a bad gradient out of the weights on a GPU, without a wait for it."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    for found, moved in ((0.0, True), (1.0, False), (0.0, True)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), torch.nan) if found else torch.ones(3)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        assert torch.equal(weight, before) != moved and weight.isfinite().all()


class OldStep(Linear):
    """Returns a loss, as under automatic optimization."""

    def training_step(self, batch, batch_idx):
        return self.weight * batch.mean()


class OldSignature(Linear):
    def training_step(self, batch, batch_idx, optimizer_idx):
        return self.weight * batch.mean()


class OldSchedule(Linear):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("model, message", [
    (OldStep(), "OldStep.training_step returned a loss, which nothing learns from here: call"),
    (OldSignature(), "OldSignature.training_step takes optimizer_idx, which Lightning no longer gives"),
    (OldSchedule(), "OldSchedule.configure_optimizers returned a scheduler of the learning rate"),
])
def test_what_was_written_for_lightning_1_is_stopped_with_what_to_write(model, message, tmp_path):
    model.learning_rate = 0.1
    with pytest.raises(ValueError, match=message):
        fit(model, [1.0, 1.0], tmp_path)


def test_scheduler_counts_batches(tmp_path):
    model = Linear(scheduler_config={
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {"warm_up_steps": 2, "max_decay_steps": 3, "lr_start": 0.0, "lr_max": 1.0, "lr_min": 0.0},
    })
    model.learning_rate = 0.1
    assert fit(model, [1.0, 1.0, 1.0], tmp_path) == [(1, 1.0), (2, 0.95), (3, 0.85)]


def test_loss_that_is_not_finite_is_named_before_the_weights_change(tmp_path):
    model = Linear()
    model.learning_rate = 0.1
    message = r"^train/loss = inf at batch 1 of epoch 0 \(1 batches learned from\)"
    with pytest.raises(NonFiniteLoss, match=message):
        fit(model, [1.0, torch.inf, 1.0], tmp_path)
    assert float(model.weight) == pytest.approx(0.9)


def test_training_without_a_learning_rate_says_what_to_set(tmp_path):
    with pytest.raises(ValueError, match="set model.learning_rate"):
        fit(Linear(), [1.0], tmp_path)


def test_counter_is_kept_outside_the_state_dict():
    model, checkpoint = Linear(), {}
    model.batches_seen = 7
    model.on_save_checkpoint(checkpoint)
    assert checkpoint == {"batches_seen": 7}
    other = Linear()
    other.on_load_checkpoint(checkpoint)
    assert other.batches_seen == 7 and list(other.state_dict()) == ["weight"]
