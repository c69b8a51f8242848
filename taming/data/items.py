"""Items of data sets of your own, brought into the form that models take, and batches of them.

The form is a dict: images (H, W, C) float32 in [-1, 1], class numbers as int, and whatever else.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taming.data.files.images import to_rgb
from taming.data.files.label_maps import ID_MODES
from taming.data.utils import custom_collate
from taming.images import from_uint8

CHANNELS = (1, 3)  # of images
EXPECTED = 'give a dict such as {"image": array (H, W, 3) in [-1, 1], "class_label": 3}'


class ItemSpec(NamedTuple):
    """What the items of a data set hold, by key, and its numbers of classes and labels, if it knows them."""

    shapes: dict[str, tuple[int, ...]]  # of arrays; () for other values, such as numbers and texts
    n_classes: int | None  # of "class_label"
    n_labels: int | None  # of "segmentation"


class NamedItems(list):
    """The items of one batch, with a name of each for messages."""

    def __init__(self, items: Iterable[Any], names: Iterable[str]) -> None:
        super().__init__(items)
        self.names = list(names)


def standard_item(item: Any, name: str) -> dict[str, Any]:
    """Bring one item into the form of a dict of arrays; `name` stands in messages.

    A bare image, an array or of Pillow, and a pair (image, class number) become "image" and "class_label".
    Pillow images become arrays, in RGB unless they are label maps under another key than "image". Arrays
    (C, H, W) with C = 1 or 3 become (H, W, C); uint8 arrays with 1 or 3 channels become floats in [-1, 1],
    and so does a bare array (H, W).

    Raises:
        ValueError: something else; the message says what to give.
    """
    if isinstance(item, Mapping):
        return {key: _standard_value(key, value) for key, value in item.items()}
    parts = tuple(item) if isinstance(item, list | tuple) else (item,)
    is_pair = len(parts) == 2 and _is_class_number(parts[1])
    if not (len(parts) == 1 or is_pair) or not _is_image(parts[0]):
        what = f"of the type {type(item).__name__}" + ("" if len(parts) == 1 else f" with {len(parts)} parts")
        raise ValueError(f"{name} is {'None' if item is None else what}: {EXPECTED}")
    image = _standard_value("image", parts[0])
    if image.ndim == 2 and image.dtype in (np.uint8, torch.uint8):
        image = from_uint8(image)
    return {"image": image} | ({"class_label": int(parts[1])} if is_pair else {})


def make_batch(items: Sequence[Any]) -> dict[str, Any]:
    """Make a batch of items, by key, once they are standard; see standard_item and custom_collate.

    Raises:
        ValueError: an item of another form, or items that do not fit together; the message names them.
    """
    names = getattr(items, "names", [f"element {i} of a batch" for i in range(len(items))])
    standard = [standard_item(item, name) for item, name in zip(items, names, strict=True)]
    batch = {}
    for key in dict.fromkeys(key for item in standard for key in item):
        if lacking := [name for item, name in zip(standard, names, strict=True) if key not in item]:
            raise ValueError(f"{lacking[0]} has no {key!r}, as others have: give the same keys for all items")
        values = [item[key] for item in standard]
        shapes = [_shape(value) for value in values]
        for shape, name in zip(shapes, names, strict=True):
            if shape != shapes[0]:
                raise ValueError(
                    f"{key!r} of {name} has the shape {_text(shape)}, of {names[0]} {_text(shapes[0])}: "
                    "resize or crop all to one size in the data set"
                )
        try:
            batch[key] = custom_collate(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{key!r} of {names[0]} is a {type(values[0]).__name__}, which cannot form a batch: give "
                f"arrays, numbers or texts ({str(error).splitlines()[0]})"
            ) from error
    return batch


def item_spec(dataset: Any, item: Mapping[str, Any], name: str) -> ItemSpec:
    """Describe a data set by one standard item.

    Raises:
        ValueError: "image" is not an image in [-1, 1].
    """
    largest = float(np.abs(np.asarray(item.get("image", 0.0))).max(initial=0.0))
    if largest > 2:
        raise ValueError(
            f"'image' of {name} has values up to {largest:g}, but images are in [-1, 1]: give uint8, or "
            "divide by 127.5 and subtract 1"
        )
    shapes = {key: _shape(value) or () for key, value in item.items()}
    classes, labels = getattr(dataset, "class_names", ()), getattr(dataset, "n_labels", None)
    return ItemSpec(shapes, len(classes) or None, labels)


def _standard_value(key: str, value: Any) -> Any:
    if isinstance(value, Image.Image):
        is_map = key != "image" and value.mode in ID_MODES
        value = np.array(value) if is_map else to_rgb(value)
    if not isinstance(value, np.ndarray | Tensor) or value.ndim != 3:
        return value
    if value.shape[0] in CHANNELS and value.shape[2] not in CHANNELS:
        value = value.permute(1, 2, 0) if isinstance(value, Tensor) else value.transpose(1, 2, 0)
    is_pixels = value.dtype in (np.uint8, torch.uint8) and value.shape[2] in CHANNELS
    return from_uint8(value) if is_pixels else value


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | Tensor) and value.ndim in (2, 3))


def _is_class_number(value: Any) -> bool:
    is_array = isinstance(value, np.ndarray | Tensor) and value.ndim == 0
    number = value.item() if is_array else value
    return isinstance(number, int | np.integer) and not isinstance(number, bool)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, np.ndarray | Tensor) else None


def _text(shape: tuple[int, ...] | None) -> str:
    return "of no array" if shape is None else "x".join(map(str, shape))
