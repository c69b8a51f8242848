"""Open Images with its boxes: the CSV files of versions 4 to 7, as they are published."""

import csv
import io
import logging
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.helper_types import Annotation, Category, MostFrequent, Skipped, usable_box
from taming.util import open_file

logger = logging.getLogger(__name__)

OPEN_IMAGES_STRUCTURE = {
    split: {
        "top_level": "",
        "class_descriptions": "class-descriptions-boxable.csv",
        "annotations": f"{annotations}-annotations-bbox.csv",
        "file_list": file_list,
        "files": split,
    }
    for split, annotations, file_list in (
        ("train", "oidv6-train", "train-images-boxable.csv"),
        ("validation", "validation", "validation-images.csv"),
        ("test", "test", "test-images.csv"),
    )
}
OTHER_NAMES = {  # of files in other releases
    "class-descriptions-boxable.csv": "oidv7-class-descriptions-boxable.csv",
    "oidv6-train-annotations-bbox.csv": "train-annotations-bbox.csv",
}
CORNERS = ("XMin", "XMax", "YMin", "YMax")  # fractions of the sides, 0..1
FLAGS = {  # column: field of Annotation; 1 yes, 0 no, -1 unknown
    "IsGroupOf": "is_group_of", "IsOccluded": "is_occluded", "IsDepiction": "is_depiction",
    "IsInside": "is_inside", "IsTruncated": "is_truncated",
}


