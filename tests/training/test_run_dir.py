"""Run directories: which is the newest, who may use one, and what is left of a start that failed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from taming.training.run_dir import LOCK_NAME, find_run, locked_run_dir, new_run_dir

ROOT = Path(__file__).parents[2]


def make_run(folder, name, checkpoint="last.ckpt"):
    run = folder / name
    (run / "checkpoints").mkdir(parents=True)
    if checkpoint:
        (run / "checkpoints" / checkpoint).touch()
    return run


# ---- the newest


def test_the_newest_by_the_time_in_its_name_that_has_a_checkpoint(tmp_path):
    newest = make_run(tmp_path, "2026-01-03T00-00-00_vq")
    older = make_run(tmp_path, "2026-01-02T00-00-00_vq")
    make_run(tmp_path, "2026-01-04T00-00-00_vq", checkpoint=None)
    make_run(tmp_path, "2026-01-05T00-00-00_other")
    os.utime(newest, (0, 0))  # a copy or a backup changes times
    assert find_run(tmp_path / "*_vq") == newest
    (newest / "checkpoints" / "last.ckpt").unlink()
    assert find_run(tmp_path / "*_vq") == older
    assert find_run(f"{tmp_path}/*_vq/checkpoints/*.ckpt") == older / "checkpoints" / "last.ckpt"


def test_names_without_a_time_go_by_their_last_change(tmp_path):
    first, second = make_run(tmp_path, "a_vq"), make_run(tmp_path, "b_vq")
    os.utime(first, (2e9, 2e9))
    os.utime(second, (1e9, 1e9))
    assert find_run(tmp_path / "*_vq") == first
    make_run(tmp_path, "2040-01-01T00-00-00_vq")
    assert find_run(tmp_path / "*_vq").name == "2040-01-01T00-00-00_vq"


def test_what_is_there_is_taken_as_it_is(tmp_path, monkeypatch):
    run = make_run(tmp_path, "[1]*_vq", checkpoint=None)
    assert find_run(run) == run
    monkeypatch.setenv("HOME", str(tmp_path))
    make_run(tmp_path, "2026-01-03T00-00-00_x")
    assert find_run("~/*_x") == tmp_path / "2026-01-03T00-00-00_x"


def test_nothing_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*/x_.$"):
        find_run(tmp_path / "x_*")
    make_run(tmp_path, "x_1", checkpoint=None)
    make_run(tmp_path, "x_2", checkpoint=None)
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*, in none of 2 matches"):
        find_run(tmp_path / "x_*")


# ---- locks

HOLD = """
import sys, time
from pathlib import Path
from taming.training.run_dir import locked_run_dir
with locked_run_dir(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def is_free(folder):
    try:
        with locked_run_dir(folder):
            return True
    except ValueError:
        return False


@pytest.mark.slow
def test_a_locked_run_names_the_process_that_has_it(tmp_path, holder):
    message = f"the run {tmp_path} is in use by process {holder.pid} on .*: stop that"
    with pytest.raises(ValueError, match=message):
        with locked_run_dir(tmp_path):
            pass
    assert (tmp_path / LOCK_NAME).exists(), "not ours to remove"
    holder.communicate("\n", timeout=30)
    assert not (tmp_path / LOCK_NAME).exists() and is_free(tmp_path)


@pytest.mark.slow
def test_the_lock_of_a_killed_process_does_not_count(tmp_path, holder):
    assert not is_free(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    assert is_free(tmp_path) and not (tmp_path / LOCK_NAME).exists()


@pytest.mark.slow
def test_processes_that_load_data_do_not_inherit_the_lock(tmp_path):
    child = os.fork()
    if child == 0:
        with locked_run_dir(tmp_path):
            if os.fork() == 0:
                time.sleep(20)  # as a loader process whose parent was killed
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert is_free(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(ValueError, match="cannot write to the run directory .*nowhere: No such file"):
        with locked_run_dir(tmp_path / "nowhere"):
            pass


# ---- new ones


def test_a_new_run_is_locked_and_kept(tmp_path):
    run = tmp_path / "logs" / "a"
    with new_run_dir(run, keep=lambda: False):
        assert (run / LOCK_NAME).exists()
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_start_that_failed_leaves_nothing(tmp_path, error, learned):
    (tmp_path / "before").mkdir()
    for run in (tmp_path / "logs" / "a", tmp_path / "before" / "a"):
        with pytest.raises(error):
            with new_run_dir(run, keep=lambda: learned):
                (run / "configs").mkdir()
                raise error
        assert run.exists() is learned
    assert (tmp_path / "logs").exists() is learned, "the folder was made for the run"
    assert (tmp_path / "before").exists()


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for place, message in (("file/a", "cannot make the run directory .*file/a: Not a directory; change"),
                           ("x" * 300, "File name too long; change --logdir or --name")):
        with pytest.raises(ValueError, match=message):
            with new_run_dir(tmp_path / place, keep=bool):
                pass
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already: a run of that name"):
        with new_run_dir(tmp_path / "there", keep=bool):
            pass
    assert (tmp_path / "there").exists()
