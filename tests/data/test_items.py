"""Items of any usual form become dicts of arrays; those that cannot are named in one line."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from taming.config import allow_targets
from taming.data.datamodule import DataModuleFromConfig
from taming.data.items import ItemSpec, make_batch, standard_item
from taming.images import from_uint8

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
FLOATS = from_uint8(PIXELS)


@pytest.mark.parametrize("item", [
    FLOATS, PIXELS, torch.tensor(FLOATS), torch.tensor(PIXELS), Image.fromarray(PIXELS), [PIXELS],
    FLOATS.transpose(2, 0, 1), torch.tensor(PIXELS).permute(2, 0, 1),
    {"image": PIXELS}, {"image": torch.tensor(FLOATS).permute(2, 0, 1)}, {"image": Image.fromarray(PIXELS)},
])
def test_images_become_hwc_floats(item):
    found = standard_item(item, "item 0")
    assert set(found) == {"image"}
    assert np.array_equal(np.asarray(found["image"]), FLOATS)


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3), np.array(3)])
@pytest.mark.parametrize("image", [PIXELS, Image.fromarray(PIXELS)])
def test_a_pair_is_an_image_and_its_class(image, label):
    found = standard_item((image, label), "item 0")
    assert np.array_equal(found["image"], FLOATS) and found["class_label"] == 3
    assert type(found["class_label"]) is int


def test_gray_images_have_one_channel_or_none():
    gray = PIXELS[..., :1]
    assert np.array_equal(standard_item({"image": gray.transpose(2, 0, 1)}, "x")["image"], FLOATS[..., :1])
    assert np.array_equal(standard_item(PIXELS[..., 0], "x")["image"], FLOATS[..., 0])
    assert standard_item(Image.fromarray(PIXELS[..., 0]), "x")["image"].shape == (6, 8, 3)


def test_what_is_no_image_stays_as_it_is():
    item = {
        "segmentation": PIXELS[..., 0], "onehot": np.eye(5, dtype=np.uint8)[PIXELS[..., 0] % 5],
        "caption": "a", "keypoints": np.ones((17, 3), np.float32), "none": None,
        "ids": Image.fromarray(PIXELS[..., 0]), "tokens": torch.arange(4),
    }
    found = standard_item(item, "x")
    assert found["segmentation"] is item["segmentation"] and found["onehot"] is item["onehot"]
    assert np.array_equal(found["ids"], PIXELS[..., 0]) and found["ids"].dtype == np.uint8
    assert {key: found[key] for key in ("caption", "none")} == {"caption": "a", "none": None}
    assert found["keypoints"] is item["keypoints"] and found["tokens"] is item["tokens"]


@pytest.mark.parametrize("item, what", [
    (None, "None"), ("a.png", "of the type str"), (7, "of the type int"),
    ((PIXELS, PIXELS), "of the type tuple with 2 parts"), ((PIXELS, "a"), "of the type tuple with 2 parts"),
    ((PIXELS, 1, "x"), "of the type tuple with 3 parts"), ((PIXELS, True), "of the type tuple with 2 parts"),
    (PIXELS[..., 0, 0], "of the type ndarray"), ((), "of the type tuple with 0 parts"),
])
def test_other_items_are_named(item, what):
    with pytest.raises(ValueError, match=f"^item 7 is {what}: give a dict such as") as caught:
        standard_item(item, "item 7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("items, message", [
    ([FLOATS, FLOATS[:, :7]], "'image' of element 1 of a batch has the shape 6x7x3, of element 0 .* 6x8x3"),
    ([{"image": FLOATS, "y": 1}, {"image": FLOATS}], "element 1 of a batch has no 'y', as others have"),
    ([{"image": FLOATS, "y": {1}}] * 2, "'y' of element 0 of a batch is a set, which cannot form a batch"),
    ([{"y": [1, 2]}, {"y": [1]}], r"sequences of \[1, 2\] elements"),
])
def test_items_that_do_not_fit_together_are_named(items, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_batch(items)
    assert "\n" not in str(caught.value)


def test_none_stays_a_list():
    batch = make_batch([{"image": FLOATS, "caption": None}, {"image": FLOATS, "caption": "a"}])
    assert batch["image"].shape == (2, 6, 8, 3) and batch["caption"] == [None, "a"]


class Own(Dataset):
    """Pairs of Pillow images, the fifth of another size."""

    class_names = ("a", "b", "c")

    def __init__(self, odd: bool = False, scale: float = 1.0):
        self.odd, self.scale = odd, scale

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if self.scale != 1:
            return {"image": FLOATS * self.scale}
        return Image.fromarray(PIXELS[:, :7] if self.odd and index == 4 else PIXELS), index % 3


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((PIXELS, number) for number in range(4))


def module(name: str, **params) -> DataModuleFromConfig:
    allow_targets(__name__)
    config = {"target": f"{__name__}.{name}", "params": params}
    data = DataModuleFromConfig(batch_size=2, num_workers=0, train=config, validation=config)
    data.setup()
    return data


def test_a_data_module_makes_batches_of_own_items():
    data = module("Own")
    batch = next(iter(data.val_dataloader()))
    assert batch["class_label"].tolist() == [0, 1] and torch.equal(batch["image"][1], torch.tensor(FLOATS))
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 6, 8, 3)
    assert data.item_spec("validation") == ItemSpec({"image": (6, 8, 3), "class_label": ()}, 3, None)
    odd = module("Own", odd=True)
    with pytest.raises(ValueError, match="'image' of item 5 of the data has the shape 6x8x3, of item 4"):
        list(odd.val_dataloader())


def test_a_data_module_makes_batches_of_a_stream():
    data = module("Stream")
    batches = list(data.train_dataloader())
    assert [batch["class_label"].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert data.item_spec().shapes == {"image": (6, 8, 3), "class_label": ()}


def test_the_first_item_tells_a_wrong_range():
    with pytest.raises(ValueError, match=r"'image' of item 0 of the train data has values up to .*\[-1, 1\]"):
        module("Own", scale=200.0).item_spec()
