"""The built-in landscapes are deterministic, the same at every size, balanced, and their classes differ."""

import random

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from taming.data.landscapes import KEYS, Landscapes


def halve(image: np.ndarray) -> np.ndarray:
    height, width, channels = image.shape
    return image.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


def stack(dataset: Landscapes, count: int) -> np.ndarray:
    return np.stack([dataset[i]["image"] for i in range(count)])


def test_an_item_has_the_promised_shapes_types_and_ranges():
    item = Landscapes([48, 80], 16, keys=KEYS)[6]
    assert tuple(item) == KEYS
    assert item["image"].shape == (48, 80, 3) and item["image"].dtype == np.float32
    assert -1.0 <= item["image"].min() < -0.5 and 0.5 < item["image"].max() <= 1.0
    assert item["class_label"] == 6 and type(item["class_label"]) is int
    assert item["segmentation"].shape == (48, 80, len(Landscapes.labels))
    assert item["segmentation"].dtype == np.float32
    assert item["depth"].shape == (48, 80, 1) and item["depth"].dtype == np.float32
    assert item["human_label"] == "desert at sunset"


def test_the_sixteen_classes_are_biome_times_four_plus_time():
    assert Landscapes.biomes == ("mountains", "desert", "forest", "coast")
    assert Landscapes.times == ("dawn", "day", "sunset", "night")
    assert len(set(Landscapes.class_names)) == 16
    assert Landscapes.class_names[0] == "mountains at dawn"
    assert Landscapes.class_names[2 * 4 + 1] == "forest by day"
    assert Landscapes.class_names[3 * 4 + 3] == "coast at night"


def test_classes_are_balanced():
    dataset = Landscapes(64, 48, keys=("class_label",))
    labels = [dataset[i]["class_label"] for i in range(len(dataset))]
    assert np.bincount(labels, minlength=16).tolist() == [3] * 16


def test_a_scene_depends_on_seed_split_and_index_alone():
    first, again = Landscapes(64, 40, keys=KEYS), Landscapes(64, 99, keys=KEYS)
    later = [again[i] for i in (33, 5, 17)]  # other order, other length
    for index, item in zip((33, 5, 17), later, strict=True):
        for key in ("image", "segmentation", "depth"):
            assert np.array_equal(first[index][key], item[key])
    assert not np.array_equal(first[1]["image"], first[17]["image"])
    assert not np.array_equal(first[1]["image"], Landscapes(64, 40, seed=1)[1]["image"])


def test_the_keys_asked_for_do_not_change_the_image():
    alone, together = Landscapes(64, 16, keys=("image",)), Landscapes(64, 16, keys=KEYS)
    assert all(np.array_equal(alone[i]["image"], together[i]["image"]) for i in range(16))


def test_the_global_random_numbers_are_neither_used_nor_moved():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    np.random.seed(0)
    torch.manual_seed(0)
    random.seed(0)
    before = state()
    images = stack(Landscapes(32, 16), 16)
    assert state() == before
    np.random.seed(1)
    torch.manual_seed(1)
    random.seed(1)
    assert np.array_equal(images, stack(Landscapes(32, 16), 16))


def test_train_and_validation_share_no_scene():
    train, validation = stack(Landscapes(32, 64), 64), stack(Landscapes(32, 64, split="validation"), 64)
    apart = np.abs(train[:, None] - validation[None]).mean((2, 3, 4))
    assert apart.min() > 0.01


def test_a_scene_is_the_same_at_every_size():
    small, large = Landscapes(64, 32), Landscapes(128, 32)
    away = [np.abs(small[i]["image"] - halve(large[i]["image"])).mean() for i in range(32)]
    assert max(away) < 0.03
    others = np.abs(small[0]["image"] - halve(large[16]["image"])).mean()  # another scene of the same class
    assert others > 2 * max(away)


@pytest.mark.parametrize("index", range(16))
def test_a_panorama_holds_the_square_in_its_middle(index):
    square, wide = Landscapes(64, 16)[index]["image"], Landscapes([64, 256], 16)[index]["image"]
    assert wide.shape == (64, 256, 3)
    assert np.abs(wide[:, 96:160] - square).mean() < 0.002
    assert np.abs(wide[:, :64] - square).mean() > 0.01  # and does not just repeat it


