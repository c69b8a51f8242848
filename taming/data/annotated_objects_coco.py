"""COCO 2017 with its objects ("things", 80 categories) and surroundings ("stuff", 91) as boxes."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.helper_types import Annotation, Category, ImageDescription, Skipped, usable_box

logger = logging.getLogger(__name__)

COCO_PATH_STRUCTURE = {
    split: {
        "instances_annotations": f"annotations/instances_{name}.json",
        "stuff_annotations": f"annotations/stuff_{name}.json",
        "files": name,
    }
    for split, name in (("train", "train2017"), ("validation", "val2017"))
}


class AnnotatedObjectsCoco(AnnotatedObjectsDataset):
    """Images of COCO with their objects; items and arguments as AnnotatedObjectsDataset says.

    Crowds count as groups. (In 2021 their flag was read, but never reached the tokens: for the tokens of
    models from then, set `use_group_parameter: false`.) The catch-all category "other" is left out.

    Args:
        use_things: objects, of `annotations/instances_*2017.json`.
        use_stuff: surroundings, of `annotations/stuff_*2017.json`.
    """

    def __init__(self, use_things: bool = True, use_stuff: bool = True, **kwargs: Any) -> None:
        if not use_things and not use_stuff:
            raise ValueError("nothing to annotate with: set use_things or use_stuff")
        self.use_things = use_things
        self.use_stuff = use_stuff
        super().__init__(**kwargs)
        files = [path for name, path in self.paths_of_data.items() if name.endswith("_annotations")]
        contents = [read_annotation_file(path) for path in files]
        all_categories: dict[str, Category] = {}
        for path, content in zip(files, contents, strict=True):
            all_categories |= load_categories(content["categories"], path)
            self.image_descriptions |= load_image_descriptions(content["images"], path)
        self.categories = {k: category for k, category in all_categories.items() if category.name != "other"}
        self.filter_categories()
        self.setup_category_id_and_number()
        annotations: dict[str, list[Annotation]] = {}
        for path, content in zip(files, contents, strict=True):
            load_annotations(
                content["annotations"], path, self.image_descriptions, self.category_number,
                self.category_mapping, set(all_categories), annotations,
            )
        self.set_annotations(annotations)

    def get_path_structure(self) -> dict[str, str]:
        if self.split not in COCO_PATH_STRUCTURE:
            known = ", ".join(COCO_PATH_STRUCTURE)
            raise ValueError(f"split must be one of {known} for COCO, got {self.split!r}")
        unused = {"instances_annotations": not self.use_things, "stuff_annotations": not self.use_stuff}
        structure = COCO_PATH_STRUCTURE[self.split]
        return {name: path for name, path in structure.items() if not unused.get(name)}

    def get_image_path(self, image_id: str) -> Path:
        return self.paths_of_data["files"] / self.image_descriptions[image_id].file_name

    def get_image_description(self, image_id: str) -> dict[str, Any]:
        return self.image_descriptions[image_id]._asdict()

    def description_keys(self) -> Sequence[str]:
        return ImageDescription._fields


def read_annotation_file(path: Path) -> dict[str, Any]:
    """Read one annotation file: lists of "images", "categories" and "annotations".

    Raises:
        ValueError: it is no JSON, or lacks one of the lists.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of the encoding
        raise ValueError(f"annotation file {path} is broken ({error}): download it again") from error
    for key in ("images", "categories", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"annotation file {path} has no list {key!r}: is it one of COCO's *_2017.json?")
    return content


def load_image_descriptions(entries: Iterable[Mapping], path: Path) -> dict[str, ImageDescription]:
    """Read the list "images" of an annotation file, by image id."""
    found = {}
    for entry in entries:
        try:
            size = int(entry["width"]), int(entry["height"])
            if min(size) < 1:
                raise ValueError(f"an image of {size[0]}x{size[1]} pixels")
            optional = {key: entry.get(key) for key in ("license", "coco_url", "date_captured", "flickr_url")}
            found[str(entry["id"])] = ImageDescription(entry["id"], entry["file_name"], size, **optional)
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, "images", entry, error) from error
    return found


def load_categories(entries: Iterable[Mapping], path: Path) -> dict[str, Category]:
    """Read the list "categories" of an annotation file, by category id."""
    found = {}
    for entry in entries:
        try:
            key = str(entry["id"])
            found[key] = Category(key, entry.get("supercategory"), entry["name"])
        except (AttributeError, KeyError, TypeError) as error:
            raise _broken(path, "categories", entry, error) from error
    return found


def load_annotations(
    entries: Iterable[Mapping], path: Path, descriptions: Mapping[str, ImageDescription],
    category_number: Mapping[str, int], category_mapping: Mapping[str, str], known: set[str],
    into: dict[str, list[Annotation]],
) -> None:
    """Add the list "annotations" of an annotation file to what is known of its images, by image id.

    Boxes are cut to their picture. Those that are empty, absent or outside of it, and those of categories
    that no file describes, are left out, counted and reported.

    Raises:
        ValueError: an annotation lacks something, or is of an image that the file does not describe.
    """
    skipped = Skipped()
    for entry in entries:
        try:
            image_id, category_id = str(entry["image_id"]), str(entry["category_id"])
            category_id = category_mapping.get(category_id, category_id)
            box = entry.get("bbox")
            x, y, w, h = map(float, (0, 0, 0, 0) if box in (None, []) else box)  # none: an empty one
            if image_id not in descriptions:
                raise ValueError(f"image_id {image_id} is not among its images")
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, "annotations", entry, error) from error
        width, height = descriptions[image_id].original_size
        number = category_number.get(category_id)
        name = f"annotation {entry.get('id')}"
        if number is None:
            if category_id not in known:
                skipped.add("objects of unknown categories", f"{name} ({category_id})")
            continue
        bbox, reason = usable_box((x / width, y / height, w / width, h / height))
        if bbox is None:
            skipped.add(reason, f"{name} {box}")
            continue
        into.setdefault(image_id, []).append(Annotation(
            area=bbox[2] * bbox[3], image_id=image_id, bbox=bbox, category_no=number,
            category_id=category_id, id=entry.get("id"), is_group_of=bool(entry.get("iscrowd")),
        ))
    skipped.report(path)


def _broken(path: Path, part: str, entry: Any, error: Exception) -> ValueError:
    shown = {key: value for key, value in entry.items() if key != "segmentation"} \
        if isinstance(entry, dict) else entry
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    which = f"the entry with the id {entry.get('id')}" if isinstance(entry, dict) else "an entry"
    return ValueError(
        f"annotation file {path} is broken in {part!r} ({reason}): download it again, or correct or remove "
        f"{which}: {str(shown)[:200]}"
    )
