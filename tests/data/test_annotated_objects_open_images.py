"""An Open Images of a few boxes, written here."""

from pathlib import Path

import pytest
from PIL import Image

from taming.config import instantiate_from_config, load_config
from taming.data.annotated_objects_open_images import AnnotatedObjectsOpenImages
from taming.data.helper_types import MostFrequent
from taming.data.open_images_helper import COCO_COUNTERPARTS, open_images_unify_categories_for_coco

HEADER = ("ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
          "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside")
CLASSES = "/m/01g317,Person\n/m/04yx4,Man\n/m/01s55n,Suitcase\n/m/0bt9lr,Dog\n/m/zzz,Zebra\n"
ROWS = (
    "abc,xclick,/m/04yx4,1,0.1,0.5,0.2,0.6,1,0,0,0,1",
    "abc,xclick,/m/01s55n,1,0.0,0.5,0.0,0.5,0,0,1,1,-1",
    "def,activemil,/m/0bt9lr,0.5,0.0,1.0,0.0,1.0,0,1,0,0,0",
    "def,activemil,/m/0bt9lr,0.5,0.0,0.01,0.0,0.01,0,1,0,0,0",
)
LIST = "taming.data.open_images_helper.top_300_classes_plus_coco_compatibility"
MAPPING = "taming.data.open_images_helper.open_images_unify_categories_for_coco"


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        for name in ("abc", "def"):
            Image.new("RGB", (30, 20)).save(tmp_path / split / f"{name:0>16}.jpg")
    (tmp_path / "class-descriptions-boxable.csv").write_text(CLASSES)
    write(tmp_path, *ROWS)
    return tmp_path


def write(folder, *rows, names=("oidv6-train", "validation", "test"), header=HEADER):
    for name in names:
        (folder / f"{name}-annotations-bbox.csv").write_text("\n".join([header, *rows]) + "\n")


def dataset(folder, **changes):
    arguments = dict(
        data_path=folder, split="train", keys=[], target_image_size=16, min_object_area=0.001,
        min_objects_per_image=1, max_objects_per_image=5, crop_method="random-2d", random_flip=True,
        no_tokens=400, use_group_parameter=True, encode_crop=True, use_additional_parameters=True,
    )
    return AnnotatedObjectsOpenImages(**arguments | changes)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_items(folder, split):
    data = dataset(folder, split=split)
    item = data[0]
    assert item["image"].shape == (16, 16, 3) and item["objects_bbox"].shape == (17,)
    assert item["file_name"] == "0000000000000abc.jpg" and item["file_path"] == item["image_path"]
    man, suitcase = item["annotations"]
    assert man.bbox == pytest.approx((0.1, 0.2, 0.4, 0.4)) and man.area == pytest.approx(0.16)
    assert (man.is_occluded, man.is_inside, man.is_group_of, man.confidence) == (True, True, False, 1.0)
    assert (suitcase.is_group_of, suitcase.is_depiction, suitcase.is_inside) == (True, True, False)  # -1
    assert len(data.annotations["def"]) == 1  # the other is too small
    assert data.category_ids == ["/m/01g317", "/m/04yx4", "/m/0bt9lr", "/m/zzz", "/m/01s55n"]


def test_flags_reach_the_tokens(folder):
    def tokens(more):
        data = dataset(folder, use_additional_parameters=more)
        return sorted(data[0]["objects_bbox"][[0, 3]].tolist())

    assert tokens(True) == [1 + 5 * (2 + 8), 4 + 5 * (1 + 4)][::-1]
    assert tokens(False) == [1, 4 + 5]


def test_categories_are_unified(folder):
    data = dataset(folder, category_mapping_target=MAPPING)
    assert "/m/04yx4" not in data.categories and data[0]["annotations"][0].category_id == "/m/01g317"
    assert data[0]["annotations"][0].category_no == 0


def test_the_most_frequent_categories_are_counted_in_the_training_boxes(folder):
    write(folder, "abc,s,/m/zzz,1,0,1,0,1,0,0,0,0,0", names=["validation"])
    data = dataset(folder, split="validation")
    assert data.most_frequent_categories(MostFrequent(1)) == {"Dog"}  # two boxes; zebras have none
    assert data.most_frequent_categories(MostFrequent(2)) == {"Dog", "Suitcase"}  # equal ones by their id
    assert data.most_frequent_categories(MostFrequent(1, plus=("Zebra", "Unicorn"))) == {"Dog", "Zebra"}
    data = dataset(folder, category_allow_list_target=LIST, category_mapping_target=MAPPING)
    assert [data.categories[key].name for key in data.category_ids] == ["Person", "Dog", "Zebra", "Suitcase"]
    (folder / "oidv6-train-annotations-bbox.csv").unlink()
    with pytest.raises(FileNotFoundError, match="300 most frequent .* counted in the training annotations"):
        dataset(folder, split="validation", category_allow_list_target=LIST)


