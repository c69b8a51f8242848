"""Runs that are killed again and again, and go on as if nothing had happened."""

import os
import random
import signal
import time

import pytest
import torch

from taming.checkpoint import read_checkpoint
from tests.ranks import main_on_ranks, start_main
from tests.tiny import curves, write_transformer, write_vqgan

pytestmark = pytest.mark.slow

KILLS, STEPS = 20, 60
EVERY_BATCH = "lightning.callbacks.last_checkpoint.params.every_n_batches=1"
SLOW_DISK = [
    "--allow", "tests", "lightning.callbacks.slow.target=tests.tiny.SlowDisk",
    "lightning.callbacks.slow.params.seconds=0.03", EVERY_BATCH,
]


def wait_until(condition, process, pause=0.0):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive(), "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(pause)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def last(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt", mmap=False)


def test_twenty_kills_lose_nothing(tmp_path):
    """Half of them hit a save in progress. Weights and curves are those of a run that was left alone."""
    yaml = write_vqgan(tmp_path)
    words = ["-b", yaml, "-t", "-l", tmp_path, "--max_steps", STEPS]
    words += ["lightning.callbacks.image_logger=null", "lightning.trainer.limit_val_batches=0"]
    main_on_ranks(1, *words, "-n", "whole")
    whole = next(tmp_path.glob("*_whole"))

    rng, done, leftovers = random.Random(0), 0, 0
    for number in range(KILLS):
        runs = list(tmp_path.glob("*_part"))
        again = ["-t", "-r", *runs] if runs else [*words, "-n", "part"]
        process = start_main(*again, *SLOW_DISK)
        file = runs[0] / "checkpoints" / "last.ckpt" if runs else None
        before = file.stat().st_mtime_ns if file else 0

        def has_saved(before=before):
            files = list(tmp_path.glob("*_part/checkpoints/last.ckpt"))
            return files and files[0].stat().st_mtime_ns > before

        wait_until(has_saved, process, pause=0.005)  # at least a batch further than the start before
        (run,) = tmp_path.glob("*_part")
        if number % 2:
            wait_until(lambda run=run: list(run.glob("checkpoints/.last.ckpt.*.part")), process)
        else:
            time.sleep(rng.uniform(0.0, 0.1))
        kill(process)
        leftovers += len(list(run.glob("checkpoints/.*.part")))
        saved = last(run)["batches_seen"]
        assert done < saved < STEPS
        done = saved
    assert leftovers >= KILLS // 4  # those kills came amid a save

    main_on_ranks(1, "-t", "-r", run, EVERY_BATCH)
    assert not list(run.glob("checkpoints/.*.part"))
    wanted, found = last(whole), last(run)
    assert found["batches_seen"] == STEPS
    assert wanted["state_dict"].keys() == found["state_dict"].keys()
    assert all(torch.equal(found["state_dict"][key], value) for key, value in wanted["state_dict"].items())
    assert curves(run) == curves(whole)


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, stage):
    yaml = write_vqgan(tmp_path)
    if stage == "transformer":
        main_on_ranks(1, "-b", yaml, "-t", "-l", tmp_path, "-n", "first", "--max_steps", 1)
        yaml = write_transformer(tmp_path, tmp_path / "*_first")
    main_on_ranks(2, "-b", yaml, "-t", "-l", tmp_path, "-n", "run", "--max_steps", 3)
    run = next(tmp_path.glob("*_run"))
    for devices, steps in ((1, 6), (4, 7), (2, 9)):
        main_on_ranks(devices, "-t", "-r", run, "--max_steps", steps)
        assert last(run)["batches_seen"] == steps
    rows = [row for row in curves(run) if "train/" in str(row)]
    assert [int(row["step"]) for row in rows] == list(range(9))  # each batch once
    assert all(value.isfinite().all() for value in last(run)["state_dict"].values())
