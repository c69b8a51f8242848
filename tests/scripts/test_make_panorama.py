"""One large picture from the command line, for each kind of model that needs no other input."""

import numpy as np
import pytest
import torch
from PIL import Image

from taming.checkpoint import load_model
from taming.cli import command, panorama
from taming.data.files.images import read_image
from taming.images import from_uint8
from taming.inference.loading import decode
from tests.scripts.test_make_samples import stage
from tests.scripts.test_sample_fast import GRID, LABELS, NULL, SOS, export

COORDINATES = {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 16, "down_factor": 2}}
CONDITIONS = [(LABELS, "class_label"), (SOS, "image"), (COORDINATES, "coord")]


def draw(run, file, *arguments):
    return command("panorama")(["-r", run, "-o", str(file), "--device", "cpu", *map(str, arguments)])


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
        (["--size", "17x64"], "--size 17x64: 17x64 pixels (height x width) cannot be generated: both"),
        (["--size", "8x64"], "the nearest is 16x64"),
        (["--class", "x"], "--classes x: give class numbers"),
        (["--stride", "9"], "stride is 9: give 1 to 8"),
    ):
        assert draw(run, tmp_path / "a.png", *arguments) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        draw(run, tmp_path / "a.png", "--size", "big")
    assert "argument --size: big: give HEIGHTxWIDTH" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_where_no_picture_can_be_written(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for out, message in (
        (tmp_path / "a.jpg", "a name that ends in .png"), (file / "a.png", f"{file} is a file"),
        (file / "a", f"{file} is a file"),
    ):
        assert draw("nowhere", out) == 1  # before the run is read
        error = capsys.readouterr().err
        assert error.startswith(f"error: --outdir {out}") and message in error
    assert list(tmp_path.iterdir()) == [file]


# ---- label maps

SEGMENTED = [LABELS, GRID], ["class_label", "segmentation"]
STAGE_OF_LABELS = stage("VQSegmentationModel", 10, n_labels=10, image_key="segmentation")


def label_map(file, height=16, width=32, mode="L"):
    """Ids 3 on the left, 8 on the right."""
    ids = np.full((height, width), 3, np.uint8)
    ids[:, width // 2 :] = 8
    image = Image.fromarray(ids)
    if mode == "P":
        image = image.convert("P")
        image.putdata(ids.flatten().tolist())
        image.putpalette([7 * i % 256 for i in range(768)])
    image.save(file)
    return file


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_label_map_gives_size_and_content(mode, tmp_path):
    run = export(tmp_path / "run", GRID, "segmentation", strong=True)
    file = label_map(tmp_path / "labels.png", mode=mode)
    assert draw(run, tmp_path / "a.png", "--segmentation", file) == 0
    assert Image.open(tmp_path / "a.png").size == (32, 16)
    other = label_map(tmp_path / "other.png", width=16)
    for name, map_ in (("b", file), ("c", other)):
        assert draw(run, tmp_path / f"{name}.png", "--segmentation", map_, "--size", "24x48") == 0
        assert Image.open(tmp_path / f"{name}.png").size == (48, 24)
    assert (read_image(tmp_path / "b.png") == read_image(tmp_path / "c.png")).all()  # the same, resized
    mirrored = tmp_path / "mirrored.png"
    Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    assert draw(run, tmp_path / "d.png", "--segmentation", mirrored) == 0
    assert (read_image(tmp_path / "a.png") != read_image(tmp_path / "d.png")).any()


def test_a_class_a_label_map_or_both(tmp_path):
    run = export(tmp_path / "run", *SEGMENTED, strong=True, **NULL)
    file = label_map(tmp_path / "labels.png")
    ways = {"both": ["--class", 1, "--segmentation", file], "map": ["--segmentation", file],
            "class": ["--class", 1, "--size", "16x32"], "guided": ["--segmentation", file, "--guidance", 5]}
    for name, words in ways.items():
        assert draw(run, tmp_path / f"{name}.png", *words) == 0
        assert Image.open(tmp_path / f"{name}.png").size == (32, 16)
    pictures = {read_image(tmp_path / f"{name}.png").tobytes() for name in ways}
    assert len(pictures) == len(ways)


# ---- completion


def test_completion_keeps_the_upper_half(tmp_path, monkeypatch):
    run, seen = export(tmp_path / "run", LABELS), []

    def noted_decode(model, codes):
        seen.append(codes)
        return decode(model, codes)

    monkeypatch.setattr(panorama, "decode", noted_decode)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)).save(picture)
    pixels = torch.from_numpy(from_uint8(read_image(picture))).permute(2, 0, 1)
    given = load_model(run)[0].encode_to_z(pixels[None])[1].view(8, 16)
    for words, rows in ([], 4), (["--known", 0.9], 7), (["--known", 0], 0):
        assert draw(run, tmp_path / "a.png", "--complete", picture, *words) == 0
        same = (seen[-1][0] == given).float().mean(1)  # share of each of the 8 rows
        assert (same[:rows] == 1).all() and same[rows:].max() < 0.6
        assert Image.open(tmp_path / "a.png").size == (32, 16)


