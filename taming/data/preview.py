"""Preview of a data set: its items as one sheet, each value shown as an image or written as text.

H W pixels of an item's image, L labels.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from taming.colormap import label_colors
from taming.data.conditional_builder.utils import COLOR_PALETTE, absolute_bbox, rescale_annotations
from taming.data.helper_types import FULL_CROP, Annotation
from taming.data.pose import JOINTS, limb_map
from taming.images import to_uint8

Pictures = dict[str, Image.Image]

_GAP, _LINE = 6, 14  # pixels between cells, and of a line of text
_TEXT_WIDTH = 300  # pixels
_NAMES = 5  # labels that are named, those with the largest areas first


def describe_item(item: Mapping[str, Any], dataset: Any = None) -> tuple[Pictures, list[str]]:
    """Return one item as images, by key, and lines of text for its other values.

    Args:
        item: arrays (H, W, C): colours and depths in [-1, 1], coordinates in [0, 1), one-hot labels; ids of
            labels (H, W); "keypoints"; lists of Annotation; tokens of a layout; strings and numbers.
        dataset: the data set of the item. If it has them, its `conditional_builders` and `plot_conditionals`
            draw tokens, and `labels` and `label_for_plot` name labels and categories.
    """
    pictures: Pictures = {}
    lines: list[str] = []
    item = {key: value.numpy() if isinstance(value, Tensor) else value for key, value in item.items()}
    arrays = [value for value in item.values() if isinstance(value, np.ndarray) and value.ndim == 3]
    shape = arrays[0].shape[:2] if arrays else (256, 256)
    background = _background(item, shape)
    for key, value in item.items():
        if key in (getattr(dataset, "conditional_builders", None) or {}):
            tokens = torch.as_tensor(value)[None]
            drawn = dataset.plot_conditionals(key, tokens, (shape[1], shape[0]))[0]
            pictures[key] = Image.fromarray(to_uint8(drawn.permute(1, 2, 0).numpy()))
        elif isinstance(value, np.ndarray) and value.shape[-2:] == (len(JOINTS), 3):
            drawn = limb_map(value, shape)
            lit = drawn.max(-1, keepdims=True) / 255.0
            pictures[key] = Image.fromarray((drawn + (1 - lit) * 0.6 * background).astype(np.uint8))
        elif isinstance(value, list) and value and isinstance(value[0], Annotation):
            pictures[key] = _draw_boxes(background, value, item, dataset)
        elif isinstance(value, np.ndarray) and value.ndim in (2, 3):
            pictures[key] = _draw_array(key, value)
            lines += _names_of_labels(key, value, dataset)
        else:
            lines.append(f"{key}: {_brief(key, value)}")
    return pictures, lines


def preview_sheet(
    items: Sequence[Mapping[str, Any]], dataset: Any = None, *, cell: int = 192
) -> Image.Image:
    """Return a sheet with one item per row: images in a column for each key, and the text beside them.

    Args:
        items: see describe_item.
        dataset: see describe_item.
        cell: height of a row, in pixels.

    Raises:
        ValueError: no items.
    """
    if not items:
        raise ValueError("a sheet needs at least one item")
    rows = [describe_item(item, dataset) for item in items]
    keys = list(dict.fromkeys(key for pictures, _ in rows for key in pictures))
    sized = [{key: _fit(picture, cell) for key, picture in pictures.items()} for pictures, _ in rows]
    widths = [max(row[key].width for row in sized if key in row) for key in keys]
    lefts = np.cumsum([_GAP, *(max(width, 60) + _GAP for width in widths)]).tolist()
    height = _LINE + 2 * _GAP + len(rows) * (cell + _GAP)
    sheet = Image.new("RGB", (lefts[-1] + _TEXT_WIDTH + _GAP, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for key, left in zip(keys, lefts, strict=False):
        draw.text((left, _GAP), key, fill="black", font=font)
    for number, (row, (_, lines)) in enumerate(zip(sized, rows, strict=True)):
        top = _LINE + 2 * _GAP + number * (cell + _GAP)
        for key, left in zip(keys, lefts, strict=False):
            if key in row:
                sheet.paste(row[key], (left, top))
        for place, line in enumerate(lines[: cell // _LINE]):
            shown = line if len(line) <= 52 else f"{line[:51]}\N{HORIZONTAL ELLIPSIS}"
            draw.text((lefts[-1], top + place * _LINE), shown, fill="black", font=font)
    return sheet


def _background(item: Mapping[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """Return the image of an item, uint8 (H, W, 3), to draw on; gray if there is none."""
    image = item.get("image")
    if image is None or np.shape(image)[2:] != (3,):
        return np.full((*shape, 3), 90, np.uint8)
    return to_uint8(np.asarray(image))


def _draw_array(key: str, values: np.ndarray) -> Image.Image:
    """Draw colours, gray values, ids or one-hot labels."""
    if _is_labels(values):
        ids = values if values.ndim == 2 else values.argmax(-1)
        return Image.fromarray(label_colors(int(ids.max(initial=0)) + 1)[ids])
    if values.ndim == 3 and values.shape[-1] == 3:
        return Image.fromarray(to_uint8(values))
    plane = values if values.ndim == 2 else values[..., 0]
    plane = plane * 2 - 1 if key == "coord" else plane
    return Image.fromarray(to_uint8(plane)).convert("RGB")


def _is_labels(values: np.ndarray) -> bool:
    """Return whether an array holds ids (H, W) or one-hot vectors (H, W, L)."""
    if values.ndim == 2:
        return np.issubdtype(values.dtype, np.integer)
    return values.shape[-1] == 2 or values.shape[-1] > 3


def _names_of_labels(key: str, values: np.ndarray, dataset: Any) -> list[str]:
    """Return a line that names the labels of a map, largest areas first; none if it is not a label map."""
    if not _is_labels(values):
        return []
    ids = values if values.ndim == 2 else values.argmax(-1)
    share = np.bincount(ids.ravel()) / ids.size
    names = getattr(dataset, "labels", None)
    names = names if isinstance(names, tuple | list) and len(names) >= len(share) else range(len(share))
    largest = [number for number in np.argsort(-share, kind="stable")[:_NAMES] if share[number] > 0]
    return [f"{key}: " + ", ".join(f"{names[number]} ({100 * share[number]:.0f} %)" for number in largest)]


def _draw_boxes(
    background: np.ndarray, annotations: Sequence[Annotation], item: Mapping[str, Any], dataset: Any
) -> Image.Image:
    """Draw boxes with names onto an image, which shows the part "crop_bbox", mirrored if "flipped"."""
    left, top, width, height = map(float, item.get("crop_bbox", FULL_CROP))
    flipped = bool(item.get("flipped", False))
    shown = rescale_annotations(annotations, (left, top, width, height), flipped)
    picture = Image.fromarray(background).copy()
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(9)
    name = getattr(dataset, "label_for_plot", str)
    for annotation, colour in zip(shown, cycle(COLOR_PALETTE), strict=False):
        x0, y0, x1, y1 = absolute_bbox(annotation.bbox, *picture.size)
        if x1 > x0 and y1 > y0:
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour)
            draw.text((x0 + 2, y0), name(annotation.category_no), fill=colour, font=font)
    return picture


def _fit(picture: Image.Image, height: int) -> Image.Image:
    """Scale an image to a height; a small one by a whole factor, so that its pixels can be counted."""
    if picture.height < height:
        factor = height // picture.height
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture.resize((max(1, round(picture.width * height / picture.height)), height))


def _brief(key: str, value: Any) -> str:
    """Describe a value in a few words: the end of a path, the first numbers of an array."""
    if isinstance(value, str):
        return "/".join(PurePath(value).parts[-2:]) if "path" in key or "/" in value else value
    if isinstance(value, np.ndarray) and value.ndim:
        first = " ".join(map(str, value.ravel()[:6].tolist()))
        return f"{first} ... ({value.dtype} {'x'.join(map(str, value.shape))})"
    return str(value)
