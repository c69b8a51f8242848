"""Callbacks apart from whole runs: when images are due and what a sheet holds; progress of the whole run."""

import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import Timer

from taming.images import from_uint8
from taming.training.callbacks import ImageLogger, Progress, StopAfterBatches, plain
from taming.training.callbacks import clock as clock_module
from taming.training.callbacks import progress as progress_module
from taming.training.callbacks.clock import batches_of_run
from taming.training.callbacks.images import sheet
from taming.training.callbacks.progress import duration


class Noise:
    """Stands where a model is: it logs noise, or runs out of memory."""

    batches_seen, device, training = 12, torch.device("cpu"), True

    def __init__(self, full=False):
        self.full, self.modes = full, []

    def eval(self):
        self.train(False)

    def train(self, mode):
        self.training = mode
        self.modes.append(mode)

    def log_images(self, batch, scale=1.0):
        if self.full:
            raise torch.OutOfMemoryError
        assert not torch.is_grad_enabled()
        return {"noise": scale * torch.randn(len(batch["image"]), 3, 4, 4)}


def log(tmp_path, model, **params):
    plugin = SimpleNamespace(forward_context=torch.no_grad)
    trainer = SimpleNamespace(precision_plugin=plugin, default_root_dir=tmp_path, loggers=[])
    batch = {"image": torch.zeros(5, 4, 4, 3), "path": list("abcde")}
    ImageLogger(**params).log_images(trainer, model, batch, "train")
    return tmp_path / "images" / "train" / "sheet_000012.png"


@pytest.mark.parametrize(("powers", "due"), [(True, [1, 2, 4, 6, 12]), (False, [6, 12])])
def test_images_are_due_at_powers_of_two_and_every_n(powers, due):
    logger = ImageLogger(batch_frequency=6, increase_log_steps=powers)
    assert [batch for batch in range(14) if logger.is_due(batch)] == due
    assert not any(ImageLogger(batch_frequency=0).is_due(batch) for batch in range(14))


def test_images_repeat_and_leave_random_numbers_and_mode_alone(tmp_path):
    model, state = Noise(), torch.get_rng_state()
    first = np.asarray(Image.open(log(tmp_path, model, max_images=2)))
    assert first.shape == (8, 14, 3)  # two images of 4x4 with lines of 2 around
    assert torch.equal(torch.get_rng_state(), state)
    assert model.modes == [False, True]
    torch.rand(3)
    assert np.array_equal(np.asarray(Image.open(log(tmp_path, model, max_images=2))), first)


def test_unclamped_images_are_scaled_into_range(tmp_path):
    params = {"clamp": False, "log_images_kwargs": {"scale": 100.0}, "max_images": 1}
    pixels = np.asarray(Image.open(log(tmp_path, Noise(), **params)))[2:-2, 2:-2]
    assert 0 < np.mean((pixels > 0) & (pixels < 255)) and (pixels.min() == 0 or pixels.max() == 255)


def test_full_memory_costs_the_images_only(tmp_path, caplog):
    model = Noise(full=True)
    assert not log(tmp_path, model).exists()
    assert "no images" in caplog.text and model.training


