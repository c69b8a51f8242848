"""S-FLCKR, ADE20K and COCO: what items hold, on tiny stand-ins of each layout, and what is refused."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data import ade20k, coco, sflckr
from taming.data.sampler import seeded


def write(path, values: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def pair(images, masks, name: str, ids: np.ndarray):
    """Write a image that shows its label map."""
    write(images / f"{name}.png", np.stack([ids] * 3, axis=-1))
    (images / f"{name}.png").rename(images / f"{name}.jpg")  # lossless, under the name that lists have
    write(masks / f"{name}.png", ids)


def regions(*ids: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Vertical stripes of these ids."""
    return np.repeat(np.array(ids, np.uint8), width // len(ids))[None].repeat(height, axis=0)


@pytest.fixture
def listed(tmp_path):
    """A list of three images below folders, with label maps."""
    for name, ids in {"a/x": regions(0, 5), "a/y": regions(181, 2), "b/z": regions(7, 7)}.items():
        pair(tmp_path / "images", tmp_path / "masks", name, ids)
    (tmp_path / "list.txt").write_text("a/x.jpg\na/y.jpg\n\nb/z.jpg\n")
    return tmp_path / "list.txt", tmp_path / "images", tmp_path / "masks"


def test_items_of_a_list(listed):
    data = sflckr.SegmentationBase(*listed, size=16)
    item = data[1]
    assert len(data) == 3 and data.n_labels == 182
    assert item["image"].shape == (16, 16, 3) and item["image"].dtype == np.float32
    assert item["segmentation"].shape == (16, 16, 182) and item["segmentation"].dtype == np.float32
    assert (item["segmentation"].sum(-1) == 1).all()
    assert np.unique(item["segmentation"].argmax(-1)).tolist() == [2, 181]
    assert item["relative_file_path_"] == "a/y.jpg"
    assert item["file_path_"] == str(listed[1] / "a/y.jpg")
    assert item["segmentation_path_"] == str(listed[2] / "a/y.png")


def test_ids_are_the_one_hot_maps_and_small(listed):
    onehot = sflckr.SegmentationBase(*listed, size=16)
    ids = sflckr.SegmentationBase(*listed, size=16, segmentation_ids=True)
    for one, other in zip(onehot, ids, strict=True):
        assert np.array_equal(one["segmentation"].argmax(-1), other["segmentation"])
        assert other["segmentation"].shape == (16, 16) and other["segmentation"].nbytes == 256
    batch = torch.utils.data.default_collate([ids[0], ids[1]])
    assert batch["segmentation"].dtype == torch.uint8


def test_image_and_map_are_cropped_alike(listed):
    data = sflckr.SegmentationBase(*listed, size=None)
    assert data[0]["image"].shape == (24, 32, 3)
    data = sflckr.SegmentationBase(*listed, size=16, random_crop=True, interpolation="nearest")
    seen = set()
    for _ in range(20):
        item = data[0]
        ids = item["segmentation"].argmax(-1)
        assert np.array_equal(np.rint((item["image"][..., 0] + 1) * 127.5), ids)
        seen.add(ids.tobytes())
    assert len(seen) > 3


@pytest.mark.parametrize("module, size, labels, ids, expected", [
    (sflckr, None, 182, (0, 181), [0, 181]),
    (ade20k, 256, 151, (0, 150), [0, 150]),
    (coco, 256, 183, (9, 255, 181, 0), [0, 1, 10, 182]),  # unlabeled becomes 0, all others rise by one
])
def test_examples_know_their_folders(tmp_path, monkeypatch, module, size, labels, ids, expected):
    name = module.__name__.rsplit(".", 1)[-1]
    data = tmp_path / "data"
    pair(data / f"{name}_images", data / f"{name}_segmentations", "1", regions(*ids))
    (data / f"{name}_examples.txt").write_text("1.jpg\n")
    monkeypatch.chdir(tmp_path)
    item = module.Examples()[0]
    assert item["segmentation"].shape == ((24, 32, labels) if size is None else (256, 256, labels))
    assert np.unique(item["segmentation"].argmax(-1)).tolist() == expected
    assert module.Examples(size=16, segmentation_ids=True)[0]["segmentation"].dtype == np.uint8


@pytest.mark.parametrize("spoil, message", [
    (lambda images, masks: write(masks / "a/y.png", regions(182, 0)),
     "y.png holds label ids from 0 to 182, but n_labels=182 allows 0 to 181: repair the file"),
    (lambda images, masks: write(masks / "a/y.png", regions(1, 2, height=23)),
     "y.png has 23x32 pixels .height x width., its image 24x32"),
    (lambda images, masks: write(masks / "a/y.png", np.zeros((24, 32, 3), np.uint8)),
     "y.png has mode RGB, but a label map has one channel"),
    (lambda images, masks: (masks / "a/y.png").write_bytes(b""), "cannot read segmentation .*y.png"),
    (lambda images, masks: (masks / "a/y.png").unlink(), "y.png: FileNotFoundError"),
    (lambda images, masks: (images / "a/y.jpg").write_bytes(b""), "cannot read image .*y.jpg"),
])
def test_one_bad_sample_is_skipped_and_reported(listed, caplog, spoil, message):
    spoil(*listed[1:])
    data = sflckr.SegmentationBase(*listed, size=16, max_bad_fraction=0.4)
    with caplog.at_level(logging.WARNING):
        assert [item["relative_file_path_"] for item in data] == ["a/x.jpg", "b/z.jpg", "b/z.jpg"]
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match=message):
        data.load_sample(1)
    assert "1 of 3 are bad" in caplog.records[0].getMessage()


