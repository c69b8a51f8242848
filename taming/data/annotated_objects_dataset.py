"""Images with annotated objects, and their layouts as tokens: what COCO and Open Images have in common.

H W pixels, M tokens of a layout. A box is (x0, y0, width, height) in fractions of the image's sides, 0..1.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, Resize

from taming.data.base import FaultTolerantDataset
from taming.data.conditional_builder.objects_bbox import BUILDERS
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
    ResizeToCover,
)
from taming.data.transforms.joint import check_size
from taming.data.utils import custom_collate
from taming.images import from_uint8
from taming.parameters import PositiveInt, Probability

logger = logging.getLogger(__name__)

CROP_METHODS = ("none", "center", "random-1d", "random-2d")
CROPS = (CenterCropReturnCoordinates, Random2dCropReturnCoordinates, RandomCrop1dReturnCoordinates)
OWN_KEYS = ("image", "image_path", "file_path_", "crop_bbox", "flipped", "annotations", *BUILDERS)
LAST_CATEGORY = "/m/01s55n"  # suitcases joined the published Open Images models last; numbers must not change


class AnnotatedObjectsDataset(FaultTolerantDataset):
    """Images with their objects. Items hold those of `keys`, or everything where that is empty:

    "image" (H, W, 3), float32 in [-1, 1]; "objects_bbox" and "objects_center_points", the layout as int64
    (M,); "annotations", a list of Annotation for the whole image; "crop_bbox", the part that is shown;
    "flipped", whether it is mirrored; "image_path" and "file_path_"; and what the data set says about an
    image ("file_name", ...). Without "image" no image is read, cropped or mirrored.

    Random numbers come from the global generators of torch (crops, flips) and python (the order of objects in
    a layout). A subclass sets `categories`, calls `filter_categories` and `setup_category_id_and_number`,
    sets `annotations` and `image_ids`, and calls `clean_up_annotations_and_image_descriptions`; `paths` holds
    its files by name.

    Args:
        data_path: folder of the data set, as it was published.
        split: "train", "validation" or, for Open Images, "test".
        keys: what items hold.
        target_image_size: pixels of a side, or [height, width].
        min_object_area: smaller boxes are left out; a fraction of the image, 0..1.
        min_objects_per_image, max_objects_per_image: images with fewer or more objects (of the areas and
            categories that are left) are left out.
        crop_method: "none" (resize without keeping proportions), "center", "random-1d" (a crop as large as
            possible, at a random position) or "random-2d" (a crop of at least target_image_size, at a random
            position and scale).
        random_flip: mirror images at random, half of them.
        no_tokens: vocabulary of the layouts.
        use_group_parameter, encode_crop: see ObjectsCenterPointsConditionalBuilder.
        category_allow_list_target: names of the categories to keep: a text file, one name a line; or
            `taming.data.open_images_helper.top_300_classes_plus_coco_compatibility` (see there).
        category_mapping_target: category ids to be read as other ones: a text file, one `from,to` a line; or
            `taming.data.open_images_helper.open_images_unify_categories_for_coco`.
        no_object_classes: categories that the tokens have room for; as many as there are by default.
        max_bad_fraction: see FaultTolerantDataset.

    Raises:
        FileNotFoundError: a file or folder of the data set is missing.
        ValueError: a broken annotation file, an unknown key or crop method, or no image left.
    """

    collate_fn = staticmethod(custom_collate)

    def __init__(
        self, data_path: str | os.PathLike, split: SplitType, keys: Sequence[str],
        target_image_size: int | Sequence[int], min_object_area: float, min_objects_per_image: int,
        max_objects_per_image: int, crop_method: CropMethodType | None, random_flip: bool,
        no_tokens: PositiveInt, use_group_parameter: bool, encode_crop: bool,
        category_allow_list_target: str = "", category_mapping_target: str = "",
        no_object_classes: int | None = None, *, max_bad_fraction: Probability = 0.01,
    ) -> None:
        super().__init__(max_bad_fraction=max_bad_fraction)
        self.data_path, self.split, self.keys = data_path, split, list(keys)
        self.target_image_size = target_image_size
        self.min_object_area = min_object_area
        self.min_objects_per_image = min_objects_per_image
        self.max_objects_per_image = max_objects_per_image
        self.crop_method: CropMethodType = "none" if crop_method is None else crop_method
        self.random_flip = random_flip
        self.no_tokens, self.no_object_classes = no_tokens, no_object_classes
        self.use_group_parameter, self.use_additional_parameters = use_group_parameter, False
        self.encode_crop = encode_crop
        self.annotations: dict[str, list[Annotation]] = {}
        self.image_descriptions: dict[str, ImageDescription] = {}
        self.categories: dict[str, Category] = {}
        self.category_ids: list[str] = []
        self.category_number: dict[str, int] = {}
        self.image_ids: list[str] = []
        self._conditional_builders: dict[str, ObjectsCenterPointsConditionalBuilder] | None = None
        self.transform_functions = self.setup_transform(target_image_size, self.crop_method, random_flip)
        self.paths = self.build_paths(data_path)
        self.category_allow_list = load_allow_list(category_allow_list_target)
        self.category_mapping = load_mapping(category_mapping_target)

    # ---- what a subclass implements

    def get_path_structure(self) -> dict[str, str]:
        """Return the files and folders of this split, relative to data_path, by name; "files": the images."""
        raise NotImplementedError

    def get_image_path(self, image_id: str) -> Path:
        """Return the file of an image."""
        raise NotImplementedError

    def get_image_description(self, image_id: str) -> dict[str, Any]:
        """Return what the data set says about an image, under the keys of items."""
        raise NotImplementedError

    def most_frequent_categories(self, wanted: MostFrequent) -> set[str]:
        """Return the names of the categories of an allow-list by frequency."""
        raise ValueError(f"{type(self).__name__} counts no boxes: give category_allow_list_target a file")

    # ---- building

    def build_paths(self, top_level: str | os.PathLike) -> dict[str, Path]:
        """Return the files of this split by name; all must exist."""
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
        target_image_size: int | Sequence[int], crop_method: CropMethodType, random_flip: bool
    ) -> list[Callable[[Tensor], Any]]:
        """Return the steps from an image (3, h, w) to one of the target size; see `image_transform`."""
        size = check_size("target_image_size", target_image_size)
        if size is None:
            raise ValueError(f"target_image_size must be a number of pixels, got {target_image_size!r}")
        if crop_method not in CROP_METHODS:
            raise ValueError(f"crop_method must be one of {', '.join(CROP_METHODS)}, got {crop_method!r}")
        exact = Resize(list(size), InterpolationMode.BICUBIC, antialias=True)
        steps: list[Callable[[Tensor], Any]] = {
            "none": [exact],
            "center": [ResizeToCover(size), CenterCropReturnCoordinates(size)],
            "random-1d": [ResizeToCover(size), RandomCrop1dReturnCoordinates(size)],
            "random-2d": [Random2dCropReturnCoordinates(size), exact],
        }[crop_method]
        return steps + ([RandomHorizontalFlipReturn()] if random_flip else [])

    def filter_categories(self) -> None:
        """Leave out the categories that are not allowed, and those that are mapped to others."""
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
        """Leave out small objects, then images with too few or too many objects."""
        large = {
            key: [a for a in annotations if a.area > min_object_area]
            for key, annotations in all_annotations.items()
        }
        return {k: v for k, v in large.items() if min_objects_per_image <= len(v) <= max_objects_per_image}

    def set_annotations(self, annotations: Mapping[str, Sequence[Annotation]]) -> None:
        """Choose the images by their objects, and check that there are any, and that layouts fit them."""
        self.annotations = self.filter_object_number(
            annotations, self.min_object_area, self.min_objects_per_image, self.max_objects_per_image
        )
        if not self.annotations:
            sizes = [len(objects) for objects in annotations.values()]
            raise ValueError(
                f"no image is left of {len(sizes)} annotated ones in {self.data_path} ({self.split}): they "
                f"have {min(sizes, default=0)} to {max(sizes, default=0)} objects of {len(self.categories)} "
                f"categories, wanted are {self.min_objects_per_image} to {self.max_objects_per_image} of an "
                f"area above {self.min_object_area}: change min_objects_per_image, max_objects_per_image, "
                "min_object_area or the categories"
            )
        logger.info("%s (%s): %d of %d annotated images have a suitable number of objects",
                    self.data_path, self.split, len(self.annotations), len(annotations))
        self.image_ids = list(self.annotations)
        self.clean_up_annotations_and_image_descriptions()

    def clean_up_annotations_and_image_descriptions(self) -> None:
        """Keep the images of `image_ids` that exist, and check what items and layouts are asked for."""
        self.image_ids = self._existing_images(self.image_ids)
        self.annotations = {key: list(self.annotations[key]) for key in self.image_ids}
        self.image_descriptions = {
            key: self.image_descriptions[key] for key in self.image_ids if key in self.image_descriptions
        }
        known = (*OWN_KEYS, *self.get_image_description(self.image_ids[0]))
        unknown = [key for key in self.keys if key not in known]
        if unknown:
            raise ValueError(f"unknown keys {', '.join(unknown)}: items can hold {', '.join(known)}")
        if self.no_classes < len(self.categories):
            raise ValueError(
                f"no_object_classes={self.no_classes} is less than the {len(self.categories)} categories of "
                f"{self.data_path}: raise it, or allow fewer categories"
            )
        if self._wants(*BUILDERS):
            assert self.conditional_builders  # building them checks the vocabulary

    def _existing_images(self, image_ids: Iterable[str]) -> list[str]:
        """Return the ids of images that exist; the others are counted and reported."""
        folders: dict[Path, set[str]] = {}  # one listing is faster than a million questions
        missing, existing = [], []
        for image_id in image_ids:
            path = self.get_image_path(image_id)
            if path.parent not in folders:
                folders[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if path.name in folders[path.parent]:
                existing.append(image_id)
            else:
                missing.append(str(path))
        if missing:
            shown = "\n  ".join(missing[:5])
            total = len(missing) + len(existing)
            message = f"{len(missing)} of {total} annotated images do not exist. The first:\n  {shown}"
            if not existing:
                raise ValueError(f"no image is left in {self.data_path}: {message}")
            logger.warning("%s", message)
        return existing

    # ---- items

    def __len__(self) -> int:
        return len(self.image_ids)

    def load_sample(self, index: int) -> dict[str, Any]:
        image_id = self.get_image_id(index)
        path, annotations = str(self.get_image_path(image_id)), self.get_annotation(image_id)
        crop_bbox, flipped = FULL_CROP, False
        item: dict[str, Any] = {"image_path": path, "file_path_": path, "annotations": annotations}
        if self._wants("image"):
            crop_bbox, flipped, image = self.image_transform(self._read(path, image_id))
            item["image"] = image.permute(1, 2, 0).contiguous().numpy()  # (H, W, 3)
        item |= {"crop_bbox": crop_bbox, "flipped": flipped} | self.get_image_description(image_id)
        for key, builder in self.conditional_builders.items() if self._wants(*BUILDERS) else ():
            if self._wants(key):
                item[key] = builder.build(annotations, crop_bbox, flipped)
        return {key: item[key] for key in self.keys} if self.keys else item

    @staticmethod
    def load_image_from_disk(path: str | os.PathLike) -> PIL.Image.Image:
        """Read an image file of any mode as an RGB Pillow image; see taming.data.files.images.read_image."""
        return PIL.Image.fromarray(read_image(path))

    def _read(self, path: str, image_id: str) -> Tensor:
        """Read an image (3, h, w), uint8, that has the proportions of its description.

        Raises:
            BadImage: it cannot be read, or has others.
        """
        pixels = torch.tensor(read_image(path)).permute(2, 0, 1)  # (3, h, w) uint8
        if description := self.image_descriptions.get(image_id):
            (height, width), (width_said, height_said) = pixels.shape[1:], description.original_size
            if abs(math.log(width * height_said / (height * width_said))) > 0.05:  # a resized copy is fine
                raise BadImage(
                    f"{path} is {width}x{height} pixels (width x height), but its annotations are "
                    f"for {width_said}x{height_said}: boxes would not fit it"
                )
        return pixels

    def image_transform(self, x: Tensor) -> tuple[BoundingBox, bool, Tensor]:
        """Turn pixels (3, h, w) uint8 into (the part shown, whether mirrored, (3, H, W) in [-1, 1])."""
        crop_bbox, flipped = FULL_CROP, False
        for step in self.transform_functions:
            if isinstance(step, CROPS):
                crop_bbox, x = step(x)
            elif isinstance(step, RandomHorizontalFlipReturn):
                flipped, x = step(x)
            else:
                x = step(x)
        return crop_bbox, flipped, from_uint8(x)

    def _wants(self, *keys: str) -> bool:
        return not self.keys or any(key in self.keys for key in keys)

    # ---- layouts and names

    @property
    def no_classes(self) -> int:
        """Categories that the tokens have room for."""
        return self.no_object_classes or len(self.categories)

    @property
    def conditional_builders(self) -> dict[str, ObjectsCenterPointsConditionalBuilder]:
        """The builders of layouts by the key that items hold them under."""
        if self._conditional_builders is None:
            arguments = (
                self.no_classes, self.max_objects_per_image, self.no_tokens, self.encode_crop,
                self.use_group_parameter, self.use_additional_parameters,
            )
            self._conditional_builders = {key: builder(*arguments) for key, builder in BUILDERS.items()}
        return self._conditional_builders

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
