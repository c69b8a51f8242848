"""ImageNet and its depth, edges and low resolutions on a tiny stand-in of the folder."""

import logging

import numpy as np
import pytest
import yaml
from PIL import Image

from taming.config import instantiate_from_config
from taming.data import imagenet
from taming.data.files.depth import depth_to_rgba, read_depth, rgba_to_depth

SYNSETS = ("n01440764", "n01530575", "n01531178")


def shape(index: int, height: int = 40, width: int = 56) -> np.ndarray:
    """A soft ramp (H, W) with a bright square somewhere, 0..255."""
    ramp = np.tile(np.linspace(40, 120, width), (height, 1))
    ramp[8:24, 16 + index:32 + index] = 240
    return ramp.astype(np.uint8)


def save_depth(path, depth: np.ndarray):
    Image.fromarray(depth_to_rgba(depth)).save(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the training set, as the cache of 2021 had it, and one of depth maps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for split, short in (("train", "train"), ("validation", "val")):
        root = tmp_path / "autoencoders" / "data" / f"ILSVRC2012_{split}"
        for number, synset in enumerate(SYNSETS):
            (root / "data" / synset).mkdir(parents=True)
            depths = tmp_path / "data" / "imagenet_depth" / short / synset
            depths.mkdir(parents=True)
            for index in range(2):
                plane = shape(4 * number + 2 * index)
                image = Image.fromarray(plane).convert("RGB")
                image.save(root / "data" / synset / f"{index}.JPEG", quality=95)
                depth = plane.astype(np.float32) * 10 + 500
                Image.fromarray(depth_to_rgba(depth)).save(depths / f"{index}.png")
        (root / "synset_human.txt").write_text("\n".join(f"{s} fish {s[-1]}, thing" for s in SYNSETS))
        numbers = dict.fromkeys(range(1000), "n00000000") | dict(enumerate(SYNSETS, 30))
        (root / "index_synset.yaml").write_text(yaml.safe_dump(numbers))
    return tmp_path


def test_items(cache):
    data = imagenet.ImageNetValidation({"size": 32})
    item = data[3]
    assert len(data) == 6
    assert item["relpath"] == "n01530575/1.JPEG" and item["synsets"] == "n01530575"
    assert item["class_label"] == 1 and item["human_label"] == data.class_names[1] == "fish 5, thing"
    assert item["file_path_"].endswith("ILSVRC2012_validation/data/n01530575/1.JPEG")
    assert item["image"].shape == (32, 32, 3) and item["image"].dtype == np.float32
    assert imagenet.ImageNetValidation()[0]["image"].shape == (40, 56, 3)


def test_crops(cache):
    def crops(data):
        return len({data[0]["image"].tobytes() for _ in range(10)})

    assert crops(imagenet.ImageNetTrain({"size": 16})) > 1
    assert crops(imagenet.ImageNetTrain({"size": 16, "ImageNetTrain": {"random_crop": False}})) == 1
    assert crops(imagenet.ImageNetValidation({"size": 16})) == 1
    assert crops(imagenet.ImageNetValidation({"size": 16, "random_crop": True})) > 1


def test_class_numbers_and_subsets(cache, tmp_path):
    assert imagenet.str_to_indices("33-36, 5, 30-32") == [5, 30, 31, 33, 34, 35]  # ends do not belong
    data = imagenet.ImageNetTrain({"sub_indices": "31-33", "size": 16})
    assert [data.class_labels, sorted(set(data.synsets))] == [[0, 0, 1, 1], list(SYNSETS[1:])]
    assert len(imagenet.RINTrain({"size": 16})) == len(imagenet.RINValidation({"size": 16})) == 4  # 30 and 31
    file = tmp_path / "autoencoders/data/ILSVRC2012_train/index_synset.yaml"
    assert imagenet.give_synsets_from_indices([30], file) == [SYNSETS[0]]
    with pytest.raises(ValueError, match="has no synset for class 1077"):
        imagenet.ImageNetTrain({"sub_indices": "1077"})
    with pytest.raises(ValueError, match="sub_indices '3-x' has the part '3-x'"):
        imagenet.ImageNetTrain({"sub_indices": "3-x"})
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"index_synset\.yaml does not exist"):
        imagenet.RINTrain()


