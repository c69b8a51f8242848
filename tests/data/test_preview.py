"""The sheet of a data set: what can be drawn is drawn under its key, the rest is written beside it."""

import numpy as np
import pytest
import torch
from PIL import Image

from taming.colormap import label_colors
from taming.data.helper_types import Annotation
from taming.data.landscapes import KEYS, POSE_KEYS, Landscapes
from taming.data.pose import limb_map
from taming.data.preview import describe_item, preview_sheet
from taming.images import to_uint8


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


def test_every_condition_of_the_landscapes_is_shown():
    dataset = Landscapes(64, 4, keys=KEYS + POSE_KEYS, figures=1.0)
    item = dataset[1]
    pictures, lines = describe_item(item, dataset)
    assert set(pictures) == set(KEYS + POSE_KEYS) - {"class_label", "human_label"}
    assert np.array_equal(pixels(pictures["image"]), to_uint8(item["image"]))
    assert np.array_equal(pixels(pictures["pose"]), limb_map(item["keypoints"], (64, 64)))
    assert np.array_equal(pixels(pictures["depth"])[..., 0], to_uint8(item["depth"])[..., 0])
    assert pixels(pictures["coord"]).min() == 0 and pixels(pictures["coord"]).max() >= 254
    ids = item["segmentation"].argmax(-1)
    assert np.array_equal(pixels(pictures["segmentation"]), label_colors(ids.max() + 1)[ids])
    assert "human_label: mountains by day" in lines and "class_label: 1" in lines
    assert any(line.startswith("segmentation: sky ") for line in lines)
    boxes, image = pixels(pictures["objects"]), to_uint8(item["image"])
    assert 0.01 < (boxes != image).any(-1).mean() < 0.5


def test_ids_texts_and_paths():
    ids = np.zeros((8, 8), np.uint8)
    ids[:, 4:] = 3
    item = {"image": np.zeros((8, 8, 3), np.float32), "segmentation": ids, "file_path_": "/a/b/c/d.png",
            "caption": "two trees", "tokens": torch.arange(40)}
    pictures, lines = describe_item(item)
    assert list(pictures) == ["image", "segmentation"]
    assert len(np.unique(pixels(pictures["segmentation"]).reshape(-1, 3), axis=0)) == 2
    assert lines == [
        "segmentation: 0 (50 %), 3 (50 %)", "file_path_: c/d.png", "caption: two trees",
        "tokens: 0 1 2 3 4 5 ... (int64 40)",
    ]


def test_boxes_follow_crop_and_flip():
    box = Annotation(area=0.25, image_id="1", bbox=(0.5, 0.0, 0.5, 0.5), category_no=0, category_id="x")
    item = {"image": np.zeros((32, 32, 3), np.float32), "annotations": [box], "flipped": True,
            "crop_bbox": (0.5, 0.0, 0.5, 1.0)}
    changed = (pixels(describe_item(item)[0]["annotations"]) != to_uint8(item["image"])).any(-1)
    assert changed[0].all() and changed[:16, 0].all() and changed[:16, 31].all() and not changed[16:].any()


def test_a_sheet_has_a_row_an_item_and_a_column_a_key():
    dataset = Landscapes(64, 3, keys=("image", "depth", "human_label"))
    sheet = preview_sheet(list(dataset), dataset, cell=128)
    assert sheet.height == 14 + 12 + 3 * 134
    found = pixels(sheet)[26:26 + 128, 6:6 + 128]
    assert np.array_equal(found[::2, ::2], to_uint8(dataset[0]["image"]))  # enlarged twice
    assert (pixels(sheet)[26:154, -300:].min(-1) < 100).any()  # the name
    with pytest.raises(ValueError, match="at least one item"):
        preview_sheet([])
