"""A COCO of three images, written here: which images and objects are used, and what items hold."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from taming.config import instantiate_from_config, load_config
from taming.data.annotated_objects_coco import AnnotatedObjectsCoco
from taming.data.conditional_builder.utils import rescale_annotations
from taming.data.datamodule import DataModuleFromConfig

RED, BLUE = (255, 0, 0), (0, 0, 255)
THINGS = [
    {"id": 1, "name": "person", "supercategory": "person"}, {"id": 10, "name": "dog"},
    {"id": 2, "name": "car"},
]
STUFF = [{"id": 92, "name": "sky", "supercategory": "outdoor"}, {"id": 183, "name": "other"}]
# image 1 has a red square where its person is, and is blue elsewhere
INSTANCES = [
    {"id": 11, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "iscrowd": 0, "area": 1},
    {"id": 12, "image_id": 1, "category_id": 10, "bbox": [30, 0, 30, 20], "iscrowd": 1, "area": 1},
    {"id": 21, "image_id": 2, "category_id": 2, "bbox": [0, 0, 30, 60], "iscrowd": 0, "area": 1},
    {"id": 31, "image_id": 3, "category_id": 2, "bbox": [0, 0, 3, 3], "iscrowd": 0, "area": 1},
]
SURROUNDINGS = [
    {"id": 13, "image_id": 1, "category_id": 92, "bbox": [0, 0, 60, 10], "iscrowd": 0, "area": 1},
    {"id": 22, "image_id": 2, "category_id": 92, "bbox": [0, 0, 30, 10], "iscrowd": 0, "area": 1},
    {"id": 23, "image_id": 2, "category_id": 183, "bbox": [0, 0, 30, 10], "iscrowd": 0, "area": 1},
    {"id": 32, "image_id": 3, "category_id": 92, "bbox": [0, 0, 40, 40], "iscrowd": 0, "area": 1},
]
SIZES = {1: (60, 40), 2: (30, 60), 3: (40, 40)}  # width, height


@pytest.fixture
def coco(tmp_path):
    """The folder; and a function that writes its annotation files anew."""
    (tmp_path / "annotations").mkdir()
    for name in ("train2017", "val2017"):
        (tmp_path / name).mkdir()
        for number, size in SIZES.items():
            image = Image.new("RGB", size, BLUE)
            if number == 1:
                image.paste(RED, (10, 10, 30, 30))
            image.save(tmp_path / name / f"{number:012}.png")
    write(tmp_path)
    return tmp_path


def write(folder, things=INSTANCES, stuff=SURROUNDINGS):
    images = [{"id": n, "file_name": f"{n:012}.png", "width": w, "height": h} for n, (w, h) in SIZES.items()]
    for kind, annotations, categories in (("instances", things, THINGS), ("stuff", stuff, STUFF)):
        content = {"images": images, "annotations": annotations, "categories": categories}
        for name in ("train2017", "val2017"):
            (folder / "annotations" / f"{kind}_{name}.json").write_text(json.dumps(content))


def dataset(folder, **changes):
    arguments = dict(
        data_path=str(folder), split="train", keys=[], target_image_size=20, min_object_area=0.001,
        min_objects_per_image=1, max_objects_per_image=5, crop_method="center", random_flip=False,
        no_tokens=2_500, use_group_parameter=True, encode_crop=False,
    )
    return AnnotatedObjectsCoco(**arguments | changes)


def test_an_item_holds_everything_if_no_key_is_named(coco):
    data = dataset(coco)
    item = data[0]
    assert item["image"].shape == (20, 20, 3) and item["image"].dtype == np.float32
    assert item["image"].min() == -1 and item["image"].max() == 1
    assert item["crop_bbox"] == pytest.approx((1 / 6, 0, 2 / 3, 1)) and item["flipped"] is False
    assert item["file_name"] == "000000000001.png" and item["original_size"] == (60, 40) and item["id"] == 1
    assert item["image_path"] == item["file_path_"] == f"{coco}/train2017/000000000001.png"
    assert [a.category_no for a in item["annotations"]] == [0, 1, 3]  # ids sorted as text: 1, 10, 2, 92
    assert item["annotations"][0].bbox == pytest.approx((1 / 6, 1 / 4, 1 / 3, 1 / 2))
    assert [a.is_group_of for a in item["annotations"]] == [False, True, False]
    assert len(item["objects_bbox"]) == 15 and len(item["objects_center_points"]) == 10
    assert data.no_classes == 4 and data.category_ids == ["1", "10", "2", "92"]
    assert data.get_textual_label_for_category_no(1) == data.get_textual_label_for_category_id("10") == "dog"


def test_keys_choose_what_items_hold(coco):
    data = dataset(coco, keys=["image", "objects_bbox"], split="validation")
    assert list(data[1]) == ["image", "objects_bbox"]
    Image.new("RGB", (1, 1)).save(coco / "val2017" / "000000000001.png")  # not read without "image"
    item = dataset(coco, keys=["objects_bbox", "crop_bbox"], split="validation")[0]
    assert item["crop_bbox"] == (0, 0, 1, 1) and len(item["objects_bbox"]) == 15


@pytest.mark.parametrize("encode_crop", [False, True])
@pytest.mark.parametrize("method", ["none", "center", "random-1d", "random-2d"])
def test_boxes_follow_the_image(coco, method, encode_crop):
    """Wherever the person's box lies in the item, the image is red inside of it and blue outside."""
    data = dataset(coco, crop_method=method, random_flip=True, encode_crop=encode_crop, target_image_size=40)
    builder = data.conditional_builders["objects_bbox"]
    for seed in range(8):
        torch.manual_seed(seed)
        random.seed(seed)
        item = data[0]
        objects, crop = builder.inverse_build(item["objects_bbox"])
        (x, y, w, h), = (where for which, where in objects if which == data.get_category_number("1"))
        if encode_crop:
            x, y, w, h = (x - crop[0]) / crop[2], (y - crop[1]) / crop[3], w / crop[2], h / crop[3]
        rows, columns = (np.arange(40)[:, None] + 0.5) / 40, (np.arange(40)[None] + 0.5) / 40
        margin = 0.08  # a grid of 50 x 50, and the blur of resizing
        red = item["image"][..., 0] > 0
        inside = (abs(columns - x - w / 2) < w / 2 - margin) & (abs(rows - y - h / 2) < h / 2 - margin)
        outside = (abs(columns - x - w / 2) > w / 2 + margin) | (abs(rows - y - h / 2) > h / 2 + margin)
        assert inside.any() and red[inside].all() and not red[outside].any()


