"""How many threads are chosen: what is fastest, unless the user said."""

import os
from types import SimpleNamespace

import pytest
import torch

from taming import threads
from taming.training.command import main
from tests import tiny

clock = SimpleNamespace(now=0.0)  # seconds


def sleep(seconds):
    clock.now += seconds


@pytest.fixture(autouse=True)
def _free_choice(monkeypatch):
    """Let nothing be chosen before, on a machine of four cores."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setattr(threads, "_at_import", 4)
    torch.set_num_threads(4)
    clock.now = 0.0
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    yield
    torch.set_num_threads(before)


def taking(seconds):
    """Return a probe whose time depends on the threads."""
    return lambda: sleep(seconds[torch.get_num_threads()])


@pytest.mark.parametrize(("seconds", "best"), [
    ({1: 0.004, 2: 0.002, 4: 0.001}, 4),  # idle
    ({1: 0.002, 2: 0.004, 4: 0.030}, 1),  # every core is busy
    ({1: 0.004, 2: 0.002, 4: 0.020}, 2),
    ({1: 0.004, 2: 0.0039, 4: 0.0039}, 1),  # no gain
])
def test_the_fastest_number_is_chosen(seconds, best):
    assert threads.measured_threads(4, taking(seconds)) == best
    assert torch.get_num_threads() == 4


def test_numbers_that_are_no_power_of_two_are_tried():
    tried = set()
    threads.measured_threads(6, lambda: tried.add(torch.get_num_threads()))
    assert tried == {1, 2, 4, 6}
    assert threads.measured_threads(1, lambda: pytest.fail("there is nothing to choose")) == 1


def test_a_number_that_is_slow_now_and_then_is_not_chosen():
    calls = iter(range(1000))

    def probe():
        late = torch.get_num_threads() == 4 and next(calls) % 2
        sleep(0.02 if late else 0.002 / torch.get_num_threads())

    assert threads.measured_threads(4, probe) == 2


def test_the_user_wins(monkeypatch):
    monkeypatch.setattr(threads, "measured_threads", lambda most: 2)
    assert threads.choose_threads() == 2 == torch.get_num_threads()
    assert threads.choose_threads(stored=1) == 1 == torch.get_num_threads()
    assert threads.choose_threads() == 2  # its own choice is not a user's
    torch.set_num_threads(3)
    assert threads.choose_threads() is None
    assert torch.get_num_threads() == 3
    torch.set_num_threads(4)
    for name in threads.VARIABLES:
        monkeypatch.setenv(name, "1")
        assert threads.choose_threads(stored=2) is None
        monkeypatch.delenv(name)


def test_a_resumed_run_keeps_its_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threads, "measured_threads", lambda most: 1)
    run = tiny.train(tiny.write_vqgan(tmp_path), tmp_path, "run", "--max_steps", 1)
    assert "CPU (1 threads)" in capsys.readouterr().out
    monkeypatch.setattr(threads, "measured_threads", lambda most: pytest.fail("it is known"))
    tiny.resume(run, "--max_steps", 2)
    assert "CPU (1 threads)" in capsys.readouterr().out
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_wrong_number_is_told(tmp_path, capsys):
    assert main(["-b", str(tiny.write_vqgan(tmp_path)), "-t", "lightning.threads=0"]) == 1
    assert "lightning.threads: 0 must be" in capsys.readouterr().err