def test_the_published_lists():
    assert len(COCO_COUNTERPARTS) == len(set(COCO_COUNTERPARTS)) == 80
    mapping = open_images_unify_categories_for_coco
    assert len(mapping) == 12 and not set(mapping) & set(mapping.values())


def test_other_releases_are_read_too(folder):
    (folder / "class-descriptions-boxable.csv").rename(folder / "oidv7-class-descriptions-boxable.csv")
    text = (folder / "oidv7-class-descriptions-boxable.csv").read_text()
    (folder / "oidv7-class-descriptions-boxable.csv").write_text("LabelName,DisplayName\n" + text)
    (folder / "oidv6-train-annotations-bbox.csv").rename(folder / "train-annotations-bbox.csv")
    assert dataset(folder).no_classes == 5


def test_bad_boxes_are_counted_and_left_out(folder, caplog):
    write(folder, *ROWS, "abc,s,/m/0bt9lr,1,0.5,0.5,0,1,0,0,0,0,0", "abc,s,/m/0bt9lr,1,1.5,1.7,0,1,0,0,0,0,0",
          "abc,s,/m/unheard,1,0,1,0,1,0,0,0,0,0")
    assert len(dataset(folder).annotations["abc"]) == 2
    assert "1 empty boxes left out; the first: line 6" in caplog.text
    assert "1 boxes outside their image left out; the first: line 7" in caplog.text
    assert "1 boxes of unknown categories left out; the first: line 8 (/m/unheard)" in caplog.text


def test_blank_lines_are_left_out(folder):
    write(folder, ROWS[0], "", *ROWS[1:], "", "")
    assert [len(dataset(folder).annotations[name]) for name in ("abc", "def")] == [2, 1]


def test_an_index_that_is_no_text_is_named(folder):
    file = folder / "oidv6-train-annotations-bbox.csv"
    file.write_text(file.read_text(), encoding="utf-16")
    with pytest.raises(ValueError, match="train-annotations-bbox.csv is broken in line 1: download it again"):
        dataset(folder)
    (folder / "class-descriptions-boxable.csv").write_text(CLASSES, encoding="utf-16")
    with pytest.raises(ValueError, match="class-descriptions-boxable.csv are broken .*: download them"):
        dataset(folder)


def test_missing_images_are_left_out(folder, caplog):
    (folder / "train" / "0000000000000abc.jpg").unlink()
    assert dataset(folder).image_ids == ["def"]
    assert "1 of 2 annotated images do not exist" in caplog.text


@pytest.mark.parametrize("rows, header, message", [
    (ROWS, HEADER.replace("XMin,", ""), "has no column XMin: download it again"),
    ((), "", "has no column ImageID"),
    ((*ROWS, "abc,s,/m/0bt9lr,1,0.1"), HEADER, "is broken in line 6"),
    ((*ROWS, "abc,s,/m/0bt9lr,1,left,1,0,1,0,0,0,0,0"), HEADER, "is broken in line 6: could not convert"),
    ((), HEADER, "no image is left of 0 annotated ones"),
])
def test_a_broken_index_ends_it_at_once(folder, rows, header, message):
    write(folder, *rows, header=header)
    with pytest.raises(ValueError, match=message):
        dataset(folder)


def test_broken_class_descriptions_and_wrong_folders(folder):
    with pytest.raises(ValueError, match="split must be one of train, validation, test for Open Images"):
        dataset(folder, split="val")
    (folder / "class-descriptions-boxable.csv").write_text("/m/a\n")
    with pytest.raises(ValueError, match="must hold lines `id,name`"):
        dataset(folder)
    with pytest.raises(FileNotFoundError, match="needs .*class-descriptions-boxable.csv, .*set data_path"):
        dataset(folder / "nowhere")


def test_the_shipped_configuration_loads_an_item(folder):
    path = Path(__file__).parents[2] / "configs" / "open_images_scene_images_transformer.yaml"
    config = load_config(path)
    for split in ("train", "validation"):
        section = config.data.params[split]
        section.params.update(data_path=str(folder), min_objects_per_image=1)
        item = instantiate_from_config(section)[0]
        assert item["image"].shape == (256, 256, 3) and item["objects_bbox"].shape == (92,)