@pytest.mark.parametrize("method", ["none", "center", "random-1d", "random-2d"])
def test_boxes_follow_rectangular_images(coco, method):
    compared = 0
    for size in ([24, 40], [40, 24]):
        data = dataset(coco, crop_method=method, target_image_size=size)
        for seed in range(6):
            torch.manual_seed(seed)
            item = data[0]
            assert item["image"].shape == (*size, 3)
            x, y, w, h = rescale_annotations(item["annotations"][:1], item["crop_bbox"], False)[0].bbox
            red = item["image"][..., 0] > 0
            if min(w * size[1], h * size[0]) < 2:  # pixels: the crop shows nothing of the person
                assert red.mean() < 0.1
                continue
            compared += 1
            rows, columns = np.nonzero(red)
            found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            expected = x * size[1], y * size[0], (x + w) * size[1], (y + h) * size[0]
            assert np.abs(np.subtract(found, expected)).max() <= 1.5  # pixels
    assert compared > 3


def test_random_crops_and_flips_follow_the_seed(coco):
    data = dataset(coco, crop_method="random-2d", random_flip=True)

    def draw(seed):
        torch.manual_seed(seed)
        random.seed(seed)
        return [data[0] for _ in range(4)]

    def described(items):
        return [
            (i["crop_bbox"], i["flipped"], i["objects_bbox"].tolist(), i["image"].tobytes()) for i in items
        ]

    assert described(draw(5)) == described(draw(5)) != described(draw(6))
    assert len({i["flipped"] for i in draw(5) + draw(6)}) == 2