def test_full_disk_costs_the_images_only(tmp_path, caplog, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("taming.training.callbacks.images.save_png", fails)
    log(tmp_path, Noise())
    assert "sheet_000012.png: No space left on device" in caplog.text


@pytest.mark.parametrize(("kinds", "count", "strips"), [(2, 8, 2), (5, 4, 1), (1, 9, 3), (2, 1, 1)])
def test_a_sheet_holds_the_kinds_of_each_item_side_by_side(kinds, count, strips):
    images = [torch.full((count, 3, 4, 4), kind / 8) + torch.arange(count)[:, None, None, None] / 64
              for kind in range(kinds)]
    found = sheet(images)
    columns = strips * kinds
    assert found.shape == (3, -(-count // strips) * 6 + 2, columns * 6 + 2)
    for item, kind in itertools.product(range(count), range(kinds)):
        row, column = item // strips, item % strips * kinds + kind
        assert found[0, row * 6 + 2, column * 6 + 2] == kind / 8 + item / 64


def test_a_sheet_takes_gray_and_small_images():
    small = torch.tensor([[-1.0, 1.0]]).expand(2, 1, 1, 2)  # (B, 1, 1, 2)
    found = sheet([torch.zeros(3, 3, 2, 4), small])  # of three items two have both kinds
    assert found.shape == (3, 2 * 4 + 2, 2 * 6 + 2)
    assert found[:, 2:4, 8:12].flatten(0, 1).eq(torch.tensor([-1.0, -1.0, 1.0, 1.0])).all()


def test_strips_are_named_in_the_file(tmp_path):
    with Image.open(log(tmp_path, Noise(), max_images=1)) as image:
        assert image.info["strips"] == "noise"
        assert np.abs(from_uint8(np.asarray(image)[2:6, 2:6])).max() <= 1.0


# ---- progress


class Clock:
    """Stands where `time` is: seconds pass when told to."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (progress_module, clock_module):
        monkeypatch.setattr(module, "time", clock)
    return clock


def a_trainer(*callbacks, per_epoch=100, max_epochs=-1):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.002}])
    return SimpleNamespace(
        callbacks=callbacks, num_training_batches=per_epoch, max_epochs=max_epochs, current_epoch=3,
        optimizers=[optimizer], progress_bar_metrics={}, is_global_zero=True,
        callback_metrics={"val/loss": torch.tensor(0.5)}, sanity_checking=False, num_val_batches=[4],
    )


def advance(progress, trainer, model, clock, batches, waited=0.1, step=0.4):
    for _ in range(batches):
        clock.now += waited
        progress.on_train_batch_start(trainer, model, None, 0)
        clock.now += step
        model.batches_seen += 1
        progress.on_train_batch_end(trainer, model, None, None, 0)


def a_model(batches_seen=0, accumulate=1):
    return SimpleNamespace(
        batches_seen=batches_seen, accumulate_grad_batches=accumulate, monitor="val/loss",
        shown={"train/loss": torch.tensor(0.12345)},
    )


def test_a_log_file_gets_one_line_every_n_batches_that_counts_the_whole_run(clock):
    file, model, trainer = io.StringIO(), a_model(), a_trainer(StopAfterBatches(1000))
    progress = Progress(every_n_batches=20, file=file)
    progress.on_train_start(trainer, model)
    advance(progress, trainer, model, clock, 45)
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/1,000", "20/1,000", "40/1,000"]
    assert lines[-1] == (
        "batch 40/1,000 [2 batches/s, 0:08:00 left, epoch 3, loss 0.1235, lr 0.002, data 20%]"
    )


def test_progress_is_right_after_a_resume_and_knows_validations(clock):
    file, model, trainer = io.StringIO(), a_model(900), a_trainer(StopAfterBatches(1000))
    progress = Progress(every_n_batches=10, file=file)
    progress.on_train_start(trainer, model)
    advance(progress, trainer, model, clock, 1, waited=0.0, step=2.0)
    assert file.getvalue().startswith("batch 901/1,000 [2 s/batch, 0:03:18 left")
    clock.now += 70.0  # a validation of ten batches' time: it counts for the time left alone
    progress.on_validation_end(trainer, model)
    clock.now += 5.0  # saving
    advance(progress, trainer, model, clock, 9, waited=1.0, step=1.0)
    line = file.getvalue().splitlines()[-1]
    assert "validated after 901 batches: val/loss 0.5" in file.getvalue()
    assert line.startswith("batch 910/1,000 [")
    rate = float(line.split("[")[1].split()[0])  # seconds a batch
    assert rate == pytest.approx(2.0, abs=0.2)  # without validation and saving
    assert "0:14:15 left" in line  # (2 + 70 + 5 + 18) seconds for 10 batches; 90 are left


@pytest.mark.parametrize(("remaining", "shown"), [(65.0, "0:01:05"), (0.0, "0:00:00"), (-2.0, "0:00:00")])
def test_time_left_follows_max_time(clock, monkeypatch, remaining, shown):
    timer = Timer("00:01:00:00")  # it notices at the end of a batch that time is up
    monkeypatch.setattr(timer, "time_remaining", lambda: remaining)
    file, model, trainer = io.StringIO(), a_model(), a_trainer(timer)
    progress = Progress(file=file)
    progress.on_train_start(trainer, model)
    advance(progress, trainer, model, clock, 1)
    assert file.getvalue().startswith(f"batch 1 [2 batches/s, {shown} left")


@pytest.mark.parametrize(("callbacks", "per_epoch", "max_epochs", "accumulate", "wanted"), [
    ([StopAfterBatches(150)], 100, -1, 1, 150),
    ([StopAfterBatches(150)], 100, 1, 1, 100),
    ([], 10, 3, 4, 9),  # three steps an epoch: 4 + 4 + 2 batches
    ([], float("inf"), 3, 1, None),
    ([], 10, -1, 1, None),
])
def test_batches_of_the_run(callbacks, per_epoch, max_epochs, accumulate, wanted):
    trainer = a_trainer(*callbacks, per_epoch=per_epoch, max_epochs=max_epochs)
    assert batches_of_run(trainer, a_model(accumulate=accumulate)) == wanted


class Terminal(io.StringIO):
    """A terminal that can go away, as after SIGHUP."""

    gone = False

    def isatty(self):
        return True

    def write(self, text):
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_a_terminal_gets_a_bar_that_survives_its_end(clock):
    file, model, trainer = Terminal(), a_model(998), a_trainer(StopAfterBatches(1001))
    progress = Progress(file=file)
    progress.on_train_start(trainer, model)
    advance(progress, trainer, model, clock, 2)
    assert "\r100%|" in file.getvalue() and "1,000/1,001 [2 batches/s, 0:00:00 left" in file.getvalue()
    assert "\n" not in file.getvalue()
    file.gone = True
    advance(progress, trainer, model, clock, 1)
    progress.on_validation_end(trainer, model)
    progress.on_train_end(trainer, model)


def test_other_processes_show_nothing(clock):
    file, model, trainer = Terminal(), a_model(), a_trainer(StopAfterBatches(10))
    trainer.is_global_zero = False
    progress = Progress(file=file)
    progress.setup(trainer, model, "fit")
    progress.on_train_start(trainer, model)
    advance(progress, trainer, model, clock, 10)
    assert file.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00:00"), (59.6, "0:01:00"), (86399, "23:59:59"), (90061, "1 d 01:01:01"),
])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_intervals_of_progress_are_positive():
    with pytest.raises(ValueError, match="progress.every_n_batches .* 0 and 0.5"):
        Progress(every_n_batches=0)


def test_plain_makes_containers_of_plain_python():
    found = plain(OmegaConf.create({"a": [1, {"b": "${c}"}], "c": 2}))
    assert found == {"a": [1, {"b": 2}], "c": 2} and type(found["a"]) is list
