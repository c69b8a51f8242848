"""COCO 2017 with its objects ("things", 80 categories) and surroundings ("stuff", 91) as boxes."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.helper_types import Annotation, Category, ImageDescription, Skipped, usable_box
from taming.util import read_text

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 31  # of an annotation file; those of 2017 have half a gigabyte
COCO_PATH_STRUCTURE = {
    split: {
        "top_level": "",
        "instances_annotations": f"annotations/instances_{name}.json",
        "stuff_annotations": f"annotations/stuff_{name}.json",
        "files": name,
    }
    for split, name in (("train", "train2017"), ("validation", "val2017"))
}


class AnnotatedObjectsCoco(AnnotatedObjectsDataset):
    """Images of COCO with their objects; items and arguments as AnnotatedObjectsDataset says.

    Crowds count as groups. (In 2021 their flag was read, but not used for tokens: for the tokens of models of
    2021, set `use_group_parameter: false`.) The category "other" is left out.

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
        files = [path for name, path in self.paths.items() if name.endswith("_annotations")]
        contents = [read_annotation_file(path) for path in files]
        for path, content in zip(files, contents, strict=True):
            self.categories |= load_categories(content["categories"], path)
            self.image_descriptions |= load_image_descriptions(content["images"], path)
        known = {str(category["id"]) for content in contents for category in content["categories"]}
        self.filter_categories()
        self.setup_category_id_and_number()
        self.set_annotations(load_annotations(
            [content["annotations"] for content in contents], self.image_descriptions,
            self.get_category_number, self.split, sources=files, category_mapping=self.category_mapping,
            known=known,
        ))

    def get_path_structure(self) -> dict[str, str]:
        if self.split not in COCO_PATH_STRUCTURE:
            known = ", ".join(COCO_PATH_STRUCTURE)
            raise ValueError(f"split must be one of {known} for COCO, got {self.split!r}")
        unused = {"instances_annotations": not self.use_things, "stuff_annotations": not self.use_stuff}
        structure = COCO_PATH_STRUCTURE[self.split]
        return {name: path for name, path in structure.items() if not unused.get(name)}

    def get_image_path(self, image_id: str) -> Path:
        return self.paths["files"] / self.image_descriptions[image_id].file_name

    def get_image_description(self, image_id: str) -> dict[str, Any]:
        return self.image_descriptions[image_id]._asdict()


def read_annotation_file(path: Path) -> dict[str, Any]:
    """Read one annotation file: lists of "images", "categories" and "annotations".

    Raises:
        ValueError: it is not JSON, or lacks one of the lists.
    """
    try:
        content = json.loads(read_text(path, "annotation file", max_bytes=MAX_BYTES))
    except ValueError as error:  # also of the encoding
        raise ValueError(f"annotation file {path} is broken ({error}): download it again") from error
    for key in ("images", "categories", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"annotation file {path} has no list {key!r}: is it one of COCO's *_2017.json?")
    return content


def load_image_descriptions(
    description_json: Iterable[Mapping], path: str | Path = "of COCO"
) -> dict[str, ImageDescription]:
    """Read the list "images" of an annotation file, by image id; `path` stands in messages."""
    found = {}
    for entry in description_json:
        try:
            size = int(entry["width"]), int(entry["height"])
            if min(size) < 1:
                raise ValueError(f"an image of {size[0]}x{size[1]} pixels")
            optional = {key: entry.get(key) for key in ("license", "coco_url", "date_captured", "flickr_url")}
            found[str(entry["id"])] = ImageDescription(entry["id"], entry["file_name"], size, **optional)
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, "images", entry, error) from error
    return found


def load_categories(category_json: Iterable[Mapping], path: str | Path = "of COCO") -> dict[str, Category]:
    """Read the list "categories" of an annotation file, by category id, without "other"."""
    found = {}
    for entry in category_json:
        try:
            key = str(entry["id"])
            found[key] = Category(key, entry.get("supercategory"), entry["name"])
        except (AttributeError, KeyError, TypeError) as error:
            raise _broken(path, "categories", entry, error) from error
    return {key: category for key, category in found.items() if category.name != "other"}


def load_annotations(
    annotations_json: Sequence[Iterable[Mapping]],
    image_descriptions: Mapping[str, ImageDescription],
    category_no_for_id: Callable[[str], int],
    split: str,
    *,
    sources: Sequence[str | Path] | None = None,
    category_mapping: Mapping[str, str] | None = None,
    known: Collection[str] | None = None,
) -> dict[str, list[Annotation]]:
    """Read the lists "annotations" of annotation files, by image id.

    Boxes are clipped to their image. Those that are empty, missing or outside it, and those of categories
    that no file describes, are left out, counted and reported.

    Args:
        annotations_json: the lists.
        image_descriptions: by image id.
        category_no_for_id: returns the number of a category, or raises KeyError if it is not used.
        split: stands in messages.
        sources: the files of the lists, for messages.
        category_mapping: category ids that are read as others.
        known: the ids of all categories that the files describe.

    Raises:
        ValueError: an annotation lacks something, or is of an image that the file does not describe.
    """
    found: dict[str, list[Annotation]] = {}
    for entries, path in zip(annotations_json, sources or [split] * len(annotations_json), strict=True):
        skipped = Skipped()
        for entry in entries:
            try:
                image_id, category_id = str(entry["image_id"]), str(entry["category_id"])
                category_id = (category_mapping or {}).get(category_id, category_id)
                box = entry.get("bbox")
                x, y, w, h = map(float, (0, 0, 0, 0) if box in (None, []) else box)  # none: an empty one
                if image_id not in image_descriptions:
                    raise ValueError(f"image_id {image_id} is not among its images")
            except (KeyError, TypeError, ValueError) as error:
                raise _broken(path, "annotations", entry, error) from error
            name = f"annotation {entry.get('id')}"
            try:
                number = category_no_for_id(category_id)
            except KeyError:
                if known is not None and category_id not in known:
                    skipped.add("objects of unknown categories", f"{name} ({category_id})")
                continue
            width, height = image_descriptions[image_id].original_size
            bbox, reason = usable_box((x / width, y / height, w / width, h / height))
            if bbox is None:
                skipped.add(reason, f"{name} {box}")
                continue
            found.setdefault(image_id, []).append(Annotation(
                area=bbox[2] * bbox[3], image_id=image_id, bbox=bbox, category_no=number,
                category_id=category_id, id=entry.get("id"), is_group_of=bool(entry.get("iscrowd")),
            ))
        skipped.report(path)
    return found


def _broken(path: str | Path, part: str, entry: Any, error: Exception) -> ValueError:
    shown = {key: value for key, value in entry.items() if key != "segmentation"} \
        if isinstance(entry, dict) else entry
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    which = f"the entry with the id {entry.get('id')}" if isinstance(entry, dict) else "an entry"
    return ValueError(
        f"annotation file {path} is broken in {part!r} ({reason}): download it again, or correct or remove "
        f"{which}: {str(shown)[:200]}"
    )