@pytest.mark.parametrize("changes, names", [
    (dict(use_stuff=False), ["1", "2", "3"]),
    (dict(use_stuff=False, min_objects_per_image=2), ["1"]),
    (dict(max_objects_per_image=2), ["2", "3"]),
    (dict(use_stuff=False, min_object_area=0.01), ["1", "2"]),
    (dict(use_things=False), ["1", "2", "3"]),
])
def test_images_are_chosen_by_their_objects(coco, changes, names):
    assert dataset(coco, **changes).image_ids == names


def test_only_what_is_used_is_read(coco):
    (coco / "annotations" / "stuff_train2017.json").unlink()
    assert dataset(coco, use_stuff=False).no_classes == 3
    with pytest.raises(FileNotFoundError, match=r"needs .*stuff_train2017\.json .*set data_path to"):
        dataset(coco)


def test_categories_are_allowed_and_mapped(coco, caplog):
    (coco / "allowed.txt").write_text("person\ndog\ncar\nunicorn\n")
    (coco / "mapped.txt").write_text("10,1\n")  # dogs are people
    data = dataset(coco, category_allow_list_target=str(coco / "allowed.txt"),
                   category_mapping_target=str(coco / "mapped.txt"))
    assert data.category_ids == ["1", "2"] and [a.category_no for a in data[0]["annotations"]] == [0, 0]
    assert "1 of 4 allowed categories do not exist" in caplog.text and "unicorn" in caplog.text
    (coco / "allowed.txt").write_text("unicorn")
    with pytest.raises(ValueError, match="none of the categories .* is left"):
        dataset(coco, category_allow_list_target=str(coco / "allowed.txt"))


def test_a_batch_keeps_annotations_as_lists(coco):
    data = dataset(coco)
    batch = next(iter(DataLoader(data, batch_size=3, collate_fn=data.collate_fn)))
    assert batch["image"].shape == (3, 20, 20, 3) and batch["objects_bbox"].shape == (3, 15)
    assert [len(annotations) for annotations in batch["annotations"]] == [3, 2, 2]
    assert batch["license"] == [None] * 3 and batch["file_name"][2] == "000000000003.png"
    plain = next(iter(DataLoader(dataset(coco, keys=["image", "objects_bbox", "crop_bbox"]), batch_size=3)))
    assert plain["objects_bbox"].dtype == torch.int64 and len(plain["crop_bbox"]) == 4


def test_layouts_are_drawn_with_names(coco):
    data = dataset(coco)
    tokens = torch.stack([data[i]["objects_bbox"] for i in range(3)])
    images = data.plot_conditionals("objects_bbox", tokens, (64, 48))
    assert images.shape == (3, 3, 48, 64) and (images.amin(dim=(1, 2, 3)) < -0.5).all()
    assert data.label_for_plot(3) == "sky" and data.label_for_plot(4) == "4"  # a sampled layout may have any


def test_empty_foreign_and_unknown_boxes_are_counted_and_left_out(coco, caplog):
    bad = [[5, 5, 0, 3], [5, 5, 3, -1], [math.nan, 1, 1, 1], [70, 5, 5, 5], [-9, 0, 4, 4]]
    things = INSTANCES + [
        {"id": 100 + i, "image_id": 2, "category_id": 2, "bbox": box} for i, box in enumerate(bad)
    ] + [{"id": 200 + i, "image_id": 2, "category_id": 7, "bbox": [0, 0, 9, 9]} for i in range(7)]
    write(coco, things)
    data = dataset(coco, use_stuff=False)
    assert [a.id for a in data.annotations["2"]] == [21]
    assert "3 empty boxes left out; the first: annotation 100 [5, 5, 0, 3]" in caplog.text
    assert "2 boxes outside their image left out; the first: annotation 103" in caplog.text
    assert "7 objects of unknown categories left out; the first: annotation 200 (7)" in caplog.text
    assert "annotation 204 (7)" in caplog.text and "annotation 205 (7)" not in caplog.text