def test_16_bit_maps_and_palettes_are_ids(tmp_path):
    ids = regions(1, 2).astype(np.uint16) * 200
    pair(tmp_path, tmp_path, "x", regions(1, 2))
    (tmp_path / "list.txt").write_text("x.jpg")
    Image.fromarray(ids).save(tmp_path / "x.png")
    arguments = tmp_path / "list.txt", tmp_path, tmp_path, 16
    item = sflckr.SegmentationBase(*arguments, n_labels=401, segmentation_ids=True)[0]
    assert np.unique(item["segmentation"]).tolist() == [200, 400]
    palette = Image.fromarray(regions(3, 9))
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(tmp_path / "x.png")
    item = sflckr.SegmentationBase(*arguments, segmentation_ids=True)[0]
    assert np.unique(item["segmentation"]).tolist() == [3, 9]


def test_a_broken_index_ends_the_run(listed, tmp_path):
    list_file, images, masks = listed
    with pytest.raises(FileNotFoundError, match=r"image list .*gone\.txt does not exist"):
        sflckr.SegmentationBase(tmp_path / "gone.txt", images, masks)
    with pytest.raises(FileNotFoundError, match=r"none of 3 files that .*list\.txt names exists"):
        sflckr.SegmentationBase(list_file, tmp_path / "elsewhere", masks)
    with pytest.raises(FileNotFoundError, match=r"such as .*masks/a/a/x\.png"):
        sflckr.SegmentationBase(list_file, images, masks / "a")
    list_file.write_text("\n")
    with pytest.raises(ValueError, match=r"image list .*list\.txt is empty"):
        sflckr.SegmentationBase(*listed)


@pytest.fixture
def ade(tmp_path, monkeypatch):
    root = tmp_path / "data" / "ade20k_root"
    lines = []
    for folder, names in {"training": ("ADE_train_1", "ADE_train_2"), "validation": ("ADE_val_1",)}.items():
        for number, name in enumerate(names):
            pair(root / "images" / folder, root / "annotations" / folder, name, regions(number, 150))
            lines.append(f"{name} scene_{number}")
    (root / "sceneCategories.txt").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return root


def test_ade20k_has_scenes(ade):
    item = ade20k.ADE20kTrain(size=16)[1]
    assert item["scene_category"] == "scene_1" and item["relative_file_path_"] == "training/ADE_train_2.jpg"
    assert item["relative_segmentation_path_"] == "training/ADE_train_2.png"
    assert item["segmentation"].shape == (16, 16, 151)
    assert np.unique(item["segmentation"].argmax(-1)).tolist() == [1, 150]
    (ade.parent / "ade20k_test.txt").write_text("validation/ADE_val_1.jpg\n")
    data = ade20k.ADE20kValidation({"size": 20, "crop_size": 12}, data_root=ade, segmentation_ids=True)
    assert len(data) == 1 and data[0]["segmentation"].shape == (12, 12)
    assert len({ade20k.ADE20kTrain(size=16)[0]["image"].tobytes() for _ in range(10)}) > 1


def test_ade20k_errors(ade):
    with pytest.raises(ValueError, match="config of ADE20kTrain has sizes; it may have size, random_crop"):
        ade20k.ADE20kTrain({"sizes": 16})
    (ade / "sceneCategories.txt").write_text("ADE_train_1 street")
    with pytest.raises(ValueError, match="has no category for 1 of 2 images, such as ADE_train_2"):
        ade20k.ADE20kTrain()


