"""Checkpoints of a run: when they are due, what is never written, full disks, signals, leftovers."""

import signal
from types import SimpleNamespace

import pytest
import torch

from taming.checkpoint import read_checkpoint
from taming.training.callbacks import AtomicCheckpointIO, LastCheckpoint
from taming.training.callbacks import saving as saving_module
from tests.tiny import FullDisk, curves, resume, train, trouble, write_vqgan


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(saving_module, "time", clock)
    return clock


def due(callback, clock, batches, seconds=60.0):
    """Return after which batches, of so many seconds each, the callback saves."""
    saved = []
    for batch in range(batches):
        if callback._is_due(batch):
            saved.append(batch)
            callback._saved_batches, callback._saved_time = batch, clock.now
        clock.now += seconds
    return saved


@pytest.mark.parametrize(("params", "wanted"), [
    ({}, [1, 11, 21]),  # every ten minutes of a minute a batch, from the first batch on
    ({"every_n_minutes": None}, [1]),
    ({"every_n_minutes": 2.5}, [1, 4, 7, 10, 13, 16, 19, 22]),
    ({"every_n_minutes": None, "every_n_batches": 8}, [1, 8, 16]),
    ({"every_n_batches": 8}, [1, 8, 16]),  # which comes first
])
def test_saves_are_due_from_the_first_batch_on(clock, params, wanted):
    assert due(LastCheckpoint(**params), clock, 24) == wanted


@pytest.mark.parametrize(("params", "message"), [
    ({"every_n_minutes": 0}, "every_n_minutes must be above 0"),
    ({"every_n_batches": -1}, "every_n_batches must be above 0"),
    ({"every_n_minutes": float("nan")}, "every_n_minutes must be above 0"),
    ({"on_write_error": "ignore"}, "'ignore' is not stop or continue"),
])
def test_wrong_intervals_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        LastCheckpoint(**params)


@pytest.mark.parametrize(("value", "written"), [
    (1.0, True), (float("-inf"), True), (float("inf"), False), (float("nan"), False),
])
def test_weights_that_are_not_finite_are_never_written(tmp_path, caplog, value, written):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"state_dict": {"good": torch.zeros(2)}}, path)
    assert io.failure is None
    state = {"good": torch.ones(2), "count": torch.tensor(3), "bad.weight": torch.tensor([0.0, value])}
    io.save_checkpoint({"state_dict": state}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["good"], torch.full((2,), float(written)))
    assert (io.failure is None) == written
    warning = "NaN or infinite weights (bad.weight); the checkpoint before it is whole"
    assert (warning in caplog.text) != written


def test_any_error_of_the_system_is_a_failure_that_does_not_raise(tmp_path, caplog):
    io = AtomicCheckpointIO()
    (tmp_path / "file").touch()
    io.save_checkpoint({"state_dict": {}}, tmp_path / "file" / "last.ckpt")  # a file where a folder belongs
    assert isinstance(io.failure, OSError)
    assert "not saved" in caplog.text and "whole" not in caplog.text  # there is none before it
    io.save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    assert io.failure is None


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    ours = ["checkpoints/.last.ckpt.123.part", "images/train/.sheet_000001.png.part", ".metrics.csv.7.part"]
    others = ["checkpoints/last.ckpt", "images/train/sheet_000001.png", "notes.part", "photos/.x.part"]
    for name in ours + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    trainer = SimpleNamespace(global_rank=1, default_root_dir=str(tmp_path))
    LastCheckpoint().setup(trainer, None, "fit")
    assert all((tmp_path / name).exists() for name in ours)
    trainer.global_rank = 0
    LastCheckpoint().setup(trainer, None, "test")
    assert all((tmp_path / name).exists() for name in ours)
    LastCheckpoint().setup(trainer, None, "fit")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(others)


def test_signals_are_ours_in_training_and_nohup_stays(monkeypatch):
    callback, model = LastCheckpoint(), SimpleNamespace(batches_seen=0)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    callback.on_train_start(None, model)
    assert all(signal.getsignal(s) == callback._receive for s in before)
    callback.teardown(None, model, "fit")
    assert {s: signal.getsignal(s) for s in before} == before
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)  # as under nohup
    callback.on_train_start(None, model)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGHUP) == before[signal.SIGHUP]
    callback.teardown(None, model, "fit")


# ---- whole runs