def test_an_empty_box_counts_as_one_of_no_size(coco, caplog):
    empty = [{"id": 100, "bbox": []}, {"id": 101, "bbox": None}, {"id": 102}]
    write(coco, INSTANCES + [{"image_id": 2, "category_id": 2} | entry for entry in empty])
    assert [a.id for a in dataset(coco, use_stuff=False).annotations["2"]] == [21]
    assert "3 empty boxes left out; the first: annotation 100 [], annotation 101 None" in caplog.text


def test_boxes_are_cut_to_their_image(coco):
    write(coco, [{"id": 1, "image_id": 3, "category_id": 2, "bbox": [-10, 20, 20, 40]}])
    found = dataset(coco, use_stuff=False).annotations["3"][0]
    assert found.bbox == pytest.approx((0, 0.5, 0.25, 0.5)) and found.area == pytest.approx(0.125)


def test_missing_images_are_counted_and_five_are_shown(coco, caplog):
    (coco / "train2017" / "000000000002.png").unlink()
    assert dataset(coco).image_ids == ["1", "3"]
    assert "1 of 3 annotated images do not exist" in caplog.text and "000000000002.png" in caplog.text
    for name in (1, 3):
        (coco / "train2017" / f"{name:012}.png").unlink()
    with pytest.raises(ValueError, match=r"no image is left in .*3 of 3 annotated images do not exist"):
        dataset(coco)


def test_unreadable_images_and_those_of_another_shape_are_skipped(coco, caplog):
    (coco / "train2017" / "000000000001.png").write_bytes(b"")
    data = dataset(coco, max_bad_fraction=0.9)
    assert data[0]["file_name"] == "000000000002.png"
    Image.new("RGB", (60, 30)).save(coco / "train2017" / "000000000002.png")  # it was upright
    data = dataset(coco, max_bad_fraction=0.9)
    assert data[0]["file_name"] == data[1]["file_name"] == "000000000003.png"
    assert "is 60x30 pixels (width x height), but its annotations are for 30x60" in caplog.text
    Image.new("RGB", (15, 30)).save(coco / "train2017" / "000000000002.png")  # a smaller copy is fine
    assert dataset(coco, max_bad_fraction=0.9)[1]["file_name"] == "000000000002.png"


def test_no_image_left_says_why(coco):
    with pytest.raises(ValueError, match=r"no image is left of 3 .*have 2 to 3 objects .*are 9 to 9 "):
        dataset(coco, min_objects_per_image=9, max_objects_per_image=9)


