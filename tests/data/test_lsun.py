"""LSUN from a folder, from lists and from lmdb files."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data import lsun
from taming.data.files.lmdb_file import read_entries
from taming.images import to_uint8


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


# ---- lmdb files


def picture(seed: int) -> np.ndarray:
    """The image number `seed` of lsun.mdb.gz."""
    side = 40 if seed % 40 == 7 else 2  # the larger ones have pages of their own
    return np.random.default_rng(seed).integers(0, 256, (side, side + 2, 3), dtype=np.uint8)


@pytest.fixture
def file(folder):
    """A file of 120 images, by their numbers in 40 digits: made by lmdb 0.9.36, a tree of two levels."""
    path = folder / "church_outdoor_train_lmdb/data.mdb"
    path.parent.mkdir()
    path.write_bytes(gzip.decompress((Path(__file__).parent / "lsun.mdb.gz").read_bytes()))
    return path


def test_an_lmdb_file_is_read(file):
    data = lsun.LSUNChurchesTrain(None, flip=False)
    assert len(data) == 120 and data[2]["file_path_"].endswith(f"train_lmdb/{2:040x}")
    for copy in (data, pickle.loads(pickle.dumps(data))):  # as loader processes can get it
        for i in range(120):
            assert np.array_equal(to_uint8(copy[i]["image"]), picture(i))
    batches = torch.utils.data.DataLoader(data, 1, num_workers=2)
    for i, batch in zip(range(10), batches, strict=False):
        assert np.array_equal(to_uint8(batch["image"][0].numpy()), picture(i))


def test_entries_are_those_that_the_library_reads(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    rng = np.random.default_rng(0)
    for count in (0, 1, 40, 3000):
        sizes = rng.integers((1, 0), (500, 9000), (count, 2))
        values = {rng.bytes(int(key)): rng.bytes(int(value)) for key, value in sizes}
        path = tmp_path / str(count)
        with lmdb.open(str(path), map_size=2**26) as opened, opened.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key, value)
            for key in list(values)[::7]:  # leave free pages behind
                transaction.delete(key)
                del values[key]
        entries = read_entries(path / "data.mdb")
        content = (path / "data.mdb").read_bytes()
        places = zip(entries.offsets.tolist(), entries.sizes.tolist(), strict=True)
        found = {entries.key(i): content[start:start + size] for i, (start, size) in enumerate(places)}
        assert found == values and list(found) == sorted(values)


def test_a_broken_image_in_an_lmdb_file_is_skipped(file, caplog):
    entries = read_entries(file)
    with file.open("r+b") as opened:
        opened.seek(int(entries.offsets[1]))
        opened.write(b"no image")
    data = lsun.LSUNChurchesTrain(16)
    with pytest.raises(ValueError, match=f"cannot read image .*/{1:040x}: UnidentifiedImageError"):
        data.data.load_sample(1)
    assert data[1]["file_path_"].endswith(f"{2:040x}") and "1 of 120 are bad so far" in caplog.text


@pytest.mark.parametrize("content", [b"no such thing" * 1000, b"", bytes(100_000)])
def test_what_is_no_lmdb_file_is_one_line(folder, content):
    (folder / "x").mkdir()
    (folder / "x/data.mdb").write_bytes(content)
    with pytest.raises(ValueError, match="x is not an lmdb folder that can be read: it is not an lmdb file"):
        lsun.LSUNTowersTrain(root=folder / "x")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_one_line(file, share):
    size = file.stat().st_size
    with file.open("r+b") as opened:
        left = opened.truncate(int(share * size))
    with pytest.raises(ValueError, match=f"it is cut off: it has {left} bytes of {size} or more"):
        lsun.LSUNChurchesTrain()


def put(file, place, layout, *values):
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(struct.pack(layout, *values))


@pytest.fixture
def root(file):
    """The byte where the root of the tree, a branch, begins."""
    (transaction, number) = max(
        struct.unpack("<8xQ", file.read_bytes()[start + 136:start + 152])
        + struct.unpack("<Q", file.read_bytes()[start + 128:start + 136]) for start in (0, 4096)
    )
    assert struct.unpack_from("<H", file.read_bytes(), number * 4096 + 10) == (1,)
    return number * 4096


@pytest.mark.parametrize("change, message", [
    ("loop", "page .* is not where the tree"), ("far", "page .* is not where the tree"),
    ("many", "a page of the tree is damaged"), ("outside", "a page of the tree is damaged"),
    ("nested", "nested databases"), ("meta", "a page of the tree is damaged"),
])
def test_a_hostile_tree_is_one_line(file, root, change, message):
    data = file.read_bytes()
    first = root + struct.unpack_from("<H", data, root + 16)[0]
    leaf = struct.unpack_from("<HH", data, first)[0] * 4096
    node = leaf + struct.unpack_from("<H", data, leaf + 16)[0]
    if change == "loop":
        put(file, first, "<HHH", root // 4096, 0, 0)
    elif change == "far":
        put(file, first, "<HHH", 65535, 65535, 65535)
    elif change == "many":  # a thousand times the same node
        put(file, leaf + 12, "<H", 16 + 2 * 1000)
        put(file, leaf + 16, "<1000H", *[node - leaf] * 1000)
    elif change == "outside":
        put(file, leaf + 16, "<H", 65534)
    elif change == "nested":
        put(file, node + 4, "<H", 2)
    else:
        for start in (0, 4096):
            put(file, start + 128, "<Q", 0)  # a root that is not a page of the tree
    with pytest.raises(ValueError, match=message):
        lsun.LSUNChurchesTrain()


def test_values_that_lie_are_bad_samples(file, root, caplog):
    data = file.read_bytes()
    leaf = struct.unpack_from("<H", data, root + struct.unpack_from("<H", data, root + 16)[0])[0] * 4096
    nodes = [leaf + place for place in struct.unpack_from("<8H", data, leaf + 16)]
    assert struct.unpack_from("<H", data, nodes[7] + 4) == (1,)  # has pages of its own
    put(file, nodes[7], "<HH", 0, 65535)  # a size of 4 GB
    put(file, nodes[7] + 48, "<Q", 1 << 63)  # far behind the end
    data = lsun.LSUNChurchesTrain(8)
    assert data[7]["file_path_"].endswith(f"{8:040x}") and "4294901760 bytes, more than" in caplog.text
    put(file, nodes[7], "<HH", 5000, 0)
    with pytest.raises(ValueError, match=f"{7:040x}: ValueError: it is beyond the end"):
        lsun.LSUNChurchesTrain(8).data.load_sample(7)


def test_an_lmdb_file_must_be_a_file(folder):
    (folder / "x/data.mdb").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder, but must be a file"):
        lsun.LmdbImages(folder / "x")
