"""What landscapes tell besides class, segmentation and depth: edges, people, objects, crops, resolutions."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from taming.data.landscapes import KEYS, POSE_KEYS, Landscapes
from taming.data.landscapes.objects import MAX_OBJECTS
from taming.data.pose import PoseTokens, limb_map
from taming.data.transforms.edges import canny, gray
from taming.data.transforms.scale import imscale
from taming.images import from_uint8, to_uint8

EVERYTHING = KEYS + POSE_KEYS


def equal(a, b) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray | torch.Tensor) else a == b


def test_every_condition_depends_on_the_index_alone():
    first, again = Landscapes(64, 40, keys=EVERYTHING), Landscapes(64, 99, keys=EVERYTHING, cache=True)
    later = [again[i] for i in (33, 5, 33)]
    for index, item in zip((33, 5, 33), later, strict=True):
        assert set(item) == set(EVERYTHING)
        assert all(equal(first[index][key], item[key]) for key in EVERYTHING)
    assert not torch.equal(later[0]["objects_bbox"], later[1]["objects_bbox"])


def test_what_a_caller_does_to_an_item_does_not_reach_the_cache():
    dataset = Landscapes(64, 4, keys=EVERYTHING, cache=True, figures=1.0)
    plain = Landscapes(64, 4, keys=EVERYTHING, figures=1.0)[2]
    item = dataset[2]
    for value in item.values():
        if isinstance(value, np.ndarray):
            value[:] = 0
        elif isinstance(value, torch.Tensor):
            value.zero_()
        elif isinstance(value, list):
            value.clear()
    assert all(equal(plain[key], dataset[2][key]) for key in EVERYTHING)


def test_edges_are_those_of_the_image():
    item = Landscapes(64, 4, keys=("image", "edges"))[1]
    assert item["edges"].shape == (64, 64, 1) and item["edges"].dtype == np.float32
    expected = np.where(canny(gray(item["image"]), sigma=1.0), 1.0, -1.0)
    assert np.array_equal(item["edges"][..., 0], expected)
    assert 0.02 < (expected > 0).mean() < 0.3


def test_the_smaller_image_and_the_upper_half():
    keys = ("image", "lr_image", "upper_half")
    item = Landscapes([64, 96], 1, keys=keys, lr_factor=8)[0]
    assert item["lr_image"].shape == (8, 12, 3) and item["upper_half"].shape == (32, 96, 3)
    assert np.array_equal(item["lr_image"], imscale(item["image"], 8))
    assert np.array_equal(item["upper_half"], item["image"][:32])


# ---- people


def test_a_person_stands_in_front_of_the_same_scene():
    keys = ("image", "segmentation", "depth")
    plain, posed = Landscapes(64, 32, keys=keys), Landscapes(64, 32, keys=keys, figures=1.0)
    assert posed.labels == (*plain.labels, "person") == (*Landscapes.labels, "person")
    for index in range(32):
        before, after = plain[index], posed[index]
        person = after["segmentation"][..., 10] == 1
        assert 0.03 < person.mean() < 0.25
        changed = np.abs(before["image"] - after["image"]).max(-1) > 0.02
        grown = np.pad(person, 2)  # and the antialiased pixels around
        steps = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
        near = np.any([np.roll(grown, step, (0, 1)) for step in steps], 0)
        assert changed[person].mean() > 0.6 and not (changed & ~near[2:-2, 2:-2]).any()
        assert after["depth"][person].max() < before["depth"][person].max() or person.sum() == 0


def test_some_scenes_show_a_person_and_their_share_is_kept():
    for figures, share in ((None, 0.8), (0.25, 0.25), (1.0, 1.0)):
        dataset = Landscapes(32, 96, keys=("keypoints",), figures=figures)
        there = np.array([dataset[i]["keypoints"].any() for i in range(96)])
        assert there.mean() == pytest.approx(share, abs=0.12)


def test_the_joints_lie_on_the_person():
    dataset = Landscapes(128, 24, keys=("segmentation", "keypoints"), figures=1.0)
    facing = 0
    for index in range(24):
        item = dataset[index]
        points, person = item["keypoints"], item["segmentation"][..., 10] == 1
        assert points.shape == (17, 3) and points.dtype == np.float32
        assert set(points[:, 2].tolist()) <= {0.0, 2.0} and (points[5:17, 2] == 2).mean() > 0.6
        for x, y, _ in points[points[:, 2] > 0]:
            row, column = min(127, int(y)), min(127, int(x))
            assert person[max(0, row - 2):row + 3, max(0, column - 2):column + 3].any()
        head, feet = points[[3, 4], 1].min(), points[[15, 16], 1].max()
        assert not points[15:, 2].all() or head < feet
        facing += points[0, 2] > 0 and points[5, 0] > points[6, 0]  # their left on our right
        assert points[0, 2] > 0 or points[5, 2] == 0 or points[6, 2] == 0 or points[5, 0] < points[6, 0]
    assert 8 < facing < 24


def test_a_pose_is_the_same_at_every_size():
    small, large = (Landscapes(size, 16, keys=("keypoints",))[7]["keypoints"] for size in (64, 256))
    seen = (small[:, 2] > 0) & (large[:, 2] > 0)
    assert seen.sum() > 10 and np.allclose(4 * small[seen, :2], large[seen, :2], atol=0.01)


def test_limb_maps_and_tokens_are_those_of_the_joints():
    item = Landscapes(64, 4, keys=POSE_KEYS, figures=1.0)[3]
    assert np.array_equal(item["pose"], from_uint8(limb_map(item["keypoints"], (64, 64))))
    assert torch.equal(item["pose_tokens"], PoseTokens(64).build(item["keypoints"], (64, 64)))
    coarse = Landscapes(64, 4, keys="pose_tokens", figures=1.0, pose_bins=16)[3]["pose_tokens"]
    assert torch.equal(coarse[coarse < 16], item["pose_tokens"][coarse < 16] // 4)
    few = Landscapes(64, 64, keys=POSE_KEYS, figures=0.1)
    nobody = next(item for item in few if not item["keypoints"].any())
    assert (nobody["pose"] == -1).all() and (nobody["pose_tokens"] == 64).all()


# ---- objects


def test_boxes_lie_around_what_is_seen():
    dataset = Landscapes(64, 64, keys=("objects", "segmentation"), figures=1.0)
    kinds = set()
    for item in dataset:
        segmentation = item["segmentation"]
        assert 1 <= len(item["objects"]) <= MAX_OBJECTS
        for annotation in item["objects"]:
            name = dataset.category_names[annotation.category_no]
            assert annotation.category_id == name
            kinds.add(name)
            x, y, width, height = annotation.bbox
            assert 0 <= x < x + width <= 1 and 0 <= y < y + height <= 1
            assert annotation.area == pytest.approx(width * height)
            label = {"sun": 1, "moon": 1, "water": 5, "sand": 8, "person": 10, "mountains": None}.get(name, 6)
            if label is not None:
                top, bottom, left, right = (round(64 * v) for v in (y, y + height, x, x + width))
                inside = segmentation[top:bottom, left:right]
                assert inside[..., label].any((0, 1)).all() and inside[..., label].mean() > 0.05
            if name in ("person", "water", "sand"):
                rows, columns = np.nonzero(segmentation[..., label])
                assert (rows.min() / 64, columns.min() / 64) == pytest.approx((y, x), abs=1e-6)
    assert kinds == set(dataset.category_names)


def test_layouts_are_tokens_of_the_objects():
    dataset = Landscapes(64, 32, keys=("objects", "objects_bbox", "objects_center_points"))
    for index in range(8):
        item = dataset[index]
        for key, length in (("objects_bbox", 3), ("objects_center_points", 2)):
            builder, tokens = dataset.conditional_builders[key], item[key]
            assert tokens.shape == (builder.embedding_dim,) == (MAX_OBJECTS * length,)
            assert tokens.dtype == torch.int64 and 0 <= tokens.min() and tokens.max() < dataset.no_tokens
            found, crop = builder.inverse_build(tokens)
            assert crop is None
            assert sorted(which for which, _ in found) == sorted(a.category_no for a in item["objects"])
    image = dataset.plot_conditionals("objects_bbox", item["objects_bbox"][None], (96, 64))
    assert image.shape == (1, 3, 64, 96) and image.min() < 0


def test_batches_keep_objects_as_lists():
    dataset = Landscapes(64, 4, keys=EVERYTHING)
    batch = next(iter(DataLoader(dataset, 4, collate_fn=dataset.collate_fn)))
    assert [len(objects) for objects in batch["objects"]] == [len(dataset[i]["objects"]) for i in range(4)]
    assert batch["objects_bbox"].shape == (4, 36) and batch["pose_tokens"].shape == (4, 34)
    assert batch["image"].shape == (4, 64, 64, 3) and batch["class_label"].tolist() == [0, 1, 2, 3]


# ---- crops


def test_a_crop_moves_everything_alike():
    keys = ("image", "segmentation", "edges", "coord", "keypoints", "pose", "objects")
    whole = Landscapes([64, 96], 8, keys=keys, figures=1.0)[5]
    torch.manual_seed(3)
    crop = Landscapes([64, 96], 8, keys=keys, figures=1.0, crop_size=48, random_crop=True)[5]
    place = round(float(crop["coord"][0, 0, 0]) * 64 * 96)
    top, left = divmod(place, 96)
    assert (top, left) not in ((0, 0), (8, 24))
    for key in ("image", "segmentation", "edges", "coord", "pose"):
        assert np.array_equal(crop[key], whole[key][top:top + 48, left:left + 48])
    shifted = whole["keypoints"][:, :2] - (left, top)
    assert np.allclose(crop["keypoints"][:, :2], shifted)
    inside = ((shifted >= 0) & (shifted <= 48)).all(1) & (whole["keypoints"][:, 2] > 0)
    assert np.array_equal(crop["keypoints"][:, 2] > 0, inside)
    for annotation in crop["objects"]:
        assert 0 <= annotation.bbox[0] and annotation.bbox[0] + annotation.bbox[2] <= 1 + 1e-9
    sand = [a.bbox for a in crop["objects"] if a.category_id == "sand"]
    rows, columns = np.nonzero(crop["segmentation"][..., 8])
    if sand:
        assert sand[0][1] * 48 <= rows.min() + 1e-6 and (sand[0][0] + sand[0][2]) * 48 >= columns.max()


def test_without_random_crops_the_middle_is_shown():
    middle = Landscapes([64, 96], 2, crop_size=[32, 64])[0]["image"]
    assert np.array_equal(middle, Landscapes([64, 96], 2)[0]["image"][16:48, 16:80])


def test_coordinates_of_a_whole_scene_count_its_pixels():
    coord = Landscapes([32, 64], 1, keys="coord")[0]["coord"]
    assert coord.shape == (32, 64, 1) and coord.dtype == np.float32
    assert np.allclose(coord.ravel(), np.arange(32 * 64) / (32 * 64))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"figures": 1.5}, "figures is 1.5; give a fraction"),
    ({"figures": 0, "keys": ("image", "pose")}, "figures is 0.*above 0 for pose"),
    ({"crop_size": 96}, "96x96.*only 64x64"),
    ({"crop_size": "x"}, "crop_size must be"),
    ({"lr_factor": 0}, "lr_factor is 0"),
    ({"lr_factor": 65}, "lr_factor is 65"),
    ({"pose_bins": 0}, "pose_bins is 0; give at least 1"),
])
def test_bad_arguments_are_named_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        Landscapes(**arguments)


def test_pixels_are_whole():  # PNG and cache hold 8 bits; edges and limb maps survive them
    item = Landscapes(64, 1, keys=("edges", "pose"))[0]
    for key in ("edges", "pose"):
        assert np.array_equal(from_uint8(to_uint8(item[key])), item[key])
