"""Depth and label maps of a folder, by the commands, with a stand-in for the model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from taming.cli import command
from taming.data.files.depth import rgba_to_depth
from taming.inference import pseudo_labels


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 24, 3), 100 * i, np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "x.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def processor(images, return_tensors):
    return {"pixel_values": torch.from_numpy(np.array(images)).permute(2, 0, 1)[None].float() / 255}


class Network:
    config = SimpleNamespace(id2label={1: "bright", 0: "dark"})

    def __call__(self, pixel_values):
        bright = pixel_values.mean(1)
        return SimpleNamespace(predicted_depth=bright, logits=torch.stack([0.5 - bright, bright - 0.5], 1))


def test_depth_maps(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pseudo_labels, "load_depth_model", lambda *_, **__: (processor, Network()))
    arguments = [str(photos), "-o", str(tmp_path / "out"), "--model", "any", "--device", "cpu"]
    assert command("extract-depth")(arguments) == 0
    printed = capsys.readouterr()
    assert "3 depth maps made, 0 were there, 1 images skipped" in printed.out
    assert "skipped: cannot read image" in printed.err
    depth = rgba_to_depth(np.asarray(Image.open(tmp_path / "out" / "1.png")))
    assert depth == pytest.approx(np.full((16, 24), 100 / 255), abs=1e-5)
    (tmp_path / "out" / "1.png").unlink()
    assert command("extract-depth")(arguments) == 0
    assert "1 depth maps made, 2 were there" in capsys.readouterr().out


def test_label_maps(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pseudo_labels, "load_label_model", lambda *_, **__: (processor, Network()))
    arguments = [str(photos), "-o", str(tmp_path / "out"), "--model", "any", "--device", "cpu"]
    assert command("extract-segmentation")(arguments) == 0
    assert "3 label maps made" in (printed := capsys.readouterr().out) and "n_labels: 2" in printed
    values = [np.unique(Image.open(tmp_path / "out" / f"{i}.png")).tolist() for i in range(3)]
    assert values == [[0], [0], [1]]
    assert (tmp_path / "out" / "labels.txt").read_text() == "dark\nbright\n"


@pytest.mark.parametrize("name", ["extract-depth", "extract-segmentation"])
def test_errors_are_one_line(name, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)  # as if it were not installed
    for arguments, message in (
        ([str(photos), "-o", str(tmp_path / "out")], "pip install transformers"),
        ([str(photos), "-o", str(photos / "maps")], "where maps would be taken for images"),
        ([str(tmp_path / "none"), "-o", str(tmp_path / "out")], "does not exist"),
    ):
        assert command(name)([*arguments, "--model", "any", "--device", "cpu"]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0]
