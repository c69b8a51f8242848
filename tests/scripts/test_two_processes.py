"""Two processes of torchrun draw the very files that one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taming.cli import command
from tests.scripts.test_make_samples import export as export_pairs
from tests.scripts.test_make_scene_samples import export as export_scenes
from tests.scripts.test_sample_fast import LABELS
from tests.scripts.test_sample_fast import export as export_classes

ROOT = Path(__file__).parents[2]
LAUNCHER = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def torchrun(command, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *LAUNCHER, str(ROOT / "scripts" / f"{command}.py"), *arguments],
        cwd=ROOT.parent, env=environment, capture_output=True, text=True, timeout=200,
    )


@pytest.fixture
def process(monkeypatch):
    """Take a process's place among some, as torchrun tells it."""
    def take(rank, world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
    return take


@pytest.mark.slow
def test_torchrun(tmp_path):
    run = export_classes(tmp_path / "run", LABELS)
    words = ["-r", run, "--device", "cpu", "-n", "7", "--batch_size", "2"]
    assert command("sample")([*words, "--grid", "-o", str(tmp_path / "one")]) == 0
    result = torchrun("sample_fast", *words, "--grid", "-o", str(tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) == 8 and one == two
    assert result.stdout.count("there already") == 1  # one process speaks
    result = torchrun("sample_fast", *words, "-o", str(tmp_path / "no"), "-k", "17")
    assert result.returncode != 0 and "error: top_k is 17" in result.stderr


@pytest.mark.parametrize(("name", "export", "words", "count"), [
    ("sample-dataset", lambda folder: export_pairs(folder, "depth"), ["-n", "5", "--batch_size", "2"], 20),
    ("scenes", export_scenes, ["-n", "2", "-N", "2", "--batch_size", "2", "--sheets"], 8),
])
def test_the_same_files(name, export, words, count, tmp_path, process):
    words = ["-r", export(tmp_path / "run"), "--device", "cpu", *words]
    assert command(name)([*words, "-o", str(tmp_path / "one")]) == 0
    for rank in (1, 0):  # the first one waits for the other where it makes sheets
        process(rank, 2)
        assert command(name)([*words, "-o", str(tmp_path / "two")]) == 0
        if rank == 1:
            assert 0 < len(files(tmp_path / "two")) < count
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) == count and one == two


def test_more_processes_than_batches_share_the_pictures(tmp_path, process):
    run = export_classes(tmp_path / "run", LABELS)
    found = []
    for rank in range(3):
        process(rank, 3)
        folder = tmp_path / str(rank)
        assert command("sample")(["-r", run, "--device", "cpu", "-n", "4", "-o", str(folder)]) == 0
        found.append(sorted(int(path.stem[-6:]) for path in folder.glob("*.png")))
    assert found == [[0, 1], [2, 3], []]


def test_one_of_them_draws_a_panorama(tmp_path, process):
    words = ["-r", export_classes(tmp_path / "run", LABELS), "--device", "cpu", "--size", "16x24"]
    for rank in (1, 0):
        process(rank, 2)
        assert command("panorama")([*words, "-o", str(tmp_path / "picture.png")]) == 0
        assert (tmp_path / "picture.png").exists() == (rank == 0)
