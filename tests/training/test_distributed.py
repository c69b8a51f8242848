"""What the environment says of other processes: leftovers are named, and a start leaves none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taming.inference import distributed as sampling
from taming.training.distributed import OF_GROUP, check_launch, same_environment
from tests.tiny import write_vqgan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables, where no launcher has set any."""
    for name in [*os.environ]:
        if name in (*OF_GROUP, "RANK") or name.startswith(("SLURM_", "TORCHELASTIC_", "LSB_")):
            monkeypatch.delenv(name)

    def set_variables(text):
        for item in text.split():
            monkeypatch.setenv(*item.split("="))

    return set_variables


@pytest.mark.parametrize(("variables", "devices", "nodes"), [
    ("LOCAL_RANK=0", 2, 1), ("LOCAL_RANK=1 WORLD_SIZE=2", 2, 1), ("LOCAL_RANK=0 RANK=0", 1, 2),
    ("RANK=1", 2, 1), ("RANK=3 WORLD_SIZE=4", 1, 1), ("LOCAL_RANK=1", 1, 1),
    ("LOCAL_RANK=0 WORLD_SIZE=8 MASTER_PORT=29500", 2, 1),
])
def test_what_an_earlier_start_has_left_is_named(environment, variables, devices, nodes):
    environment(variables)
    told = [item.split("=")[0] for item in variables.split() if "MASTER" not in item]
    with pytest.raises(ValueError, match=f"for this start of {devices * nodes} process") as caught:
        check_launch(devices, nodes)
    named = str(caught.value).split("unset ")[1].split(",")[0].split()
    assert sorted(named) == sorted(told) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("variables", "devices", "nodes"), [
    ("", 2, 1), ("WORLD_SIZE=4", 1, 1), ("WORLD_SIZE=4", 2, 1), ("LOCAL_RANK=0 RANK=0 WORLD_SIZE=1", 1, 1),
    ("MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 NODE_RANK=1", 2, 2),
    ("LOCAL_RANK=1 RANK=1 WORLD_SIZE=4 TORCHELASTIC_RUN_ID=none", 2, 2),
])
def test_what_does_no_harm_passes(environment, variables, devices, nodes):
    environment(variables)
    assert check_launch(devices, nodes) == []


def test_processes_that_are_started_by_hand_wait_aloud(environment):
    environment("LOCAL_RANK=1 WORLD_SIZE=2 MASTER_PORT=29500")
    (note,) = check_launch(2, 1)
    assert "LOCAL_RANK=1, WORLD_SIZE=2: one of 2 processes, which waits for the others" in note


def test_a_start_leaves_the_environment_as_it_was(environment):
    environment("MASTER_PORT=1 WORLD_SIZE=2")
    before = dict(os.environ)
    with pytest.raises(KeyError), same_environment():
        os.environ |= {name: "7" for name in OF_GROUP if name != "WORLD_SIZE"}
        del os.environ["WORLD_SIZE"]
        raise KeyError
    assert dict(os.environ) == before


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "0"}, {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}])
def test_a_start_does_not_wait_for_processes_that_nobody_starts(tmp_path, environment, variables):
    words = ["-b", write_vqgan(tmp_path), "-t", "-l", tmp_path, "--accelerator", "cpu", "--devices", "2"]
    result = subprocess.run(
        [sys.executable, "main.py", *map(str, words)], cwd=ROOT, env=os.environ | variables,
        capture_output=True, text=True, timeout=100,
    )
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: the environment says LOCAL_RANK=")


# ---- sampling


@pytest.mark.parametrize("variables", ["RANK=1", "RANK=2 WORLD_SIZE=2", "RANK=a", "WORLD_SIZE=0"])
def test_ranks_that_contradict_each_other_are_named(environment, variables):
    environment(variables)
    with pytest.raises(ValueError, match="unset RANK WORLD_SIZE"):
        sampling.own_batches(10, 2, lambda i: False)


def test_waiting_for_other_processes_is_said(environment, tmp_path, monkeypatch, capsys):
    environment("RANK=0 WORLD_SIZE=4")
    looks = iter([False, False, True, False, True])
    monkeypatch.setattr(sampling, "is_complete_png", lambda path: next(looks))
    monkeypatch.setattr(sampling, "POLL_INTERVAL", 0.0)
    sampling.wait_for([tmp_path / "a.png", tmp_path / "b.png"])
    assert capsys.readouterr().out == "waiting for the images of 3 other process(es), as WORLD_SIZE says\n"