@pytest.mark.parametrize("size", [(33, 57), (96, 32), (32, 32)])
def test_odd_and_upright_sizes_are_drawn(size):
    dataset = Landscapes(size, 16, keys=KEYS)
    for index in range(16):
        item = dataset[index]
        assert item["image"].shape == (*size, 3)
        assert np.isfinite(item["image"]).all()
        assert item["image"].std() > 0.1


def test_segmentation_is_one_hot_and_fits_the_biome():
    dataset = Landscapes(64, 64, keys=("segmentation",))
    share = np.zeros((16, len(Landscapes.labels)))
    for index in range(64):
        one_hot = dataset[index]["segmentation"]
        assert set(np.unique(one_hot)) == {0.0, 1.0}
        assert (one_hot.sum(-1) == 1.0).all()
        share[index % 16] += one_hot.mean((0, 1)) / 4
    share = dict(zip(Landscapes.labels, share.reshape(4, 4, -1).mean(1).T, strict=True))  # by biome
    mountains, desert, forest, coast = range(4)
    assert (share["sky"] > 0.15).all() and (share["sun or moon"] > 0.001).all()
    assert share["mountain"].argmax() == mountains and share["snow"].argmax() == mountains
    assert share["sand"].argmax() == desert and share["sand"][desert] > 0.2
    assert share["trees"].argmax() == forest and share["trees"][forest] > 0.2
    assert share["water"].argmax() == coast and share["water"][coast] > 0.15


def test_depth_is_near_below_and_far_in_the_sky():
    dataset = Landscapes(64, 32, keys=("depth", "segmentation"))
    for index in range(32):
        depth, one_hot = dataset[index]["depth"][..., 0], dataset[index]["segmentation"]
        assert depth.min() >= -1.0 and depth.max() == 1.0
        assert (
            depth[one_hot[..., Landscapes.labels.index("sky")] == 1.0].mean() > 0.95
        )  # its edge is antialiased
        assert depth[-4:].mean() < -0.7
        assert depth[:32].mean() > depth[32:48].mean() > depth[56:].mean()


def test_the_classes_can_be_told_apart_by_their_mean_images():
    train, unseen = Landscapes(32, 320), Landscapes(32, 160, split="validation")
    means = stack(train, 320).reshape(20, 16, -1).mean(0)
    found = ((stack(unseen, 160).reshape(160, 1, -1) - means) ** 2).sum(-1).argmin(1)
    label = np.arange(160) % 16
    assert (found == label).mean() > 0.93
    assert (found % 4 == label % 4).mean() > 0.97  # time of day


def test_cached_items_equal_drawn_ones_and_are_not_drawn_again(monkeypatch):
    plain, cached = Landscapes(32, 8, keys=KEYS), Landscapes(32, 8, keys=KEYS, cache=True)
    first = [cached[i] for i in range(8)]
    first[3]["image"][:] = 0.0  # what a caller does to an item must not reach the cache
    monkeypatch.setattr(cached, "_paint", lambda *_: pytest.fail("an item was drawn twice"))
    for index in range(8):
        for key in ("image", "segmentation", "depth"):
            assert np.array_equal(cached[index][key], plain[index][key])


def test_indices_count_from_the_end_and_stop_at_the_length():
    dataset = Landscapes(32, 20, keys=("class_label",))
    assert dataset[-1]["class_label"] == 19 % 16
    assert len(list(dataset)) == 20
    with pytest.raises(IndexError, match="20"):
        dataset[20]


def test_a_size_and_keys_from_a_config_are_understood():
    config = OmegaConf.create({"size": [32, 64], "keys": ["image", "depth"]})
    assert Landscapes(**config, length=1)[0]["image"].shape == (32, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 31}, "31.*at least 32"),
        ({"size": [64, 16]}, "16.*at least 32"),
        ({"size": [64, 64, 3]}, r"\[height, width\]"),
        ({"size": 64.5}, r"64.5.*\[height, width\]"),
        ({"length": 0}, "length is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"split": "test"}, "'test'.*train, validation"),
        ({"keys": ("image", "caption")}, "'caption'.*human_label"),
    ],
)
def test_bad_arguments_are_named_with_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        Landscapes(**arguments)
