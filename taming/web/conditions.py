"""The conditions of a model: which input of the page each of them needs, and the tensor that it becomes.

B batch, L labels, M tokens, H W pixels. A value is what the page passes on: a class number, an image, a
painting in the colors of the labels, a list of boxes, or the number of an item of the data set.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from taming.data.helper_types import Annotation, usable_box
from taming.data.sampler import seeded
from taming.images import from_uint8, to_pil
from taming.inference.dataset import unwrapped
from taming.models.cond_transformer import Net2NetTransformer
from taming.web.painting import Size, check_shape, fitted, labels_of, paint_labels

POINT = 0.06  # side, as a share, of the box that stands for an object with a known center only
CLASS, LABELS, IMAGE, BOXES, TOKENS = "class", "label_map", "image", "boxes", "tokens"
COORDINATES, NOTHING = "coordinates", "none"  # these two need no input

Box = tuple[int, float, float, float, float]  # category, left, top, right, bottom in shares of the sides


@dataclass(frozen=True)
class Condition:
    """One condition of a model.

    Attributes:
        key: entry of the batch, which is its name too.
        kind: one of the constants above.
        names: of the classes, labels or categories.
        trained: (H, W) in pixels beside an image of the training size; None if it has the size of the image.
        channels: of an image, 1 or 3.
        builder: an `ObjectsCenterPointsConditionalBuilder`, which turns boxes into tokens.
    """

    key: str
    kind: str
    stage: Any
    names: tuple[str, ...] = ()
    trained: Size | None = None
    channels: int = 3
    builder: Any = None

    @property
    def title(self) -> str:
        """The key with spaces."""
        return self.key.replace("_", " ")

    def size(self, size: Size, resolution: Size) -> Size:
        """Return (H, W) of the condition beside an image of `size`."""
        if self.trained is None:
            return size
        return size[0] * self.trained[0] // resolution[0], size[1] * self.trained[1] // resolution[1]


def conditions_of(
    model: Net2NetTransformer, dataset: Any | None = None, shapes: Mapping[str, Size] | None = None
) -> list[Condition]:
    """Return the conditions of a model, with names and builders of its data set, if there is one.

    `shapes` are the (H, W) that the conditions of the data set have beside an image of the training size.
    """
    own = None if dataset is None else unwrapped(dataset)
    stages = zip(model.cond_keys, model.cond_stages, model.cond_sizes, strict=True)
    return [_condition(key, stage, (shapes or {}).get(key, size), own) for key, stage, size in stages]


def _condition(key: str, stage: Any, trained: Size | None, dataset: Any) -> Condition:
    if stage.kind == CLASS:
        return Condition(key, CLASS, stage, _names(getattr(dataset, "class_names", ()), stage.vocab_size))
    if stage.kind == LABELS:
        return Condition(key, LABELS, stage, _names(getattr(dataset, "labels", ()), stage.n_labels), trained)
    if stage.kind == IMAGE and stage.channels in (1, 3):
        return Condition(key, IMAGE, stage, trained=trained, channels=stage.channels)
    if stage.kind in (COORDINATES, NOTHING):
        return Condition(key, stage.kind, stage)
    builder = getattr(dataset, "conditional_builders", {}).get(key)
    if builder is not None and builder.kind == BOXES:
        names = tuple(dataset.label_for_plot(i) for i in range(builder.no_object_classes))
        return Condition(key, BOXES, stage, names, builder=builder)
    return Condition(key, TOKENS, stage)


def _names(given: Any, count: int) -> tuple[str, ...]:
    """Return names, or numbers if the data set has no such list."""
    if isinstance(given, list | tuple) and len(given) == count and all(isinstance(n, str) for n in given):
        return tuple(given)
    return tuple(str(i) for i in range(count))


# ---- values -> tensors


def to_tensor(
    condition: Condition, value: Any, size: Size, *, resolution: Size, seed: int,
    item: Callable[[int], Tensor],
) -> Tensor:
    """Return a value as the condition's stage takes it, for a batch of one.

    Args:
        size: (H, W) of the image that is to be generated.
        resolution: the training size.
        seed: of the order of boxes.
        item: called with a number, gives the condition of that item of the data set.

    Raises:
        ValueError: what is missing or wrong, by the condition's name.
    """
    name, kind, stage = condition.title, condition.kind, condition.stage
    wanted = condition.size(size, resolution)
    if (default := stage.default(wanted)) is not None:
        return default
    if value is None:
        what = {LABELS: "paint it", CLASS: "choose one", TOKENS: "choose an item of the data set"}
        raise ValueError(f"{name} is missing: {what.get(kind, 'upload one, or take one of the data set')}")
    if kind == TOKENS:
        return item(int(value))
    if kind == BOXES:
        with seeded(seed):  # the builder shuffles
            value = condition.builder.build(annotations(condition, value))
    if kind in (LABELS, IMAGE):
        check_shape(name, value, wanted)
    if kind == LABELS:
        value = labels_of(value, len(condition.names), wanted)
    if kind == IMAGE:
        pixels = np.array(fitted(value, wanted).convert("L" if condition.channels == 1 else "RGB"))
        value = from_uint8(torch.from_numpy(pixels)).view(*wanted, -1).permute(2, 0, 1)
    return stage.from_user(value, wanted)


def annotations(condition: Condition, boxes: Sequence[Box]) -> list[Annotation]:
    """Return boxes as annotations of a data set, cut at the edges of the image.

    Raises:
        ValueError: a box without area, an unknown category, or more boxes than the model has room for.
    """
    room = condition.builder.no_max_objects
    if len(boxes) > room:
        raise ValueError(f"there are {len(boxes)} boxes, but the model has room for {room}: remove some")
    found = []
    for number, (category, *corners) in enumerate(boxes, 1):
        left, right = sorted(corners[0::2])
        top, bottom = sorted(corners[1::2])
        box, _ = usable_box((left, top, right - left, bottom - top))
        if box is None:
            raise ValueError(f"box {number} has no area within the image: remove it, or move its corners")
        if not 0 <= category < len(condition.names):
            raise ValueError(f"box {number} is of category {category}, but there are {len(condition.names)}")
        found.append(Annotation(
            area=box[2] * box[3], image_id="", bbox=box, category_no=category,
            category_id=condition.names[category],
        ))
    return found


def boxes_of_rows(condition: Condition, rows: Sequence[Sequence[Any]]) -> list[Box]:
    """Return the boxes of a table: category, then left, top, right, bottom in percent.

    Rows without a category are left out.

    Raises:
        ValueError: an unknown category, or a corner that is not a number.
    """
    boxes: list[Box] = []
    for number, (category, *corners) in enumerate(rows, 1):
        name = str(category or "").strip()
        if not name:
            continue
        if name not in condition.names:
            raise ValueError(f"row {number}: there is no {name!r}; take one of {', '.join(condition.names)}")
        try:
            left, top, right, bottom = (round(float(corner) / 100.0, 4) for corner in corners)
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number} ({name}): give left, top, right, bottom in percent") from error
        boxes.append((condition.names.index(name), left, top, right, bottom))
    return boxes


def rows_of_boxes(condition: Condition, boxes: Sequence[Box]) -> list[list[Any]]:
    """Return the table of some boxes; see `boxes_of_rows`."""
    names = condition.names
    return [[names[category], *(round(share * 100, 1) for share in box)] for category, *box in boxes]


def layout_image(condition: Condition, boxes: Sequence[Box], size: Size) -> Image.Image:
    """Return an image of boxes as the model is given them, rounded to its grid."""
    with seeded(0):
        tokens = condition.builder.build(annotations(condition, boxes))
    layout = condition.builder.plot(tokens, lambda i: condition.names[i], size[::-1], font_size=15)
    return ImageOps.expand(ImageOps.crop(to_pil(layout), 1), 1, "gray")  # the edge of the image


# ---- tensors, of an item of the data set -> values


def to_value(condition: Condition, tensor: Tensor, number: int) -> Any:
    """Return the value that stands on the page for the condition of an item, a batch of one."""
    if condition.kind == CLASS:
        return int(tensor.flatten()[0])
    if condition.kind == LABELS:
        return paint_labels(tensor[0].argmax(0).cpu().numpy(), len(condition.names))
    if condition.kind == IMAGE:
        return to_pil(tensor[0])
    if condition.kind == BOXES:
        return _boxes(condition.builder, tensor[0])
    return number


def _boxes(builder: Any, tokens: Tensor) -> list[Box]:
    boxes: list[Box] = []
    for which, where in builder.inverse_build(tokens)[0]:
        x, y, *sides = where
        width, height = sides or (POINT, POINT)
        if not sides:  # the center of the box must stay where it is
            x, y = x - POINT / 2, y - POINT / 2
        category = builder.representation_to_annotation(which).category_no
        left, top, right, bottom = (round(share, 3) for share in (x, y, x + width, y + height))
        boxes.append((category, left, top, right, bottom))
    return boxes


def described(condition: Condition, value: Any) -> str:
    """Describe a value in one line, for the settings of an image."""
    if value is None:
        return "left out"
    if condition.kind == CLASS:
        return f"{value} ({condition.names[value]})" if condition.names[value] != str(value) else str(value)
    if condition.kind == BOXES:
        return json.dumps([[condition.names[category], *corners] for category, *corners in value])
    if condition.kind == TOKENS:
        return f"of item {value}"
    digest = hashlib.sha256(value.tobytes()).hexdigest()[:16]
    return f"{value.height}x{value.width} pixels, sha256 of the pixels {digest}..."