STEPS = 6


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    """An uninterrupted run, and its YAML."""
    folder = tmp_path_factory.mktemp("vqgan")
    yaml = write_vqgan(folder)
    return yaml, train(yaml, folder / "logs", "whole", "--max_steps", STEPS)


def last(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


def full_at(number, monkeypatch):
    """Let the disk be full at the write of that number, counted from 1, and have space again afterwards."""
    writes, save = [], torch.save

    def maybe_full(content, file):
        writes.append(file)
        save(content, FullDisk() if len(writes) == number else file)

    monkeypatch.setattr(torch, "save", maybe_full)


def test_a_full_disk_ends_training_in_one_line_and_keeps_the_checkpoint(vqgan, tmp_path, monkeypatch, capfd):
    words = ["--max_steps", STEPS, "lightning.callbacks.last_checkpoint.params.every_n_batches=1"]
    full_at(3, monkeypatch)
    run = train(vqgan[0], tmp_path, "part", *words, status=1)
    said = capfd.readouterr()
    error = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and f"{run}/checkpoints/last.ckpt: No space left on device" in error[0]
    assert "Traceback" not in said.err and f"python main.py -t -r {run}" in said.out
    assert last(run)["batches_seen"] == 2
    assert not list(run.rglob("*.part"))
    monkeypatch.undo()  # space was made
    resume(run)
    assert curves(run) == curves(vqgan[1])


def test_training_goes_on_over_a_full_disk_if_told_to(vqgan, tmp_path, monkeypatch, caplog):
    words = ["--max_steps", STEPS, "lightning.callbacks.last_checkpoint.params.on_write_error=continue",
             "lightning.callbacks.last_checkpoint.params.every_n_batches=1"]
    full_at(3, monkeypatch)
    run = train(vqgan[0], tmp_path, "part", *words)
    assert caplog.text.count("No space left on device; the checkpoint before it is whole") == 1
    assert curves(run) == curves(vqgan[1]) and last(run)["batches_seen"] == STEPS


def test_a_bad_gradient_never_reaches_the_checkpoint(vqgan, tmp_path):
    """A NaN gradient under a finite loss: the batch is left out, and training goes on."""
    words = ["--max_steps", STEPS, "lightning.callbacks.last_checkpoint.params.every_n_batches=1"]
    words += ["--allow", "tests", "lightning.callbacks.bad.target=tests.tiny.BadGradient",
              "lightning.callbacks.bad.params.at=3"]
    run = train(vqgan[0], tmp_path, "bad", *words)
    assert [row["step"] for row in curves(run) if "health/non_finite" in row] == ["3", "4"]  # there, and over
    assert last(run)["batches_seen"] == STEPS
    assert all(value.isfinite().all() for value in last(run)["state_dict"].values())


def test_a_nan_loss_is_left_out_if_told_to(vqgan, tmp_path, caplog):
    words = ["--max_steps", STEPS, *trouble(kind="nan", at=4),
             "lightning.callbacks.health.params.non_finite=lower",
             "model.params.lossconfig.params.use_actnorm=false"]
    run = train(vqgan[0], tmp_path, "part", *words)
    assert "health: after 5 batches a loss or gradient is not finite: skipped, and" in caplog.text
    assert last(run)["batches_seen"] == STEPS
    assert [state["param_groups"][0]["lr_factor"] for state in last(run)["optimizer_states"]] == [0.5, 0.5]
    assert all(value.isfinite().all() for value in last(run)["state_dict"].values())


def test_nan_in_a_batch_keeps_the_state_before_it_also_with_batchnorm(vqgan, tmp_path):
    """Its forward pass has put NaN into BatchNorm's running statistics by then."""
    words = ["--max_steps", STEPS, *trouble(kind="nan", at=4),
             "model.params.lossconfig.params.use_actnorm=false"]
    run = train(vqgan[0], tmp_path, "part", *words, status=1)
    assert last(run)["batches_seen"] == 3
    assert all(value.isfinite().all() for value in last(run)["state_dict"].values())


def test_sighup_saves_as_sigterm_does(vqgan, tmp_path):
    run = train(vqgan[0], tmp_path, "part", "--max_steps", STEPS, *trouble(kind="SIGHUP", at=3), status=129)
    assert last(run)["batches_seen"] == 2
    resume(run)
    assert curves(run) == curves(vqgan[1])
