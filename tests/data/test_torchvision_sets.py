"""CIFAR-10 and STL-10 on tiny stand-ins of their files."""

import hashlib
import pickle

import numpy as np
import pytest
from torchvision import datasets

from taming.data.torchvision_sets import CIFAR10, STL10
from taming.images import to_uint8

NAMES = [f"class {i}" for i in range(10)]


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    for name in ("data_batch_1", "test_batch"):
        content = {"data": pixels.reshape(4, -1), "labels": [3, 1, 9, 0]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    meta = datasets.CIFAR10.meta | {"md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path, pixels.transpose(0, 2, 3, 1)


def test_cifar10(cifar):
    root, pixels = cifar
    for split in ("train", "validation"):
        data = CIFAR10(root, split)
        assert len(data) == 4
        assert np.array_equal(to_uint8(data[2]["image"]), pixels[2]) and data[2]["image"].dtype == np.float32
        assert (data[2]["class_label"], data[2]["human_label"]) == (9, "class 9")
    assert CIFAR10(root, size=64)[0]["image"].shape == (64, 64, 3)
    assert CIFAR10(root, crop_size=24, random_crop=True, flip=True)[-1]["class_label"] == 0
    with pytest.raises(IndexError, match="index 4 of 4"):
        data[4]


@pytest.fixture
def stl(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    for name in ("train_X.bin", "test_X.bin", "unlabeled_X.bin"):
        (folder / name).write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())  # columns first
    for name in ("train_y.bin", "test_y.bin"):
        (folder / name).write_bytes(bytes([1, 10, 4]))  # counted from 1
    (folder / "class_names.txt").write_text("\n".join(NAMES))
    for attribute in ("train_list", "test_list"):
        files = [[name, md5(folder / name)] for name, _ in getattr(datasets.STL10, attribute)]
        monkeypatch.setattr(datasets.STL10, attribute, files)
    return tmp_path, pixels.transpose(0, 2, 3, 1)


def test_stl10(stl):
    root, pixels = stl
    data = STL10(root, "validation")
    assert np.array_equal(to_uint8(data[1]["image"]), pixels[1])
    assert [item["class_label"] for item in data] == [0, 9, 3] and data[1]["human_label"] == "class 9"
    assert set(STL10(root, "unlabeled", 32)[0]) == {"image"}
    both = STL10(root, "train+unlabeled")
    assert len(both) == 6 and set(both[0]) == set(both[5]) == {"image"}  # alike, to make batches of


@pytest.mark.parametrize("make", [CIFAR10, STL10])
def test_nothing_is_downloaded_unasked(tmp_path, make):
    with pytest.raises(FileNotFoundError, match=f"{make.__name__} is not in .* or set download: true"):
        make(tmp_path)
    with pytest.raises(ValueError, match="split is 'val'; choose one of train, validation"):
        make(tmp_path, "val")