def test_lists_folders_and_names(cache, tmp_path, caplog):
    root = tmp_path / "autoencoders/data/ILSVRC2012_train"
    (root / "filelist.txt").write_text(f"{SYNSETS[2]}/1.JPEG\n{SYNSETS[0]}/0.JPEG\nx/n06596364_9591.JPEG\n")
    assert imagenet.ImageNetTrain().relpaths == [f"{SYNSETS[2]}/1.JPEG", f"{SYNSETS[0]}/0.JPEG"]
    with caplog.at_level(logging.WARNING):
        plain = imagenet.ImageNetBase({"size": 16, "data_root": str(root / "data")})  # synset folders alone
    assert len(plain) == 6 and plain[0]["human_label"] == SYNSETS[0]
    assert len(caplog.records) == 1 and "synset_human.txt does not exist" in caplog.records[0].getMessage()


def test_a_broken_index_ends_the_run(cache, tmp_path):
    root = tmp_path / "autoencoders/data/ILSVRC2012_train"
    with pytest.raises(ValueError, match="config of ImageNetTrain has sizes; it may have size, random_crop"):
        imagenet.ImageNetTrain({"sizes": 16})
    with pytest.raises(FileNotFoundError, match="ImageNetTrain are not here: put .* or give data_root"):
        imagenet.ImageNetTrain(data_root=tmp_path / "gone")
    (root / "synset_human.txt").write_text(f"{SYNSETS[0]} fish")
    with pytest.raises(ValueError, match="has no name for 2 synsets, such as n01530575"):
        imagenet.ImageNetTrain()
    (root / "filelist.txt").write_text("0.JPEG")
    with pytest.raises(ValueError, match=r"such as 0\.JPEG, are in no folder of a synset"):
        imagenet.ImageNetTrain()
    (root / "filelist.txt").write_text("n01440764/gone.JPEG")
    with pytest.raises(FileNotFoundError, match="none of 1 files"):
        imagenet.ImageNetTrain()


def test_depth_is_packed_float32(tmp_path):
    depth = np.random.default_rng(0).normal(1000, 300, (5, 7)).astype(np.float32)
    assert np.array_equal(rgba_to_depth(depth_to_rgba(depth)), depth)
    Image.fromarray(depth_to_rgba(depth)).save(tmp_path / "d.png")
    found = read_depth(tmp_path / "d.png")
    assert found.min() == -1 and found.max() == 1 and found.dtype == np.float32
    assert np.allclose((found + 1) / 2 * np.ptp(depth) + depth.min(), depth, atol=1e-2)
    Image.fromarray(depth_to_rgba(np.full((3, 3), 7.0))).save(tmp_path / "d.png")
    assert (read_depth(tmp_path / "d.png") == -1).all()
    with pytest.raises(ValueError, match=r"packed depth is uint8 \(H, W, 4\), got uint8 \(3, 3\)"):
        imagenet.rgba_to_depth(np.zeros((3, 3), np.uint8))


@pytest.mark.parametrize("make, labels", [
    (imagenet.ImageNetTrainWithDepth, 6), (imagenet.ImageNetValidationWithDepth, 6),
    (imagenet.RINTrainWithDepth, 4), (imagenet.RINValidationWithDepth, 4),
])
def test_depth_moves_with_its_image(cache, make, labels):
    data = make(size=20, random_crop=True)
    assert len(data) == labels
    seen = set()
    for i in [0, 1, 2] * 6:
        item = data[i]
        image, depth = item["image"].mean(-1), item["depth"]
        assert image.shape == depth.shape == (20, 20) and depth.dtype == np.float32
        assert np.corrcoef(image.ravel(), depth.ravel())[0, 1] > 0.98
        seen.add(depth.tobytes())
    assert len(seen) > 5
    assert {"relpath", "class_label", "human_label"} <= set(data[0])


def test_depth_sizes_and_roots(cache):
    crop = imagenet.ImageNetValidationWithDepth(crop_size=48, root="data/imagenet_depth")  # enlarged
    assert crop[0]["image"].shape == (48, 48, 3) and crop[0]["depth"].shape == (48, 48)
    assert imagenet.RINTrainWithDepth({"crop_size": 24})[0]["depth"].shape == (24, 24)
    assert imagenet.ImageNetValidationWithDepth()[0]["depth"].shape == (40, 56)
    target = "taming.data.imagenet.RINValidationWithDepth"
    built = instantiate_from_config({"target": target, "params": {"size": 16}})
    assert built[0]["depth"].shape == (16, 16)
    with pytest.raises(FileNotFoundError, match="none of 6 files that ImageNetTrainWithDepth with root x"):
        imagenet.ImageNetTrainWithDepth(size=16, root="x")


