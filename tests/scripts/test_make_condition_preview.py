"""The sheet of a data set that a configuration names."""

import numpy as np
import pytest
from PIL import Image

from scripts.make_condition_preview import main

CONFIG = """
data:
  params:
    train:
      target: taming.data.landscapes.Landscapes
      params: {size: 32, length: 20, keys: [image, depth, human_label]}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_a_sheet_of_some_items(config, tmp_path, capsys):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = ["-o", str(tmp_path / "sheets" / f"{name}.png")]
        assert main(["-b", config, "-n", "3", "--cell", "64", "--seed", seed, *out]) == 0
    assert "3 of 20 items" in capsys.readouterr().out
    sheets = [np.asarray(Image.open(tmp_path / "sheets" / f"{name}.png")) for name in "abc"]
    assert sheets[0].shape == (26 + 3 * 70, 6 + 2 * 70 + 300 + 6, 3)
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])


def test_overrides_and_few_items(config, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    override = "data.params.train.params.length=2"
    assert main(["-b", config, override, "-o", str(out)]) == 0
    assert "2 of 2 items" in capsys.readouterr().out


def test_errors_are_one_line(config, tmp_path, capsys):
    out = ["-o", str(tmp_path / "sheet.png")]
    for arguments, message in (
        (["-b", config, "--split", "test"], "there is no data.params.test"),
        (["-b", str(tmp_path / "none.yaml")], "none.yaml does not exist"),
        (["-b", config, "data.params.train.params.size=8"], "at least 32 pixels"),
    ):
        assert main([*arguments, *out]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1 and message in lines[-1]
    assert main(["-b", config, "-o", str(tmp_path / "sheet.jpg")]) == 1
    assert "choose a name that ends in .png" in capsys.readouterr().err
    for word, value in (("-n", "0"), ("--cell", "8")):
        with pytest.raises(SystemExit):
            main(["-b", config, *out, word, value])
        assert f"argument {word}: {value} is not a whole number of at least" in capsys.readouterr().err


def test_a_folder_gets_names_that_are_free(config, tmp_path):
    for name in ("preview.png", "preview_2.png"):
        assert main(["-b", config, "-n", "1", "-o", str(tmp_path)]) == 0
        assert (tmp_path / name).exists()


def test_a_file_of_other_origin_is_not_replaced(config, tmp_path, capsys):
    file = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(file)
    before = file.read_bytes()
    assert main(["-b", config, "-n", "1", "--output", str(file)]) == 1
    assert "is not marked as written by taming" in capsys.readouterr().err and file.read_bytes() == before
