"""Images with annotated objects, and their layouts as tokens: what COCO and Open Images have in common.

H W pixels, M tokens of a layout. A box is (x0, y0, width, height) in shares of the picture's sides, 0..1.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms.v2 import InterpolationMode, Resize

from taming.data.base import ImagePaths
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.conditional_builder.utils import load_allow_list, load_mapping
from taming.data.files.errors import BadImage
from taming.data.files.images import read_image
from taming.data.helper_types import (
    FULL_CROP,
    Annotation,
    BoundingBox,
    Category,
    CropMethodType,
    ImageDescription,
    MostFrequent,
    SplitType,
)
from taming.data.image_transforms import (
    CenterCropReturnCoordinates,
    Random2dCropReturnCoordinates,
    RandomCrop1dReturnCoordinates,
    RandomHorizontalFlipReturn,
)
from taming.images import from_uint8

logger = logging.getLogger(__name__)

BUILDERS = {
    "objects_center_points": ObjectsCenterPointsConditionalBuilder,
    "objects_bbox": ObjectsBoundingBoxConditionalBuilder,
}
CROP_METHODS = ("none", "center", "random-1d", "random-2d")
OWN_KEYS = ("image", "image_path", "file_path_", "crop_bbox", "flipped", "annotations", *BUILDERS)
LAST_CATEGORY = "/m/01s55n"  # suitcases joined the published Open Images models last; numbers must not change


class AnnotatedObjectsDataset(ImagePaths):
    """Images with their objects. Items hold those of `keys`, or everything where that is empty:

    "image" (H, W, 3), float32 in [-1, 1]; "objects_bbox" and "objects_center_points", the layout as int64
    (M,); "annotations", a list of Annotation for the whole picture; "crop_bbox", the part that is shown;
    "flipped", whether it is mirrored; "image_path" and "file_path_"; and what the data set says about an
    image ("file_name", ...). Without "image" no picture is read, cropped or flipped.

    Unreadable images are skipped as ImagePaths does. Random numbers come from the global generators of torch
    (crops, flips) and python (the order of objects in a layout).

    Args:
        data_path: folder of the data set, as it was published.
        split: "train", "validation" or, for Open Images, "test".
        keys: what items hold.
        target_image_size: side in pixels.
        min_object_area: smaller boxes are left out; a share of the picture, 0..1.
        min_objects_per_image, max_objects_per_image: images with fewer or more objects (of the areas and
            categories that are left) are left out.
        crop_method: "none" (squeeze to a square), "center", "random-1d" (a square of the smaller side, moved
            along the longer) or "random-2d" (a square of at least target_image_size, anywhere).
        random_flip: mirror every second picture, drawn at random.
        no_tokens: vocabulary of the layouts.
        use_group_parameter, encode_crop: see ObjectsCenterPointsConditionalBuilder.
        category_allow_list_target: names of the categories to keep: a text file, one name a line; or
            `taming.data.open_images_helper.top_300_classes_plus_coco_compatibility` (see there).
        category_mapping_target: category ids to be read as other ones: a text file, one `from,to` a line; or
            `taming.data.open_images_helper.open_images_unify_categories_for_coco`.
        no_object_classes: categories that the tokens have room for; as many as there are by default.
        max_bad_fraction: share of unreadable images that is tolerated.

    Raises:
        FileNotFoundError: a file or folder of the data set is missing.
        ValueError: a broken annotation file, an unknown key or crop method, or no image left.
    """

    def __init__(
        self, data_path: str | os.PathLike, split: SplitType, keys: Sequence[str], target_image_size: int,
        min_object_area: float, min_objects_per_image: int, max_objects_per_image: int,
        crop_method: CropMethodType, random_flip: bool, no_tokens: int, use_group_parameter: bool,
        encode_crop: bool, category_allow_list_target: str = "", category_mapping_target: str = "",
        no_object_classes: int | None = None, *, max_bad_fraction: float = 0.01,
    ) -> None:
        # ImagePaths.__init__ follows in set_annotations: a subclass reads the paths first.
        self.data_path = data_path
        self.split = split
        self.keys = list(keys)
        self.target_image_size = target_image_size
        self.min_object_area = min_object_area
        self.min_objects_per_image = min_objects_per_image
        self.max_objects_per_image = max_objects_per_image
        self.crop_method = "none" if crop_method is None else crop_method
        self.random_flip = random_flip
        self.no_tokens = no_tokens
        self.use_group_parameter = use_group_parameter
        self.use_additional_parameters = False
        self.encode_crop = encode_crop
        self.no_object_classes = no_object_classes
        self._tolerated = max_bad_fraction
        self.annotations: dict[str, list[Annotation]] = {}
        self.image_descriptions: dict[str, ImageDescription] = {}
        self.categories: dict[str, Category] = {}
        self.category_ids: list[str] = []
        self.category_number: dict[str, int] = {}
        self.image_ids: list[str] = []
        self._builders: dict[str, ObjectsCenterPointsConditionalBuilder] | None = None
        self.transform_functions = self.setup_transform(target_image_size, self.crop_method, random_flip)
        self.paths_of_data = self.build_paths(data_path)
        self.category_allow_list = load_allow_list(category_allow_list_target)
        self.category_mapping = load_mapping(category_mapping_target)

    # ---- what a subclass says

    def get_path_structure(self) -> dict[str, str]:
        """Return the files and folders of this split, relative to data_path, by name; "files": the images."""
        raise NotImplementedError

    def get_image_path(self, image_id: str) -> Path:
        """Return the file of an image."""
        raise NotImplementedError

    def get_image_description(self, image_id: str) -> dict[str, Any]:
        """Return what the data set says about an image, under the keys that items hold it."""
        raise NotImplementedError

    def description_keys(self) -> Sequence[str]:
        """Return the keys of get_image_description."""
        raise NotImplementedError

    def most_frequent_categories(self, wanted: MostFrequent) -> set[str]:
        """Return the names that an allow-list by frequency stands for."""
        raise ValueError(f"{type(self).__name__} counts no boxes: give category_allow_list_target a file")

    # ---- building

    def build_paths(self, top_level: str | os.PathLike) -> dict[str, Path]:
        """Return where the files of this split are, all of which must exist."""
        top_level = Path(top_level)
        paths = {name: top_level / below for name, below in self.get_path_structure().items()}
        missing = [str(path) for path in paths.values() if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"{type(self).__name__} needs {', '.join(missing)} (working directory: {os.getcwd()}): set "
                "data_path to the folder of the data set"
            )
        return paths

    @staticmethod
    def setup_transform(
        target_image_size: int, crop_method: CropMethodType, random_flip: bool
    ) -> list[Callable[[Tensor], Any]]:
        """Return the steps from an image (3, h, w) to a square one; crops and flips say what they did."""
        if not isinstance(target_image_size, int) or target_image_size < 1:
            raise ValueError(f"target_image_size must be a number of pixels, got {target_image_size!r}")
        if crop_method not in CROP_METHODS:
            raise ValueError(f"crop_method must be one of {', '.join(CROP_METHODS)}, got {crop_method!r}")
        size = target_image_size
        square, smaller_side = (
            Resize(sides, InterpolationMode.BICUBIC, antialias=True) for sides in ([size, size], [size])
        )
        steps = {
            "none": [square],
            "center": [smaller_side, CenterCropReturnCoordinates(size)],
            "random-1d": [smaller_side, RandomCrop1dReturnCoordinates(size)],
            "random-2d": [Random2dCropReturnCoordinates(size), square],
        }[crop_method]
        return steps + ([RandomHorizontalFlipReturn()] if random_flip else [])

    def filter_categories(self) -> None:
        """Leave out the categories that are not allowed, and those that are read as others."""
        allowed = self.category_allow_list
        if isinstance(allowed, MostFrequent):
            self.category_allow_list = allowed = self.most_frequent_categories(allowed)
        if allowed is not None:
            unknown = sorted(allowed - {category.name for category in self.categories.values()})
            if unknown:
                logger.warning(
                    "%d of %d allowed categories do not exist in %s; the first: %s",
                    len(unknown), len(allowed), self.data_path, ", ".join(unknown[:5]),
                )
        self.categories = {
            key: category for key, category in self.categories.items()
            if (allowed is None or category.name in allowed) and key not in self.category_mapping
        }
        if not self.categories:
            raise ValueError(
                f"none of the categories of {self.data_path} is left: check category_allow_list_target and "
                "category_mapping_target"
            )

    def setup_category_id_and_number(self) -> None:
        """Number the categories in the order of their ids, as strings."""
        self.category_ids = sorted(self.categories, key=lambda key: (key == LAST_CATEGORY, key))
        self.category_number = {key: number for number, key in enumerate(self.category_ids)}

    @staticmethod
    def filter_object_number(
        all_annotations: Mapping[str, Sequence[Annotation]], min_object_area: float,
        min_objects_per_image: int, max_objects_per_image: int,
    ) -> dict[str, list[Annotation]]:
        """Leave out small objects, then images with too few or too many."""
        large = {
            key: [a for a in annotations if a.area > min_object_area]
            for key, annotations in all_annotations.items()
        }
        return {k: v for k, v in large.items() if min_objects_per_image <= len(v) <= max_objects_per_image}

    def set_annotations(self, annotations: Mapping[str, Sequence[Annotation]]) -> None:
        """Choose the images by their objects, and check that there are any, and that layouts fit them."""
        chosen = self.filter_object_number(
            annotations, self.min_object_area, self.min_objects_per_image, self.max_objects_per_image
        )
        if not chosen:
            sizes = [len(objects) for objects in annotations.values()]
            raise ValueError(
                f"no image is left of {len(sizes)} annotated ones in {self.data_path} ({self.split}): they "
                f"have {min(sizes, default=0)} to {max(sizes, default=0)} objects of {len(self.categories)} "
                f"categories, wanted are {self.min_objects_per_image} to {self.max_objects_per_image} of an "
                f"area above {self.min_object_area}: change min_objects_per_image, max_objects_per_image, "
                "min_object_area or the categories"
            )
        logger.info("%s (%s): %d of %d annotated images have a suitable number of objects",
                    self.data_path, self.split, len(chosen), len(annotations))
        by_path = self._existing_images(chosen)
        self._id_of_path = by_path
        self.image_ids = list(by_path.values())
        self.annotations = {key: list(chosen[key]) for key in self.image_ids}
        self.image_descriptions = {
            key: self.image_descriptions[key] for key in self.image_ids if key in self.image_descriptions
        }
        self._check()
        super().__init__(list(by_path), max_bad_fraction=self._tolerated)

    def _existing_images(self, image_ids: Iterable[str]) -> dict[str, str]:
        """Return the images that exist, {path: id}; the others are counted and reported."""
        folders: dict[Path, set[str]] = {}  # one listing is faster than a million questions
        missing, by_path = [], {}
        for image_id in image_ids:
            path = self.get_image_path(image_id)
            if path.parent not in folders:
                folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if path.name in folders[path.parent]:
                by_path[str(path)] = image_id
            else:
                missing.append(str(path))
        if missing:
            shown = "\n  ".join(missing[:5])
            total = len(missing) + len(by_path)
            message = f"{len(missing)} of {total} annotated images do not exist. The first:\n  {shown}"
            if not by_path:
                raise ValueError(f"no image is left in {self.data_path}: {message}")
            logger.warning("%s", message)
        return by_path

    def _check(self) -> None:
        known = (*OWN_KEYS, *self.description_keys())
        unknown = [key for key in self.keys if key not in known]
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}: items can hold {', '.join(known)}")
        if self.no_classes < len(self.categories):
            raise ValueError(
                f"no_object_classes={self.no_classes} is less than the {len(self.categories)} categories of "
                f"{self.data_path}: raise it, or allow fewer categories"
            )
        if not self.keys or any(key in BUILDERS for key in self.keys):
            assert self.conditional_builders  # building them checks the vocabulary

    # ---- items

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)  # of the next image, where one cannot be read
        image_id = self._id_of_path[item["file_path_"]]
        item |= self.get_image_description(image_id)
        item |= {"annotations": self.annotations[image_id], "image_path": item["file_path_"]}
        for key, builder in self.conditional_builders.items() if self._wants(*BUILDERS) else ():
            if self._wants(key):
                item[key] = builder.build(item["annotations"], item["crop_bbox"], item["flipped"])
        return {key: item[key] for key in self.keys} if self.keys else item

    def load(self, path: str | os.PathLike) -> dict[str, Any]:
        """Read, crop and flip one file into "image", "crop_bbox" and "flipped"."""
        if not self._wants("image"):
            return {"crop_bbox": FULL_CROP, "flipped": False}
        pixels = torch.tensor(read_image(path)).permute(2, 0, 1)  # (3, h, w) uint8
        description = self.image_descriptions.get(self._id_of_path.get(os.fspath(path), ""))
        if description:
            (height, width), (width_said, height_said) = pixels.shape[1:], description.original_size
            if abs(math.log(width * height_said / (height * width_said))) > 0.05:  # a resized copy is fine
                raise BadImage(
                    f"{os.fspath(path)} is {width}x{height} pixels (width x height), but its annotations are "
                    f"for {width_said}x{height_said}: boxes would not fit it"
                )
        crop_bbox, flipped, image = self.image_transform(pixels)
        image = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
        return {"image": image, "crop_bbox": crop_bbox, "flipped": flipped}

    def image_transform(self, x: Tensor) -> tuple[BoundingBox, bool, Tensor]:
        """Turn pixels (3, h, w) uint8 into (the part shown, whether mirrored, (3, H, W) in [-1, 1])."""
        crop_bbox, flipped = FULL_CROP, False
        for step in self.transform_functions:
            if isinstance(step, RandomHorizontalFlipReturn):
                flipped, x = step(x)
            elif isinstance(step, Resize):
                x = step(x)
            else:
                crop_bbox, x = step(x)
        return crop_bbox, flipped, from_uint8(x)

    def _wants(self, *keys: str) -> bool:
        return not self.keys or any(key in self.keys for key in keys)

    @staticmethod
    def collate_fn(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of items; annotations, of which each image has another number, stay lists."""
        columns = {key: [item[key] for item in batch] for key in batch[0]}
        return {
            key: values if key == "annotations" or any(value is None for value in values)
            else default_collate(values)
            for key, values in columns.items()
        }

    # ---- layouts and names

    @property
    def no_classes(self) -> int:
        """Categories that the tokens have room for."""
        return self.no_object_classes or len(self.categories)

    @property
    def conditional_builders(self) -> dict[str, ObjectsCenterPointsConditionalBuilder]:
        """The builders of layouts by the key that items hold them under."""
        if self._builders is None:
            arguments = (
                self.no_classes, self.max_objects_per_image, self.no_tokens, self.encode_crop,
                self.use_group_parameter, self.use_additional_parameters,
            )
            self._builders = {key: builder(*arguments) for key, builder in BUILDERS.items()}
        return self._builders

    def plot_conditionals(self, key: str, tokens: Tensor, figure_size: tuple[int, int]) -> Tensor:
        """Draw layouts (B, M) of the kind `key` as (B, 3, height, width) in [-1, 1], with category names."""
        builder = self.conditional_builders[key]
        return builder.plot_batch(tokens, self.label_for_plot, figure_size)

    def label_for_plot(self, category_no: int) -> str:
        """Return a category's name, or its number where there is no such category (sampled layouts)."""
        if category_no < len(self.category_ids):
            return self.get_textual_label_for_category_no(category_no)
        return str(category_no)

    def get_image_id(self, no: int) -> str:
        return self.image_ids[no]

    def get_annotation(self, image_id: str) -> list[Annotation]:
        return self.annotations[image_id]

    def get_textual_label_for_category_id(self, category_id: str) -> str:
        return self.categories[category_id].name

    def get_textual_label_for_category_no(self, category_no: int) -> str:
        return self.categories[self.get_category_id(category_no)].name

    def get_category_number(self, category_id: str) -> int:
        return self.category_number[category_id]

    def get_category_id(self, category_no: int) -> str:
        return self.category_ids[category_no]
