"""The objects of a built-in landscape: boxes around the visible parts of single objects and of regions."""

from collections.abc import Iterator

import numpy as np

from taming.data.helper_types import Annotation, BoundingBox
from taming.data.landscapes.sky import MOUNTAIN, SAND, SNOW, WATER
from taming.data.landscapes.terrain import Canvas

REGIONS = {"mountains": (MOUNTAIN, SNOW), "water": (WATER,), "sand": (SAND,)}  # and their labels
CATEGORIES = ("sun", "moon", "spruce", "cactus", "palm", "person", *REGIONS)
MAX_OBJECTS = 12  # of one scene: the largest ones
SMALLEST = {"thing": 0.002, "region": 0.01}  # visible area, as a fraction of the image


def objects_of(canvas: Canvas, image_id: int) -> list[Annotation]:
    """Return the largest objects of a painted scene, the largest first; see CATEGORIES."""
    found: list[Annotation] = []
    for kind, box, area in sorted(_candidates(canvas), key=lambda candidate: -candidate[2])[:MAX_OBJECTS]:
        found.append(Annotation(
            area=area, image_id=str(image_id), bbox=box, category_no=CATEGORIES.index(kind), category_id=kind,
            id=len(found), is_group_of=kind in REGIONS,
        ))
    return found


def _candidates(canvas: Canvas) -> Iterator[tuple[str, BoundingBox, float]]:
    """Yield what is large enough: its kind, its box in fractions of the image, the box's area."""
    assert canvas.owner is not None and canvas.label is not None, "paint with extras"
    pixels = canvas.height * canvas.width
    seen = np.bincount(canvas.owner.ravel(), minlength=len(canvas.things) + 1)
    for number, kind in enumerate(canvas.things, 1):
        if seen[number] >= SMALLEST["thing"] * pixels:
            yield kind, *_box(canvas.owner == number)
    for kind, labels in REGIONS.items():
        shown = np.isin(canvas.label, labels)
        if shown.sum() >= SMALLEST["region"] * pixels:
            yield kind, *_box(shown)


def _box(shown: np.ndarray) -> tuple[BoundingBox, float]:
    """Return the box around the pixels of a mask (H, W), in fractions of the sides, and its area."""
    height, width = shown.shape
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    tall, wide = (rows[-1] + 1 - rows[0]) / height, (columns[-1] + 1 - columns[0]) / width
    return (float(columns[0] / width), float(rows[0] / height), float(wide), float(tall)), float(tall * wide)