def test_completion_keeps_the_pixels_of_the_original(tmp_path):
    """f = 2: a pixel beside each generated code is a mixture."""
    run = export(tmp_path / "run", SOS, "image")
    original, mask = tmp_path / "original.png", tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32, 3), np.uint8)).save(original)
    white = Image.new("L", (32, 16))
    white.paste(255, (8, 4, 12, 8))
    white.save(mask)
    before = read_image(original)
    assert draw(run, tmp_path / "a.png", "--complete", original) == 0
    assert draw(run, tmp_path / "b.png", "--complete", original, "--mask", mask) == 0
    upper, masked = (read_image(tmp_path / f"{name}.png") for name in "ab")
    assert (upper[:7] == before[:7]).all() and (upper[8:] != before[8:]).any(-1).mean() > 0.5
    same = (masked == before).all(-1)
    assert not same[4:8, 8:12].any()
    same[3:9, 7:13] = True
    assert same.all()


def test_the_image_to_complete_is_not_replaced(tmp_path, capsys, monkeypatch):
    run = export(tmp_path / "run", SOS, "image")
    monkeypatch.chdir(tmp_path)
    for name in ("panorama.png", "panorama_2.png"):
        assert command("panorama")(["-r", run, "--device", "cpu", "--size", "16x16"]) == 0
        assert (tmp_path / name).exists()
    before = (tmp_path / "panorama.png").read_bytes()
    words = ["-r", run, "--device", "cpu", "--complete", str(tmp_path / "panorama.png")]
    assert command("panorama")([*words, "-o", "panorama.png"]) == 1
    assert "panorama.png is read, and would be replaced" in capsys.readouterr().err
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    assert command("panorama")([*words, "--out", "photo.png"]) == 1
    assert "photo.png exists and is not marked as written by taming" in capsys.readouterr().err
    assert (tmp_path / "panorama.png").read_bytes() == before
    assert command("panorama")([*words, "-o", "new/folder"]) == 0
    assert (tmp_path / "new" / "folder" / "panorama.png").exists()


def test_a_mask_and_another_size(tmp_path):
    run = export(tmp_path / "run", SOS, "image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8)).save(tmp_path / "x.png")
    Image.new("L", (32, 16), 255).save(tmp_path / "mask.png")
    words = ["--complete", tmp_path / "x.png", "--size", "16x32", "--mask", tmp_path / "mask.png"]
    assert draw(run, tmp_path / "a.png", *words) == 0
    note = Image.open(tmp_path / "a.png").info
    assert {"size": "16x32", "complete": "x.png", "mask": "mask.png"}.items() <= note.items()


def test_files_that_will_not_do(tmp_path, capsys):
    run = export(tmp_path / "run", *SEGMENTED, **NULL)
    labels, small = label_map(tmp_path / "labels.png"), label_map(tmp_path / "small.png", 8, 32)
    wrong = tmp_path / "wrong.png"
    Image.new("L", (32, 16), 10).save(wrong)
    (tmp_path / "text.png").write_text("no picture")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (48, 16)).save(picture)
    black = tmp_path / "black.png"
    Image.new("L", (48, 16)).save(black)
    for arguments, message in (
        (["--segmentation", tmp_path / "text.png"], "cannot read label map"),
        (["--segmentation", tmp_path / "nothing.png"], "cannot read label map"),
        (["--segmentation", wrong], "has the label 10, the model's are 0..9"),
        (["--segmentation", small], "the image: 8x32 pixels (height x width) cannot be generated"),
        (["--segmentation", labels, "--complete", picture], "segmentation: the label map has 16x32 pixels"),
        (["--complete", tmp_path / "text.png"], "cannot read image"),
        (["--class", 1, "--complete", picture, "--mask", black], "leaves nothing to generate"),
        (["--class", 1, "--known", 0.5], "name it with --complete"),
        (["--complete", picture, "--mask", black, "--known", 0.9], "give one of them"),
        (["--class", "1,2"], "give one class number"),
        ([], "class_label, segmentation is missing"),
    ):
        assert draw(run, tmp_path / "a.png", *arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("error: ") == 1
    run = export(tmp_path / "labelled", LABELS)
    for arguments, message in (
        (["--segmentation", labels], "not conditioned on label maps"), (["--guidance", 2], "no null token"),
        (["-k", 17], "top_k is 17: give 1 to 16"),
    ):
        assert draw(run, tmp_path / "a.png", *arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
