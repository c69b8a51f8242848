"""The types of object annotations: boxes, categories, annotations, descriptions of images."""

import logging
import math
from typing import Any, Literal, NamedTuple

import PIL.Image
from torch import Tensor

logger = logging.getLogger(__name__)

Image = Tensor | PIL.Image.Image
BoundingBox = tuple[float, float, float, float]  # x0, y0, width, height; fractions of the image's sides, 0..1
CropMethodType = Literal["none", "center", "random-1d", "random-2d"]
SplitType = Literal["train", "validation", "test"]

FULL_CROP: BoundingBox = (0.0, 0.0, 1.0, 1.0)  # the whole image


class ImageDescription(NamedTuple):
    """What an annotation file says about one image; `original_size` is (width, height) in pixels."""

    id: int
    file_name: str
    original_size: tuple[int, int]
    url: str | None = None
    license: int | None = None
    coco_url: str | None = None
    date_captured: str | None = None
    flickr_url: str | None = None
    flickr_id: str | None = None
    coco_id: str | None = None


class Category(NamedTuple):
    """A category of objects; `id` is that of its data set: "44" (COCO) or "/m/01g317" (Open Images)."""

    id: str
    super_category: str | None
    name: str


class MostFrequent(NamedTuple):
    """An allow-list by frequency: the `number` categories with the most boxes in the training annotations
    (ties are resolved by id), and those named in `plus`."""

    number: int
    plus: tuple[str, ...] = ()


class Annotation(NamedTuple):
    """One object in one image; a flag is None where the data set does not say.

    `area` is that of the box, as a fraction of the image's; `category_no` counts from 0 in the data set's own
    order; `is_group_of` means that one box holds several objects (COCO's crowds).
    """

    area: float
    image_id: str
    bbox: BoundingBox
    category_no: int
    category_id: str
    id: int | None = None
    source: str | None = None
    confidence: float | None = None
    is_group_of: bool | None = None
    is_truncated: bool | None = None
    is_occluded: bool | None = None
    is_depiction: bool | None = None
    is_inside: bool | None = None
    segmentation: dict[str, Any] | None = None


class Skipped:
    """Counts what is left out of an annotation file, by reason, with the first five of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, reason: str, what: str) -> None:
        """Count one element of a reason such as "empty boxes"."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= 5:
            self.first.setdefault(reason, []).append(what)

    def report(self, source: Any) -> None:
        """Log one warning per reason; `source` is the file."""
        for reason, count in self.counts.items():
            logger.warning("%s: %d %s left out; the first: %s", source, count, reason,
                           ", ".join(self.first[reason]))


def usable_box(bbox: BoundingBox) -> tuple[BoundingBox | None, str]:
    """Return a box clipped to its image, and ""; or None and why it cannot be used."""
    x, y, width, height = bbox
    if not all(map(math.isfinite, bbox)) or width <= 0 or height <= 0:
        return None, "empty boxes"
    if x >= 0 and y >= 0 and x + width <= 1 and y + height <= 1:
        return bbox, ""
    x1, y1 = min(1.0, x + width), min(1.0, y + height)
    x, y = max(0.0, x), max(0.0, y)
    if x1 <= x or y1 <= y:
        return None, "boxes outside their image"
    return (x, y, x1 - x, y1 - y), ""
