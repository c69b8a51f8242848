"""A folder packed into shards by the command."""

import numpy as np
import pytest
from PIL import Image

from scripts.make_shards import main
from taming.data.shards import TarShards


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
    for arguments, message in (
        ([str(photos), *out], "remove them, or choose another name"),
        ([str(tmp_path / "none"), *out], "none does not exist"),
        ([str(photos), *out, "--name", "b", "--depth", str(tmp_path)], "that belongs to it"),
        ([str(photos), *out, "--name", "c", "--samples", "0"], "max_samples 0"),
    ):
        assert main(arguments) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0]