class AnnotatedObjectsOpenImages(AnnotatedObjectsDataset):
    """Images of Open Images with their objects; items and arguments as AnnotatedObjectsDataset says.

    data_path holds `class-descriptions-boxable.csv`, the annotations (`oidv6-train-annotations-bbox.csv`,
    `validation-annotations-bbox.csv`, `test-annotations-bbox.csv`) and the folders of images `train`,
    `validation` and `test`. An allow-list by frequency counts the training boxes, whatever the split, so that
    categories have the same numbers in all of them.

    Args:
        use_additional_parameters: distinguish occluded, depicted and indoor objects in the layouts.
    """

    def __init__(self, use_additional_parameters: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.use_additional_parameters = use_additional_parameters
        self.categories = load_categories(self.paths["class_descriptions"])
        known = set(self.categories)
        self.filter_categories()
        self.setup_category_id_and_number()
        self.set_annotations(load_annotations(
            self.paths["annotations"], self.min_object_area, self.category_mapping,
            self.category_number, known,
        ))

    def get_path_structure(self) -> dict[str, str]:
        if self.split not in OPEN_IMAGES_STRUCTURE:
            known = ", ".join(OPEN_IMAGES_STRUCTURE)
            raise ValueError(f"split must be one of {known} for Open Images, got {self.split!r}")
        structure = OPEN_IMAGES_STRUCTURE[self.split]
        return {name: self._existing(file) for name, file in structure.items() if name != "file_list"}

    def get_image_path(self, image_id: str) -> Path:
        return self.paths["files"] / f"{image_id:0>16}.jpg"

    def get_image_description(self, image_id: str) -> dict[str, Any]:
        path = self.get_image_path(image_id)
        return {"file_path": str(path), "file_name": path.name}

    def most_frequent_categories(self, wanted: MostFrequent) -> set[str]:
        path = Path(self.data_path) / self._existing(OPEN_IMAGES_STRUCTURE["train"]["annotations"])
        if not path.is_file():
            raise FileNotFoundError(
                f"the {wanted.number} most frequent categories are counted in the training annotations, but "
                f"{path} does not exist: put it there, or give category_allow_list_target a text file"
            )
        logger.info("counting the boxes of each category in %s", path)
        counts: Counter[str] = Counter(
            row[0] for _, row in read_rows(path, ("LabelName",)) if row[0] in self.categories
        )
        ranked = sorted(counts, key=lambda key: (-counts[key], key))[:wanted.number]
        names = {category.name for category in self.categories.values()}
        return {self.categories[key].name for key in ranked} | (set(wanted.plus) & names)

    def _existing(self, name: str) -> str:
        """Return the name of a file, or that of another release where only that exists."""
        names = [name, *([OTHER_NAMES[name]] if name in OTHER_NAMES else [])]
        return next((name for name in names if Path(self.data_path, name).exists()), name)


def _open_csv(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_file(path, "annotation file"), encoding="utf-8-sig", newline="")


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Read some columns of a CSV file with a header: (line number, values).

    Raises:
        ValueError: a column is missing, or a line is too short; blank ones are left out.
    """
    with _open_csv(path) as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            missing = [name for name in columns if name not in header]
            if missing:
                raise ValueError(
                    f"annotation file {path} has no column {', '.join(missing)}: download it again"
                )
            places = [header.index(name) for name in columns]
            for row in reader:
                if row:
                    yield reader.line_num, [row[i] for i in places]
        except (IndexError, csv.Error, UnicodeDecodeError) as error:
            message = f"annotation file {path} is broken in line {reader.line_num or 1}: download it again"
            raise ValueError(message) from error


def load_image_ids(csv_path: Path) -> list[str]:
    """Read the column `image_name` of a list of images."""
    return [name for _, (name,) in read_rows(csv_path, ("image_name",))]


def load_categories(csv_path: Path) -> dict[str, Category]:
    """Read the names of categories by id: lines `id,name`, with or without a header."""
    try:
        with _open_csv(csv_path) as file:
            rows = [row for row in csv.reader(file) if row and row[0] != "LabelName"]
    except (csv.Error, UnicodeDecodeError) as error:
        message = f"class descriptions {csv_path} are broken ({error}): download them again"
        raise ValueError(message) from error
    short = next((row for row in rows if len(row) < 2), None)
    if short is not None or not rows:
        raise ValueError(f"class descriptions {csv_path} must hold lines `id,name`, got {short or 'nothing'}")
    return {row[0]: Category(id=row[0], super_category=None, name=row[1]) for row in rows}


def load_annotations(
    descriptor_path: Path,
    min_object_area: float,
    category_mapping: Mapping[str, str],
    category_no_for_id: Mapping[str, int],
    known: Collection[str] | None = None,
) -> dict[str, list[Annotation]]:
    """Read the boxes of the categories that have a number, by image id.

    Boxes are clipped to their image. Those that are empty or outside it, and those of categories that are not
    `known`, are left out, counted and reported; boxes smaller than `min_object_area` are left out.

    Raises:
        ValueError: a column is missing, or a line cannot be read.
    """
    found: dict[str, list[Annotation]] = {}
    skipped = Skipped()
    columns = ("ImageID", "LabelName", *CORNERS, "Source", "Confidence", *FLAGS)
    for number, (line, row) in enumerate(read_rows(descriptor_path, columns)):
        image_id, category_id, x0, x1, y0, y1, source, confidence, *flags = row
        category_id = category_mapping.get(category_id, category_id)
        category_no = category_no_for_id.get(category_id)
        if category_no is None:
            if known is not None and category_id not in known:
                skipped.add("boxes of unknown categories", f"line {line} ({category_id})")
            continue
        try:
            left, top = float(x0), float(y0)
            bbox, reason = usable_box((left, top, float(x1) - left, float(y1) - top))
            trust = float(confidence)
        except ValueError as error:
            message = f"annotation file {descriptor_path} is broken in line {line}: {error}"
            raise ValueError(message) from error
        if bbox is None:
            skipped.add(reason, f"line {line}")
            continue
        area = bbox[2] * bbox[3]
        if area < min_object_area:
            continue
        # One copy of each of these repeated texts saves gigabytes.
        image_id, category_id, source = map(sys.intern, (image_id, category_id, source))
        set_flags: dict[str, Any] = {
            name: flag == "1" for name, flag in zip(FLAGS.values(), flags, strict=True)
        }
        found.setdefault(image_id, []).append(Annotation(
            area=area, image_id=image_id, bbox=bbox, category_no=category_no, category_id=category_id,
            id=number, source=source, confidence=1.0 if trust == 1 else trust,
            **set_flags,
        ))
    skipped.report(descriptor_path)
    return found
