"""One large picture from the command line, for each kind of model that needs no other input."""

import pytest
from PIL import Image

from scripts.make_panorama import main
from taming.data.base import read_image
from tests.scripts.test_sample_fast import LABELS, SOS, export

COORDINATES = {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 16, "down_factor": 2}}
CONDITIONS = [(LABELS, "class_label"), (SOS, "image"), (COORDINATES, "coord")]


def draw(run, file, *arguments):
    return main(["-r", run, "-o", str(file), "--device", "cpu", *map(str, arguments)])


@pytest.mark.parametrize(("condition", "key"), CONDITIONS)
def test_a_picture_of_any_size(condition, key, tmp_path):
    run = export(tmp_path / "run", condition, key)
    assert draw(run, tmp_path / "a.png", "--stride", 3) == 0
    assert Image.open(tmp_path / "a.png").size == (64, 16)  # four times as wide as the training size
    for name in ("b", "c"):
        assert draw(run, tmp_path / f"{name}.png", "--size", "20x24", "-t", 0.9) == 0
    assert Image.open(tmp_path / "b.png").size == (24, 20)
    assert (read_image(tmp_path / "b.png") == read_image(tmp_path / "c.png")).all()
    assert draw(run, tmp_path / "d.png", "--size", "20x24", "--seed", 1, "-t", 0.9) == 0
    assert (read_image(tmp_path / "d.png") != read_image(tmp_path / "c.png")).any()


def test_settings_are_in_the_picture(tmp_path):
    assert draw(export(tmp_path / "run", LABELS), tmp_path / "a.png", "--class", 2, "--seed", 5) == 0
    note = Image.open(tmp_path / "a.png").info
    assert {"seed": "5", "label": "2", "stride": "1", "step": "7"}.items() <= note.items()


def test_errors_are_one_line(tmp_path, capsys):
    run = export(tmp_path / "run", LABELS)
    for arguments, message in (
        (["--size", "big"], "--size big: give HEIGHTxWIDTH"),
        (["--size", "17x64"], "--size 17x64: 17x64 pixels (height x width) cannot be drawn: both"),
        (["--size", "8x64"], "the nearest is 16x64"),
        (["--class", "x"], "--class x: give class numbers"),
        (["--stride", "9"], "stride = 9 is outside 1..8"),
    ):
        assert draw(run, tmp_path / "a.png", *arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
