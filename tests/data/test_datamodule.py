"""Samples depend on (seed, epoch, index) alone; a resumed run sees what an uninterrupted one would have."""

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from taming.data.datamodule import DataModuleFromConfig, default_num_workers
from taming.data.sampler import ResumableBatchSampler, SeededDataset, ShardedSampler, seeded

IMAGES, BATCH = 11, 2  # five batches an epoch, and one image left over


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
    return root


def make(folder, **options) -> DataModuleFromConfig:
    options = {"batch_size": BATCH, "num_workers": 0, **options}
    train = {"target": "taming.data.custom.CustomTrain", "params": {"size": 8, "folder": str(folder)}}
    test = {"target": "taming.data.custom.CustomTest", "params": {"size": 8, "folder": str(folder)}}
    return DataModuleFromConfig(train=train, validation=test, **options)


def fingerprint(batch) -> tuple:
    """Say which images a batch holds, in order, and how they were cropped and mirrored."""
    names = [Path(path).stem for path in batch["file_path_"]]
    weighted = batch["image"].double() * torch.arange(8)[:, None]  # (B, H, W, C), not blind to mirroring
    return (*names, round(weighted.sum().item(), 3))


class TinyGan(pl.LightningModule):
    """Two optimizers that step once a batch each, by hand; records what it trained on."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        self.seen, self.validated = [], []

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 0.01) for net in (self.g, self.d)]

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.g, self.d), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch["image"]).square().mean())
            optimizer.step()
        self.seen.append(fingerprint(batch))

    def validation_step(self, batch, batch_idx):
        self.validated.append(fingerprint(batch))


class Interrupt(pl.Callback):
    """End a run when `at` batches are done, and save a checkpoint, in one of the ways that this happens."""

    def __init__(self, how: str, at: int, path: Path):
        self.how, self.at, self.path = how, at, path

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if self.how == "exception" and len(model.seen) == self.at:
            raise KeyError("interrupted")

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if len(model.seen) == self.at and self.how in ("batch_end", "run_end", "exception_after"):
            if self.how == "batch_end":
                trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            if self.how == "exception_after":
                raise KeyError("interrupted")

    def on_validation_end(self, trainer, model):
        if len(model.seen) == self.at and self.how == "validation":
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer, model):
        if len(model.seen) == self.at and self.how == "epoch_end":
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True

    def on_train_end(self, trainer, model):
        if self.how == "run_end":
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer, model, exception):
        trainer.save_checkpoint(self.path)


def fit(data, *callbacks, resume=None, epochs=3, **options) -> TinyGan:
    model = TinyGan()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), use_distributed_sampler=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **options,
    )
    try:
        trainer.fit(model, data, ckpt_path=resume)
    except KeyError as error:
        assert error.args == ("interrupted",)
    return model


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """What three epochs without interruption train on."""
    return fit(make(folder)).seen


def names(batches) -> list[str]:
    return [name for batch in batches for name in batch[:-1]]


def test_epochs_are_different_permutations(uninterrupted):
    assert len(uninterrupted) == 15
    epochs = [names(uninterrupted[i:i + 5]) for i in (0, 5, 10)]
    assert [len(set(epoch)) for epoch in epochs] == [10, 10, 10]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("how, at", [
    ("batch_end", 3), ("batch_end", 7), ("batch_end", 10),  # amid epoch 0, amid epoch 1, at its end
    ("run_end", 7),  # told to stop amid the second epoch, saved when it had
    ("epoch_end", 5), ("epoch_end", 10),
    ("exception", 5), ("exception", 7), ("exception_after", 7),
    ("validation", 4), ("validation", 6),
])
def test_a_resumed_run_continues_exactly(folder, tmp_path, uninterrupted, how, at):
    options = {"val_check_interval": 2 if at == 4 else 1} if how == "validation" else {}
    first = fit(make(folder), Interrupt(how, at, tmp_path / "x.ckpt"), **options)
    assert first.seen == uninterrupted[:at]
    # Lightning takes an epoch that was told to stop for a finished one, and so runs one epoch after it.
    second = fit(make(folder), resume=tmp_path / "x.ckpt", **options)
    expected = uninterrupted[at:at + 5] if how == "run_end" else uninterrupted[at:]
    assert second.seen == expected and len(second.seen) >= 5


@pytest.mark.parametrize("how", ["batch_end", "exception"])
def test_loader_processes_change_nothing(folder, tmp_path, uninterrupted, how):
    first = fit(make(folder, num_workers=1), Interrupt(how, 7, tmp_path / "x.ckpt"))
    second = fit(make(folder, num_workers=1), resume=tmp_path / "x.ckpt")
    assert first.seen + second.seen == uninterrupted


def test_two_interruptions(folder, tmp_path, uninterrupted):
    first = fit(make(folder), Interrupt("exception", 6, tmp_path / "1.ckpt"))
    second = fit(make(folder), Interrupt("batch_end", 2, tmp_path / "2.ckpt"), resume=tmp_path / "1.ckpt")
    third = fit(make(folder), resume=tmp_path / "2.ckpt")
    seen = first.seen + second.seen + third.seen
    assert seen[:15] == uninterrupted and len(first.seen) == 6 and len(second.seen) == 2


def test_resuming_does_not_load_what_was_seen(folder, tmp_path, monkeypatch):
    fit(make(folder), Interrupt("batch_end", 8, tmp_path / "x.ckpt"))
    read = []
    original = SeededDataset.__getitem__

    def counting(self, key):
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(SeededDataset, "__getitem__", counting)
    fit(make(folder), resume=tmp_path / "x.ckpt", epochs=2, limit_val_batches=0)
    assert [epoch for epoch, _ in read] == [1] * 4


def test_resuming_amid_an_epoch_gives_no_warning_about_the_loader(folder, tmp_path):
    fit(make(folder), Interrupt("batch_end", 3, tmp_path / "x.ckpt"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dataloader is not resumable.*")
        assert len(fit(make(folder), resume=tmp_path / "x.ckpt", epochs=1).seen) == 2


def test_another_batch_size_on_resume_starts_a_new_epoch_and_says_so(folder, tmp_path, caplog):
    fit(make(folder), Interrupt("batch_end", 7, tmp_path / "x.ckpt"))
    seen = fit(make(folder, batch_size=1), resume=tmp_path / "x.ckpt").seen
    assert "batch_size was 2 and is 1" in caplog.text and "3 batches early" in caplog.text
    stream = ResumableBatchSampler(range(IMAGES), 1)
    stream.start, stream.stop = 2 * 11, 3 * 11
    assert [int(name) for name in names(seen)[:4]] == [pair[1] for (pair,) in stream][:4]


def test_overfit_batches_repeat_the_same_images(folder):
    seen = names(fit(make(folder), overfit_batches=2, limit_val_batches=0).seen)
    assert len(seen) == 12 and seen[:4] == seen[4:8] == seen[8:]


def test_limited_epochs_walk_through_the_whole_set(folder, uninterrupted):
    seen = fit(make(folder), limit_train_batches=2, epochs=5, limit_val_batches=0).seen
    assert seen == uninterrupted[:10]


def test_validation_is_the_same_each_time(folder):
    validated = fit(make(folder, shuffle_validation=True), epochs=2).validated
    half = len(validated) // 2
    assert half == 6 and validated[:half] == validated[half:]
    assert sorted(names(validated[:half])) == [f"{i:02}" for i in range(IMAGES)] != names(validated[:half])
    assert names(fit(make(folder), epochs=1).validated) == [f"{i:02}" for i in range(IMAGES)]


def test_without_a_trainer_the_loader_runs_epoch_after_epoch(folder, uninterrupted):
    data = make(folder)
    data.setup()
    loader = data.train_dataloader()
    assert len(loader) == 5
    state = torch.get_rng_state()
    assert [fingerprint(batch) for _ in range(3) for batch in loader] == uninterrupted
    assert torch.equal(torch.get_rng_state(), state)  # the model's random numbers are not disturbed
    assert data.test_dataloader() == [] == data.predict_dataloader()
    assert sorted(data.datasets) == ["train", "validation"] and len(data.datasets["train"]) == IMAGES


def test_seeding_restores_the_generators():
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(5)
    with seeded(0, 1, 2):
        inside = random.random(), np.random.rand(), torch.rand(()).item()
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    with seeded(0, 1, 2):
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == inside
    for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)):
        with seeded(*key):
            assert not set(inside) & {random.random(), np.random.rand(), torch.rand(()).item()}


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_images(world_size):
    def batches(rank, drop_last=True):
        stream = ResumableBatchSampler(range(23), 2, rank=rank, world_size=world_size, drop_last=drop_last)
        stream.stop = len(stream)
        return list(stream)

    shares = [batches(rank) for rank in range(world_size)]
    seen = [index for share in shares for batch in share for _, index in batch]
    assert len(seen) == len(set(seen)) == 23 // (2 * world_size) * 2 * world_size
    assert len({len(share) for share in shares}) == 1
    padded = [batches(rank, drop_last=False) for rank in range(world_size)]
    assert {index for share in padded for batch in share for _, index in batch} == set(range(23))
    assert len({tuple(len(batch) for batch in share) for share in padded}) == 1
    samplers = [ShardedSampler(range(23), rank=rank, world_size=world_size) for rank in range(world_size)]
    evaluated = [list(sampler) for sampler in samplers]
    assert set().union(*evaluated) == set(range(23)) and len({len(share) for share in evaluated}) == 1


def test_a_batch_that_cannot_be_filled_is_an_error(folder):
    data = make(folder, batch_size=12)
    data.setup()
    with pytest.raises(ValueError, match="batch_size=12.*holds 11: lower batch_size to at most 11"):
        data.train_dataloader()
    whole = make(folder, batch_size=12, drop_last=False)
    whole.setup()
    assert [len(batch["file_path_"]) for batch in whole.train_dataloader()] == [11]


def test_errors_and_options(folder):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DataModuleFromConfig(0)
    data = DataModuleFromConfig(1)
    data.setup()
    with pytest.raises(ValueError, match="no train data is configured"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="does not accept 'sise'.*did you mean size"):
        DataModuleFromConfig(1, {"target": "taming.data.custom.CustomTrain", "params": {"sise": 8}}).setup()
    wrapped = make(folder, wrap=True)
    wrapped.setup("validate")
    assert sorted(wrapped.datasets) == ["validation"]
    assert isinstance(wrapped.datasets["validation"], torch.utils.data.Dataset)
    assert wrapped.datasets["validation"][3]["file_path_"].endswith("03.png")
    assert 0 <= default_num_workers(2) <= default_num_workers() <= 8
    assert default_num_workers(10**6) == 0
