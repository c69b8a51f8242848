"""A folder packed into shards by the command."""

import numpy as np
import pytest
from PIL import Image

from scripts.make_shards import main
from taming.data.shards import TarShards
from taming.data.shards.writer import _Shard


@pytest.fixture
def photos(tmp_path):
    for i in range(6):
        path = tmp_path / "photos" / f"{'xy'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(path)
    return tmp_path / "photos"


def test_a_folder_of_classes(photos, tmp_path, capsys):
    out = tmp_path / "shards"
    arguments = [str(photos), "-o", str(out), "--samples", "4", "--classes", "--seed", "-1", "--name", "val"]
    assert main(arguments) == 0
    assert "6 images in 2 shards" in capsys.readouterr().out
    items = list(TarShards(out))
    assert [item["human_label"] for item in items] == ["x"] * 3 + ["y"] * 3
    assert [round((item["image"].mean() + 1) * 127.5) for item in items] == [0, 80, 160, 40, 120, 200]


def test_errors_are_one_line(photos, tmp_path, capsys):
    out = ["-o", str(tmp_path / "shards")]
    assert main([str(photos), *out]) == 0
    capsys.readouterr()
    for arguments, message in (
        ([str(photos), *out], "remove them, or choose another name"),
        ([str(tmp_path / "none"), *out], "none does not exist"),
        ([str(photos), *out, "--name", "b", "--depth", str(tmp_path)], "that belongs to it"),
        ([str(photos), *out, "--name", "c", "--samples", "0"], "max_samples 0"),
        ([str(photos), *out, "--name", "c", "--megabytes", "nan"], "max_bytes is nan"),
        ([str(photos), *out, "--name", "a/b"], "'a/b' is not a name for shards"),
        ([str(photos), "-o", str(photos / "x" / "0.png")], "0.png is a file, but shards need a folder"),
        ([str(photos), "-o", str(photos / "x" / "0.png" / "out")], "0.png is a file, but shards"),
    ):
        assert main(arguments) == 1
        lines = capsys.readouterr().err.splitlines()  # without a progress bar
        assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert [path.name for path in (tmp_path / "shards").glob("*.tar")] == ["train-000000.tar"]


def test_what_a_run_that_fails_leaves_is_told(photos, tmp_path, capsys, monkeypatch):
    add, broken = _Shard.add, photos / "x" / "4.png"

    def vanish(shard, key, sample):
        broken.unlink(missing_ok=True)  # after the check, before it is read
        add(shard, key, sample)

    monkeypatch.setattr(_Shard, "add", vanish)
    out = tmp_path / "shards"
    arguments = [str(photos), "-o", str(out), "--samples", "2", "--seed", "-1"]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "4.png" in error and f"Remove the 1 shards {out}/train-*.tar before the next try" in error
    assert sorted(path.name for path in out.iterdir()) == ["train-000000.tar", "train-000000.tar.json"]
    assert main(arguments) == 1
    assert "remove them, or choose another name" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_leaves_nothing(photos, tmp_path, capsys, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_Shard, "add", full)
    monkeypatch.setattr("tarfile.TarFile.close", full)
    assert main([str(photos), "-o", str(tmp_path / "shards")]) == 1
    assert "error: packing stopped: [Errno 28] No space left" in capsys.readouterr().err
    assert list((tmp_path / "shards").iterdir()) == []
