"""Faults around whole runs in processes of their own: a closed terminal, a full disk, two nodes."""

import fcntl
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from taming.checkpoint import read_checkpoint
from tests.ranks import start_main
from tests.tiny import write_vqgan

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
MAIN = [sys.executable, "main.py"]


def words(*given):
    return [*map(str, given)]


def test_a_terminal_that_is_closed_saves_the_run(tmp_path):
    """It sends SIGHUP, and whatever is printed from then on fails."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))

    def take_terminal():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    run = subprocess.Popen(
        [*MAIN, *words("-b", write_vqgan(tmp_path), "-t", "-l", tmp_path / "logs"),
         "lightning.trainer.enable_progress_bar=true"],
        cwd=ROOT, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    shown, deadline = b"", time.monotonic() + 120
    while b"batches/s" not in shown and b"s/batch" not in shown:  # until the bar is there
        assert run.poll() is None and time.monotonic() < deadline, shown
        try:
            shown += os.read(ours, 100_000)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(ours)
    assert run.wait(60) == 128 + signal.SIGHUP
    (file,) = tmp_path.glob("logs/*/checkpoints/last.ckpt")
    assert read_checkpoint(file)["batches_seen"] >= 1


@pytest.mark.parametrize(("on_write_error", "status"), [("stop", 1), ("continue", 0)])
def test_a_small_disk(tmp_path, on_write_error, status):
    """All that a run writes goes to a disk that is full after its first checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = words("mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", disk)
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        run = start_main(
            "-b", write_vqgan(tmp_path), "-t", "-l", disk, "--max_steps", 8,
            f"lightning.callbacks.last_checkpoint.params.on_write_error={on_write_error}",
            output=tmp_path / "said",
        )
        run.join(300)
        said = (tmp_path / "said").read_text()
        assert run.exitcode == status, said
        assert "No space left on device" in said and "Traceback" not in said
        assert said.count("error:") == status
        assert not list(disk.rglob("*.part"))
    finally:
        subprocess.run(words("umount", disk), check=True)


def test_two_nodes(tmp_path):
    """torchrun starts both on this machine; they are one run, although each has a local process 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yaml = write_vqgan(tmp_path)
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run",
             *words("--nnodes", 2, "--nproc_per_node", 1, "--node_rank", node, "--master_addr", "127.0.0.1"),
             *words("--master_port", port, "main.py", "-b", yaml, "-t", "-l", tmp_path / "logs"),
             *words("--accelerator", "cpu", "--devices", 1, "--num_nodes", 2, "--max_steps", 3),
             "data.params.batch_size=1"],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "= 1 (accumulated batches) x 1 (devices) x 2 (nodes) x 1 (batch size)" in said[0]
    assert "run directory" not in said[1]  # the first process of all speaks
    (run,) = (tmp_path / "logs").iterdir()
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["batches_seen"] == 3