@pytest.mark.parametrize("content, message", [
    ("", "stuff_train2017.json is broken .*download it again"),
    ('{"images": [', "stuff_train2017.json is broken .*download it again"),
    ("[]", "has no list 'images'"),
    ('{"images": [], "categories": []}', "has no list 'annotations'"),
])
def test_what_is_no_annotation_file_ends_it_at_once(coco, content, message):
    (coco / "annotations" / "stuff_train2017.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        dataset(coco)


@pytest.mark.parametrize("part, entry, message", [
    ("images", {"id": 1}, "no 'width'"),
    ("images", {"id": 1, "file_name": "x", "width": 0, "height": 2}, "an image of 0x2 pixels"),
    ("categories", {"id": 3}, "no 'name'"),
    ("annotations", {"image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]}, "image_id 9 is not among"),
    ("annotations", {"id": 5, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1]},
     "not enough values .*: download it again, or correct or remove the entry with the id 5"),
    ("annotations", {"image_id": 1, "category_id": 1, "bbox": 0}, "'int' object is not iterable"),
    ("annotations", {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, "a"]}, "could not convert"),
    ("annotations", {"image_id": 1, "bbox": []}, "no 'category_id'"),
    ("annotations", 7, "not subscriptable"),
])
def test_a_broken_entry_ends_it_at_once(coco, part, entry, message):
    path = coco / "annotations" / "stuff_train2017.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {part: [*content[part], entry]}))
    with pytest.raises(ValueError, match=rf"stuff_train2017.json is broken in '{part}' \(.*{message}"):
        dataset(coco)


@pytest.mark.parametrize("changes, message", [
    (dict(split="test"), "split must be one of train, validation for COCO, got 'test'"),
    (dict(keys=["image", "flip"]), "unknown keys flip: items can hold image, .*flipped"),
    (dict(crop_method="random"), "crop_method must be one of none, center, .*, got 'random'"),
    (dict(target_image_size="256"), 
     "target_image_size must be a positive number of pixels or .height, width., got '256'"),
    (dict(no_tokens=8), "no_tokens=8 is too small for 4 categories .*at least 9"),
    (dict(no_object_classes=3), "no_object_classes=3 is less than the 4 categories"),
    (dict(use_things=False, use_stuff=False), "set use_things or use_stuff"),
    (dict(category_allow_list_target="taming.data.open_images_helper.top_300_classes_plus_coco_compatibility"),
     "AnnotatedObjectsCoco counts no boxes: give category_allow_list_target a file"),
])
def test_impossible_arguments_are_refused(coco, changes, message):
    with pytest.raises(ValueError, match=message):
        dataset(coco, **changes)


def test_from_a_configuration(coco):
    target = "taming.data.annotated_objects_coco.AnnotatedObjectsCoco"
    data = dataset(coco)
    names = ("split", "keys", "target_image_size", "min_object_area", "min_objects_per_image", "random_flip",
             "max_objects_per_image", "crop_method", "no_tokens", "use_group_parameter", "encode_crop")
    params = {name: getattr(data, name) for name in names} | {"data_path": str(coco)}
    assert len(instantiate_from_config({"target": target, "params": params})) == 3
    with pytest.raises(ValueError, match="does not accept 'crop_metod' .did you mean crop_method"):
        instantiate_from_config({"target": target, "params": params | {"crop_metod": "none"}})


def test_the_shipped_configuration_loads_a_batch(coco):
    path = Path(__file__).parents[2] / "configs" / "coco_scene_images_transformer.yaml"
    config = load_config(path, [
        "data.params.batch_size=2", "data.params.num_workers=0",
        f"data.params.train.params.data_path={coco}", f"data.params.validation.params.data_path={coco}",
    ])
    data = instantiate_from_config(config.data)
    data.setup()
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert batch["image"].shape == (2, 256, 256, 3) and batch["objects_bbox"].shape == (2, 92)
    transformer = config.model.params.transformer_config.params
    assert transformer.block_size == 92 + 256
    assert batch["objects_bbox"].max() == transformer.vocab_size - 1  # the filler


@pytest.mark.parametrize("wrap", [False, True])
def test_annotations_pass_the_data_module_as_lists(coco, wrap):
    params = dict(
        data_path=str(coco), split="train", keys=["image", "annotations"], target_image_size=20,
        min_object_area=0.001, min_objects_per_image=1, max_objects_per_image=5, crop_method="center",
        random_flip=False, no_tokens=2_500, use_group_parameter=True, encode_crop=False,
    )
    split = {"target": "taming.data.annotated_objects_coco.AnnotatedObjectsCoco", "params": params}
    module = DataModuleFromConfig(batch_size=2, num_workers=0, train=split, validation=split, wrap=wrap)
    module.setup()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        batch = next(iter(loader))
        assert batch["image"].shape == (2, 20, 20, 3)
        assert [type(annotations) for annotations in batch["annotations"]] == [list, list]