@pytest.fixture
def captioned(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for split in ("train2017", "val2017"):
        for name, ids in {"000000000001": regions(255, 4), "000000000002": regions(90, 181)}.items():
            pair(data / "coco" / split, data / "cocostuffthings" / split, name, ids)
            colours = np.stack([ids, ids, 255 - ids], axis=-1)
            write(data / f"coco/annotations/stuff_{split}_pixelmaps/{name}.png", colours)
        captions = {
            "images": [{"id": n, "file_name": f"00000000000{n}.jpg"} for n in (1, 2)],
            "annotations": [{"image_id": n, "caption": f"{n}{word}"} for n in (1, 2) for word in "abc"],
        }
        short = split.removesuffix("2017")
        file = data / f"coco/annotations/captions_{short}2017.json"
        file.write_text(json.dumps(captions))
    monkeypatch.chdir(tmp_path)
    return data


def test_coco_has_captions(captioned):
    data = coco.CocoImagesAndCaptionsTrain(16)
    item = data[1]
    assert len(data) == 2 and item["filename_"] == "000000000002.jpg"
    assert item["img_path"] == "data/coco/train2017/000000000002.jpg"
    assert item["seg_path"] == "data/coco/annotations/stuff_train2017_pixelmaps/000000000002.png"
    assert item["image"].shape == item["segmentation"].shape == (16, 16, 3)
    assert set(np.rint((item["segmentation"][..., 0] + 1) * 127.5).flat) == {90, 181}  # no mixed colours
    seen = set()
    for epoch in range(20):
        with seeded(0, epoch, 1):
            caption = data[1]["caption"]
        assert isinstance(caption, list)
        seen |= set(caption)
    assert seen == {"2a", "2b", "2c"}


def test_coco_stuff_and_things(captioned):
    data = coco.CocoImagesAndCaptionsValidation(16, True, True, given_files=["000000000001.png"])
    assert len(data) == 1 and data[0]["seg_path"] == "data/cocostuffthings/val2017/000000000001.png"
    assert data[0]["segmentation"].shape == (16, 16, 183)
    assert np.unique(data[0]["segmentation"].argmax(-1)).tolist() == [0, 5]
    ids = coco.CocoImagesAndCaptionsValidation(16, True, True, 12, segmentation_ids=True)
    assert ids[1]["segmentation"].shape == (12, 12) and ids[1]["segmentation"].dtype == np.uint8
    whole = coco.CocoImagesAndCaptionsValidation(12, True, True, force_no_crop=True)
    assert whole[0]["image"].shape == (12, 16, 3) and whole[0]["segmentation"].shape == (12, 16, 183)


def test_coco_errors(captioned):
    with pytest.raises(ValueError, match="onehot_segmentation needs use_stuffthing"):
        coco.CocoImagesAndCaptionsTrain(16, True)
    with pytest.raises(FileNotFoundError, match="captions gone.json do not exist"):
        coco.CocoImagesAndCaptionsTrain(16, datajson="gone.json")
    with pytest.raises(ValueError, match="given_files names none of the 2 images"):
        coco.CocoImagesAndCaptionsValidation(16, given_files=["x.png"])
    file = captioned / "coco/annotations/captions_train2017.json"
    file.write_text(json.dumps({"images": [{"id": 1}]}))
    with pytest.raises(ValueError, match="cannot be used as COCO captions: KeyError: 'file_name'; download"):
        coco.CocoImagesAndCaptionsTrain(16)
    file.write_text("{")
    with pytest.raises(ValueError, match="cannot be used as COCO captions: JSONDecodeError"):
        coco.CocoImagesAndCaptionsTrain(16)
    images, stray = [{"id": 1, "file_name": "1.jpg"}], {"id": 7, "image_id": -1, "caption": "a"}
    file.write_text(json.dumps({"images": images, "annotations": [stray]}))
    with pytest.raises(ValueError, match="annotation 7 is of image -1, which the file does not list; "):
        coco.CocoImagesAndCaptionsTrain(16)
    file.write_text(json.dumps({"images": [{"id": 1, "file_name": None}], "annotations": []}))
    with pytest.raises(ValueError, match="image 1 has the file_name None; download it again, or correct"):
        coco.CocoImagesAndCaptionsTrain(16)
