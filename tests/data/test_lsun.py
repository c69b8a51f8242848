"""LSUN from a folder, from lists and from lmdb files."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data import lsun
from taming.images import to_uint8

ROOT = Path(__file__).parents[2]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "data/lsun/churches").mkdir(parents=True)
    for i in range(400):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(tmp_path / f"data/lsun/churches/{i:03}.webp")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data/lsun"


def test_a_folder_is_split(folder):
    train, validation = lsun.LSUNChurchesTrain(8), lsun.LSUNChurchesValidation(8)
    assert len(train) + len(validation) == 400 and 1 <= len(validation) <= 12
    assert not set(train.data.labels["file_path_"]) & set(validation.data.labels["file_path_"])
    assert train[0]["image"].shape == (8, 8, 3) and train[0]["file_path_"] == "data/lsun/churches/000.webp"
    (folder / "church_outdoor_train.txt").write_text("007.webp\n003.webp")
    (folder / "church_outdoor_val.txt").write_text("009.webp")
    assert lsun.LSUNChurchesValidation()[0]["image"].shape == (256, 256, 3)
    assert [item["file_path_"][-8:] for item in lsun.LSUNChurchesTrain(8)] == ["007.webp", "003.webp"]
    towers = lsun.LSUNTowersTrain(8, root=folder / "churches", crop_size=6, flip=False)
    assert towers[0]["image"].shape == (6, 6, 3)
    with pytest.raises(FileNotFoundError, match="image folder data/lsun/towers does not exist"):
        lsun.LSUNTowersTrain(8)


def write_lmdb(path, values: dict[str, bytes]):
    lmdb = pytest.importorskip("lmdb")
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def test_an_lmdb_file_is_read(folder):
    images = {f"{i:040x}": encoded(picture(i)) for i in range(3)}
    write_lmdb(folder / "church_outdoor_train_lmdb", images)
    data = lsun.LSUNChurchesTrain(None, flip=False)
    assert len(data) == 3 and data[2]["file_path_"].endswith(f"train_lmdb/{2:040x}")
    for copy in (data, pickle.loads(pickle.dumps(data))):  # as loader processes can get it
        assert np.array_equal(to_uint8(copy[2]["image"]), np.asarray(picture(2)))
    batches = torch.utils.data.DataLoader(data, 1, num_workers=2)
    for i, batch in enumerate(batches):
        assert np.array_equal(to_uint8(batch["image"][0].numpy()), np.asarray(picture(i)))


def test_a_broken_image_in_an_lmdb_file_is_skipped(folder):
    write_lmdb(folder / "x", {"a": encoded(picture(0)), "b": b"", "c": encoded(picture(2))})
    data = lsun.LSUNTowersValidation(16, root=folder / "x")
    with pytest.raises(ValueError, match="cannot read image .*x/b: UnidentifiedImageError"):
        data.data.load_sample(1)
    assert data[1]["file_path_"].endswith("x/c")


def test_a_broken_lmdb_file_ends_the_run(folder):
    lmdb = pytest.importorskip("lmdb")
    assert lmdb.Error
    (folder / "x").mkdir()
    (folder / "x/data.mdb").write_bytes(b"no such thing" * 1000)
    with pytest.raises(ValueError, match="x is no lmdb folder that can be read"):
        lsun.LSUNTowersTrain(root=folder / "x")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_does_not_kill_the_process(folder, share):
    write_lmdb(folder / "x", {f"{i:040x}": encoded(picture(i)) for i in range(50)})
    file = folder / "x/data.mdb"
    size = file.stat().st_size
    data = file.read_bytes()[:int(share * size)]
    file.write_bytes(data)
    words = [sys.executable, "-c", "import sys; from taming.data.lsun import LmdbImages as L; L(sys.argv[1])"]
    done = subprocess.run([*words, str(folder / "x")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1  # where the file is read beyond its end, -7
    assert f"ValueError: {file} is cut off: it has {len(data)} bytes of {size} or more" in done.stderr


def test_without_the_package_the_error_names_it(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    (folder / "x").mkdir()
    (folder / "x/data.mdb").write_bytes(b"")
    with pytest.raises(ValueError, match=r'lmdb: pip install "taming\[data\]", or pip install lmdb;'):
        lsun.LSUNTowersTrain(root=folder / "x")
