"""Boxes, colors and lists of categories for the builders of layouts.

A box is (x0, y0, width, height) in fractions of the image's sides, 0..1, unless pixels are mentioned.
"""

import csv
import importlib
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taming.config import get_obj_from_str
from taming.data.helper_types import FULL_CROP, Annotation, BoundingBox, MostFrequent
from taming.util import read_text

__all__ = [
    "BLACK", "COLOR_PALETTE", "FULL_CROP", "GRAY_25", "GRAY_50", "GRAY_75", "WHITE", "absolute_bbox",
    "additional_parameters_string", "filter_annotations", "get_circle_size", "get_plot_font_size",
    "horizontally_flip_bbox", "intersection_area", "load_allow_list", "load_mapping",
    "load_object_from_string", "pad_list", "rescale_annotations",
]

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
GRAY_75, GRAY_50, GRAY_25 = (63, 63, 63), (127, 127, 127), (191, 191, 191)
# Okabe and Ito's colors (2008), which colorblind people can distinguish, without black; then darker ones.
COLOR_PALETTE = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (213, 94, 0), (0, 114, 178), (204, 121, 167),
    (240, 228, 66), (138, 95, 0), (51, 108, 140), (0, 95, 69), (128, 56, 0), (0, 68, 107), (122, 73, 100),
)
FLAGS = ("group", "occluded", "depiction", "inside")  # Annotation.is_group_of, .is_occluded, ...


def intersection_area(rectangle1: BoundingBox, rectangle2: BoundingBox) -> float:
    """Return the area of the intersection of two boxes, as a fraction of the image's."""
    width, height = (
        min(rectangle1[i] + rectangle1[i + 2], rectangle2[i] + rectangle2[i + 2])
        - max(rectangle1[i], rectangle2[i]) for i in (0, 1)
    )
    return max(0.0, width) * max(0.0, height)


def horizontally_flip_bbox(bbox: BoundingBox) -> BoundingBox:
    """Return the box in the mirrored image."""
    return 1 - (bbox[0] + bbox[2]), bbox[1], bbox[2], bbox[3]


def absolute_bbox(relative_bbox: BoundingBox, width: int, height: int) -> tuple[int, int, int, int]:
    """Return a box's corners x0, y0, x1, y1 in pixels, rounded down, in an image of that size."""
    x, y, w, h = relative_bbox
    return int(x * width), int(y * height), int((x + w) * width), int((y + h) * height)


def pad_list(list_: list, pad_element: Any, pad_to_length: int) -> list:
    """Return a list padded with `pad_element` to a length."""
    return list_ + [pad_element] * (pad_to_length - len(list_))


def rescale_annotations(
    annotations: Sequence[Annotation], crop_coordinates: BoundingBox, flip: bool
) -> list[Annotation]:
    """Return annotations with boxes in fractions of the crop, clipped to it, and then mirrored if `flip`.

    The 2021 function did not shorten a box whose left or upper part the crop cuts off, so that it reached too
    far right or down; this one does. Layouts that encode the crop are not affected.
    """
    left, top, crop_width, crop_height = crop_coordinates

    def along(start: float, size: float, crop_start: float, crop_size: float) -> tuple[float, float]:
        cut = max(0.0, crop_start - start)  # the part before the crop
        shifted = min(max((start - crop_start) / crop_size, 0.0), 1.0)
        return shifted, max(0.0, min((size - cut) / crop_size, 1 - shifted))

    def rescale(bbox: BoundingBox) -> BoundingBox:
        x, width = along(bbox[0], bbox[2], left, crop_width)
        y, height = along(bbox[1], bbox[3], top, crop_height)
        return (1 - (x + width) if flip else x), y, width, height

    return [annotation._replace(bbox=rescale(annotation.bbox)) for annotation in annotations]


def filter_annotations(
    annotations: Sequence[Annotation], crop_coordinates: BoundingBox
) -> list[Annotation]:
    """Return the annotations that overlap the crop."""
    return [a for a in annotations if intersection_area(a.bbox, crop_coordinates) > 0.0]


def additional_parameters_string(annotation: Annotation, short: bool = True) -> str:
    """Return the flags that are set, such as "(g,o)" or "(group,occluded)"; "" for none."""
    values = (annotation.is_group_of, annotation.is_occluded, annotation.is_depiction, annotation.is_inside)
    names = [name[0] if short else name for name, value in zip(FLAGS, values, strict=True) if value]
    return f"({','.join(names)})" if names else ""


def get_plot_font_size(font_size: int | None, figure_size: tuple[int, int]) -> int:
    """Return the size of labels in pixels: the given one, or one that suits the figure."""
    return font_size or (15 if max(figure_size) >= 512 else 12 if max(figure_size) >= 256 else 10)


def get_circle_size(figure_size: tuple[int, int]) -> int:
    """Return the radius in pixels of a centre point in a figure."""
    return 4 if max(figure_size) >= 512 else 3 if max(figure_size) >= 256 else 2


def load_object_from_string(object_string: str) -> Any:
    """Load a list or mapping of categories that a configuration names.

    There are three forms: a text file with one name a line, or one `from,to` for a mapping (further columns
    are kept); the dotted name of a list in `taming.data`; or the dotted name of a function without arguments
    that returns one, in a package that the caller has allowed (`taming.config.allow_targets`).

    Raises:
        ValueError: none of these; the message says how to write one.
    """
    path = Path(object_string)
    if path.is_file():
        lines = read_text(path, "category list", max_bytes=1 << 24).splitlines(keepends=True)
        rows = [tuple(cell.strip() for cell in row) for row in csv.reader(lines) if any(row)]
        if not rows:
            raise ValueError(f"category list {path} is empty: write one name a line")
        return rows
    if path.suffix in (".csv", ".txt") or "/" in object_string:
        raise FileNotFoundError(f"category list {path} does not exist")
    if re.fullmatch(r"taming\.data(\.[a-z]\w*){2,}", object_string):
        module, name = object_string.rsplit(".", 1)
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"there is no category list {object_string}: {error}") from error
        if not isinstance(found, list | tuple | dict):
            raise ValueError(f"{object_string} is not a list of categories but a {type(found).__name__}")
        return found
    function = get_obj_from_str(object_string)
    if not inspect.isfunction(function):
        raise ValueError(f"{object_string} is not a function that returns a list of categories")
    return function()


def load_allow_list(target: str) -> set[str] | MostFrequent | None:
    """Load the names of the categories to keep; None, for all, without a target."""
    if not target:
        return None
    names = load_object_from_string(target)
    if isinstance(names, MostFrequent):
        return names
    return {name if isinstance(name, str) else name[0] for name in names}  # 2021: (name, count)


def load_mapping(target: str) -> dict[str, str]:
    """Load the category ids that are read as others; none without a target."""
    pairs = load_object_from_string(target) if target else {}
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"category mapping {target} is not a list of pairs: write one `from,to` a line")
    return dict(pairs)