@pytest.mark.parametrize("spoil, message", [
    (lambda path: Image.new("RGB", (56, 40)).save(path), "0.png has mode RGB, but must be RGBA"),
    (lambda path: save_depth(path, np.zeros((40, 55))), "0.png has 40x55 .*image 40x56"),
    (lambda path: save_depth(path, np.full((40, 56), np.nan)), "0.png ranges from nan"),
    (lambda path: Image.new("RGBA", (56, 40), "black").save(path), "0.png ranges from -1.*not packed"),
    (lambda path: path.write_bytes(b""), "cannot read depth .*0.png: UnidentifiedImageError"),
])
def test_a_bad_depth_map_is_skipped(cache, tmp_path, caplog, spoil, message):
    spoil(tmp_path / "data/imagenet_depth/train" / SYNSETS[0] / "0.png")
    data = imagenet.ImageNetTrainWithDepth(size=16)
    with pytest.raises(ValueError, match=message):
        data.load_sample(0)
    with caplog.at_level(logging.WARNING):
        assert [data[i]["relpath"] for i in range(2)] == [f"{SYNSETS[0]}/1.JPEG"] * 2
    assert "1 of 6 are bad so far" in caplog.text


def test_drin_examples(cache, tmp_path):
    for name in ("a/0", "b/1"):
        plane = shape(ord(name[0]) % 7)
        for kind in ("images", "depth"):
            (tmp_path / f"data/drin_{kind}/{name[0]}").mkdir(parents=True)
        Image.fromarray(plane).convert("RGB").save(tmp_path / f"data/drin_images/{name}.JPEG")
        Image.fromarray(depth_to_rgba(plane)).save(tmp_path / f"data/drin_depth/{name}.png")
    (tmp_path / "data/drin_examples.txt").write_text("a/0.JPEG\nb/1.JPEG\n")
    data = imagenet.DRINExamples()
    assert len(data) == 2 and data[1]["depth"].shape == (256, 256) and data[1]["image"].shape == (256, 256, 3)
    assert imagenet.DRINExamples(size=16)[0]["depth"].max() > 0.9


def test_low_resolution(cache):
    item = imagenet.ImageNetScaleValidation(size=40, up_factor=4, keep_mode="nearest")[0]
    assert item["image"].shape == item["lr"].shape == (40, 40, 3) and item["lr"].dtype == np.float32
    blocks = item["lr"].reshape(10, 4, 10, 4, 3)  # the crop begins 8 columns into the image
    assert np.ptp(blocks, axis=(1, 3)).max() == 0
    assert 0.005 < np.abs(item["lr"] - item["image"]).mean() < 0.2
    assert "lr" not in imagenet.ImageNetScaleValidation(size=32)[0]
    assert imagenet.ImageNetScaleValidation(hr_factor=2)[0]["image"].shape == (20, 28, 3)
    assert imagenet.ImageNetScaleTrain(crop_size=24, up_factor=2)[0]["lr"].shape == (24, 24, 3)
    assert imagenet.ImageNetScaleTrain(crop_size=48, up_factor=2)[0]["lr"].shape == (48, 48, 3)
    with pytest.raises(ValueError, match="keep_mode is 'cubic'; choose one of nearest, bilinear, bicubic"):
        imagenet.ImageNetScaleTrain(size=32, up_factor=2, keep_mode="cubic")[0]


def test_imscale():
    x = np.random.default_rng(0).uniform(-1, 1, (12, 16, 3)).astype(np.float32)
    assert imagenet.imscale(x, None) is x and imagenet.imscale(x, 1) is x
    assert imagenet.imscale(x, 4).shape == (3, 4, 3) and imagenet.imscale(x, 4).dtype == np.float32
    assert imagenet.imscale(x, 4, keepshapes=True).shape == (12, 16, 3)
    with pytest.raises(ValueError, match="12x16 pixels cannot be made 13 times smaller"):
        imagenet.imscale(x, 13)


def test_edges_surround_the_square(cache):
    item = imagenet.ImageNetEdgesValidation(size=40)[0]
    assert item["lr"].shape == (40, 40, 3) and set(np.unique(item["lr"])) == {0, 1}
    rows, columns = np.nonzero(item["lr"][..., 0])
    assert abs(rows.min() - 8) <= 1 and abs(rows.max() - 23) <= 1  # the square's rows 8 to 23
    assert abs(columns.min() - 8) <= 1 and abs(columns.max() - 23) <= 1  # 16 to 31, less 8 of the crop
    train = imagenet.ImageNetEdgesTrain(crop_size=24)
    assert len({train[0]["lr"].tobytes() for _ in range(10)}) > 1
