"""Folders, list files and class folders become data sets, or an error that says what is missing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming.config import instantiate_from_config, load_config
from taming.data.custom import CustomClassTest, CustomClassTrain, CustomTest, CustomTrain
from taming.data.datamodule import DataModuleFromConfig


def images(folder, *names):
    for shade, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 10), (shade, 0, 0)).save(path)
    return folder


def test_a_folder_is_searched_and_sorted(tmp_path):
    images(tmp_path, "b.PNG", "a/z.jpeg", "a/deep/er/x.Jpg", ".hidden.png", ".cache/y.png", "c.webp")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    elsewhere = images(tmp_path.parent / "elsewhere", "linked.png")
    (tmp_path / "link").symlink_to(elsewhere, target_is_directory=True)
    names = [item["file_path_"].removeprefix(f"{tmp_path}/") for item in CustomTest(8, folder=tmp_path)]
    assert names == ["a/deep/er/x.Jpg", "a/z.jpeg", "b.PNG", "c.webp", "link/linked.png"]


def test_a_list_file_keeps_its_order_and_finds_relative_paths(tmp_path, monkeypatch):
    images(tmp_path / "data", "a.png", "b.png")
    images(tmp_path / "here", "c.png")
    listing = tmp_path / "data" / "train.txt"
    listing.write_text(f"b.png\n\n  {tmp_path}/data/a.png\r\nc.png\n", encoding="utf-8-sig")
    monkeypatch.chdir(tmp_path / "here")
    data = CustomTrain(8, listing)  # as in 2021
    assert [item["file_path_"].rsplit("/", 1)[-1] for item in data] == ["b.png", "a.png", "c.png"]
    assert [int(data[i]["image"].shape[0]) for i in range(3)] == [8, 8, 8]
    assert len(CustomTest(size=8, test_images_list_file=str(listing))) == 3


def test_missing_paths_are_counted_and_five_are_shown(tmp_path):
    images(tmp_path, "a.png")
    listing = tmp_path / "list.txt"
    listing.write_text("a.png\n" + "\n".join(f"gone{i}.png" for i in range(7)))
    with pytest.raises(ValueError, match=r"7 of 8 images named in .*list\.txt do not exist") as caught:
        CustomTrain(8, listing)
    assert "gone4.png" in str(caught.value) and "gone5.png" not in str(caught.value)


def test_nothing_found_is_an_error_that_says_where(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=rf"{tmp_path} and those below hold no images .*\.jpg.*\.png"):
        CustomTrain(8, folder=tmp_path)
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        CustomTrain(8, tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        CustomTrain(8, folder=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        CustomTrain(8, "nowhere.txt")
    with pytest.raises(ValueError, match="neither was given"):
        CustomTrain(8)
    with pytest.raises(ValueError, match="both a.txt and b were given"):
        CustomTest(8, "a.txt", folder="b")


def test_lists_that_are_not_utf_8_are_named(tmp_path):
    train = images(tmp_path / "train", "a/1.png")
    (tmp_path / "list.txt").write_bytes("größe.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"image list file .*list\.txt is no.* UTF-8"):
        CustomTrain(8, tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"class name file .*list\.txt is no.* UTF-8"):
        CustomClassTrain(8, train, classes_from=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match=r"class name file .*list\.txt names a class twice"):
        CustomClassTrain(8, train, classes_from=tmp_path / "list.txt")


def test_training_varies_and_testing_does_not(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    train, test = CustomTrain(16, folder=tmp_path), CustomTest(16, folder=tmp_path)
    assert len({train[0]["image"].tobytes() for _ in range(20)}) > 5
    assert len({test[0]["image"].tobytes() for _ in range(5)}) == 1


def test_class_folders_give_labels(tmp_path):
    train = images(tmp_path / "train", "cat/1.png", "cat/2.png", "ant/1.png", "bee/x/1.png", "stray.png")
    test = images(tmp_path / "test", "cat/9.png", "bee/9.png")
    data = CustomClassTrain(8, train)
    assert data.class_names == ["ant", "bee", "cat"]
    items = list(data)
    assert [item["class_label"] for item in items] == [0, 1, 2, 2]
    assert [item["human_label"] for item in items] == ["ant", "bee", "cat", "cat"]
    assert all(f"/{item['human_label']}/" in item["file_path_"] for item in items)
    # "ant" is missing among the test folders; the others keep the numbers of the training set.
    held_out = CustomClassTest(8, test, classes_from=train)
    assert [(item["class_label"], item["human_label"]) for item in held_out] == [(1, "bee"), (2, "cat")]
    (tmp_path / "names.txt").write_text("cat\nbee\nant\n")
    assert [item["class_label"] for item in CustomClassTest(8, test, tmp_path / "names.txt")] == [1, 0]


def test_class_folder_errors(tmp_path):
    train = images(tmp_path / "train", "a/1.png", "b/1.png")
    test = images(tmp_path / "test", "a/1.png", "wasp/1.png")
    with pytest.raises(ValueError, match="1 class folders of .*test are unknown .* 2 classes: wasp"):
        CustomClassTest(8, test, classes_from=train)
    with pytest.raises(ValueError, match="holds no class folders"):
        CustomClassTrain(8, train / "a")
    (train / "c").mkdir()
    with pytest.raises(ValueError, match=r"train/c and those below hold no images"):
        CustomClassTrain(8, train)


def test_yaml_names_the_parameters(tmp_path):
    images(tmp_path, "a/1.png")
    target = "taming.data.custom.CustomTrain"
    data = instantiate_from_config({"target": target, "params": {
        "folder": str(tmp_path), "size": [8, 12], "crop_size": 8, "flip": False, "coord": True,
    }})
    assert data[0]["coord"].shape == (8, 8, 1) and data[0]["image"].shape == (8, 8, 3)
    with pytest.raises(ValueError, match="does not accept 'fodler'.*did you mean folder"):
        instantiate_from_config({"target": target, "params": {"fodler": str(tmp_path), "size": 8}})


def test_one_folder_is_split_by_names(tmp_path):
    images(tmp_path, *(f"{kind}/{i}.png" for kind in ("ant", "bee") for i in range(30)))

    def names(data):
        return [data.data.labels["file_path_"][i] for i in range(len(data))]

    train, test = (make(8, folder=tmp_path, split=0.2) for make in (CustomTrain, CustomTest))
    assert sorted(names(train) + names(test)) == names(CustomTest(8, folder=tmp_path))
    assert 4 <= len(test) <= 20
    before = names(test)
    images(tmp_path, "ant/new1.png", "ant/new2.png")
    assert set(before) <= set(names(CustomTest(8, folder=tmp_path, split=0.2)))  # no image changes sides
    moved = tmp_path.rename(tmp_path.parent / "elsewhere_split")
    there = names(CustomTest(8, folder=moved, split=0.2))
    assert {name.replace("elsewhere_split", tmp_path.name) for name in there} >= set(before)
    classes = [make(8, moved, split=0.2) for make in (CustomClassTrain, CustomClassTest)]
    assert names(classes[1]) == there and classes[0].class_names == classes[1].class_names == ["ant", "bee"]
    assert {item["class_label"] for item in classes[1]} == {0, 1}
    (moved / "list.txt").write_text("ant/1.png\nant/2.png\nbee/3.png\n")
    sides = [make(8, moved / "list.txt", split=0.5) for make in (CustomTrain, CustomTest)]
    assert sorted(len(side) for side in sides) == [1, 2]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_both_sides_of_a_small_folder_have_an_image(tmp_path, count):
    images(tmp_path, *(f"{i}.png" for i in range(count)))
    for share in (0.01, 0.99):
        sides = [make(8, folder=tmp_path, split=share) for make in (CustomTrain, CustomTest)]
        assert sorted(map(len, sides)) == [1, count - 1]


def test_split_errors(tmp_path):
    images(tmp_path, "a.png")
    with pytest.raises(ValueError, match="split is 2; give the share of validation images, such as 0.1"):
        CustomTrain(8, folder=tmp_path, split=2)
    with pytest.raises(ValueError, match="of 1 images in .* none fell to (train|validation)"):
        [make(8, folder=tmp_path, split=0.1) for make in (CustomTrain, CustomTest)]
    with pytest.raises(ValueError, match="CustomClassTest needs classes_from, the training folder, or split"):
        CustomClassTest(8, tmp_path)


def test_two_folders_are_not_split_by_mistake(tmp_path):
    images(tmp_path, "a/1.png", "b/1.png")
    sections = {
        name: {"target": f"taming.data.custom.{kind}", "params": {"size": 8, "folder": folder, "split": 0.1}}
        for name, kind, folder in (("train", "CustomTrain", "a"), ("validation", "CustomTest", "b"))
    }
    with pytest.raises(ValueError, match="but these are a .train. and b .validation.: set data.params.train"):
        DataModuleFromConfig(batch_size=1, **sections)
    sections["validation"]["params"]["split"] = None
    sections["train"]["params"]["split"] = None
    assert DataModuleFromConfig(batch_size=1, **sections).dataset_configs == sections


@pytest.mark.parametrize("name", [
    "custom_vqgan", "custom_transformer", "custom_coord_transformer",
    "custom_small_vqgan", "custom_small_transformer",
])
def test_the_shipped_configurations_split_one_folder_or_take_two(tmp_path, name):
    images(tmp_path, *(f"{i}.png" for i in range(20)))
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml", [
        f"data.params.train.params.folder={tmp_path}", "data.params.num_workers=0",
    ])

    def files():
        data = instantiate_from_config(config.data)
        data.setup()
        return [set(data.datasets[side].data.labels["file_path_"]) for side in ("train", "validation")]

    train, validation = files()
    assert len(train | validation) == 20 and not train & validation and 0 < len(validation) < 8
    images(tmp_path.parent / f"test_{name}", "x.png")
    config.data.params.train.params.split = None
    config.data.params.validation.params.folder = str(tmp_path.parent / f"test_{name}")
    train, validation = files()
    assert len(train) == 20 and len(validation) == 1
