"""CelebA-HQ from npy files, FFHQ from images, both with classes and coordinates; lists, or a fixed draw."""

import numpy as np
import pytest
from PIL import Image

from taming.data import faceshq
from taming.data.splits import split_by_name
from taming.images import to_uint8


def face(seed: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """40 images of each set, without lists."""
    for name in ("celebahq", "ffhq"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(40):
        np.save(tmp_path / f"data/celebahq/imgHQ{i:05}.npy", face(i).transpose(2, 0, 1)[None])
        Image.fromarray(face(100 + i)).save(tmp_path / f"data/ffhq/{i:05}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def write_lists(data):
    for name, pattern in (("celebahq", "imgHQ{:05}.npy"), ("ffhq", "{:05}.png")):
        (data / f"{name}train.txt").write_text("\n".join(pattern.format(i) for i in (3, 1)))
        (data / f"{name}validation.txt").write_text(pattern.format(7))


def test_lists_and_npy_files(folders):
    write_lists(folders)
    item = faceshq.CelebAHQTrain(24)[0]
    assert item["file_path_"] == "data/celebahq/imgHQ00003.npy"
    assert item["image"].dtype == np.float32 and np.array_equal(to_uint8(item["image"]), face(3))
    assert len(faceshq.CelebAHQTrain(24)) == 2 and len(faceshq.CelebAHQValidation(24)) == 1
    assert np.array_equal(to_uint8(faceshq.FFHQValidation(24)[0]["image"]), face(107))
    assert set(faceshq.FFHQTrain(16, keys=["image"])[1]) == {"image"}
    assert faceshq.FFHQTrain(16)[0]["image"].shape == (16, 16, 3)


def test_both_have_classes(folders):
    write_lists(folders)
    data = faceshq.FacesHQTrain(24)
    assert [item["class"] for item in data] == [0, 0, 1, 1]
    assert np.array_equal(to_uint8(data[-1]["image"]), face(101))
    assert [item["class"] for item in faceshq.FacesHQValidation(24, keys=["image"])] == [0, 1]
    assert set(faceshq.FacesHQValidation(24, keys=["image"], coord=True)[0]) == {"image", "coord", "class"}


def test_crops_and_coordinates(folders):
    write_lists(folders)
    whole = (np.arange(24 * 24) / 24**2).reshape(24, 24, 1)
    item = faceshq.FacesHQValidation(24, crop_size=16, coord=True)[0]
    assert np.allclose(item["coord"], whole[4:20, 4:20])
    assert np.array_equal(to_uint8(item["image"]), face(7)[4:20, 4:20])
    data, places = faceshq.FacesHQTrain(24, crop_size=16, coord=True), set()
    for _ in range(10):
        item = data[0]
        top, left = divmod(round(float(item["coord"][0, 0, 0]) * 576), 24)
        assert np.array_equal(to_uint8(item["image"]), face(3)[top:top + 16, left:left + 16])
        places.add((top, left))
    assert len(places) > 4


def test_without_lists_a_fixed_draw_decides(folders):
    for train, validation in (
        (faceshq.CelebAHQTrain(8), faceshq.CelebAHQValidation(8)),
        (faceshq.FFHQTrain(8), faceshq.FFHQValidation(8)),
    ):
        assert len(train) + len(validation) == 40 and 1 <= len(validation) <= 14
        assert not set(train.data.labels["file_path_"]) & set(validation.data.labels["file_path_"])
    before = faceshq.FFHQValidation(8).data.labels["file_path_"]
    for i in range(40, 50):
        Image.fromarray(face(i)).save(folders / f"ffhq/{i:05}.png")
    assert set(before) <= set(faceshq.FFHQValidation(8).data.labels["file_path_"])  # more images move none
    elsewhere = faceshq.FFHQTrain(8, root=folders / "celebahq")
    assert elsewhere[0]["image"].shape == (8, 8, 3)


def test_the_draw_has_its_share_and_never_changes():
    names = [f"{i:05}.png" for i in range(7000)]
    train, validation = split_by_name(names, 1 / 7)
    assert abs(len(validation) - 1000) < 90 and sorted(train + validation) == names
    # the sums begin with a6 and 5b: more and less than half
    assert split_by_name(["a/00000.png", "00001.png"], 0.5) == (["a/00000.png"], ["00001.png"])


def test_errors(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="image folder gone does not exist"):
        faceshq.FFHQTrain(8, root="gone")
    with pytest.raises(FileNotFoundError, match=r"image list gone\.txt does not exist"):
        faceshq.FFHQTrain(8, list_file="gone.txt")
    with pytest.raises(ValueError, match="keys name faces; choose from image"):
        faceshq.FFHQTrain(8, keys=["faces"])
    write_lists(folders)
    (folders / "ffhqvalidation.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"ffhqvalidation\.txt, for validation, does not exist"):
        faceshq.FFHQValidation(8)
    np.save(folders / "celebahq/imgHQ00003.npy", np.zeros((3, 24, 24), np.float32))
    data = faceshq.CelebAHQTrain(8)
    with pytest.raises(ValueError, match=r"imgHQ00003\.npy: ValueError: float32 \(3, 24, 24\), but"):
        data.data.load_sample(0)
    assert data[0]["file_path_"].endswith("imgHQ00001.npy")
    one = tmp_path / "one"
    one.mkdir()
    Image.fromarray(face(0)).save(one / "00000.png")
    sides = [faceshq.FFHQTrain, faceshq.FFHQValidation]
    (folders / "ffhqtrain.txt").unlink()
    with pytest.raises(ValueError, match="of 1 images in .* none fell to (train|validation), which gets"):
        [make(8, root=one) for make in sides]
