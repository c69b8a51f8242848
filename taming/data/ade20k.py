"""ADE20K, 150 labels and 0 for unknown: the examples, and the whole set with its scene categories."""

import os
from collections.abc import Mapping
from typing import Any

from taming.data import sflckr
from taming.data.base import merge_config
from taming.data.files.lists import find_images, read_lines
from taming.data.segmented import SegmentedImages, with_extension
from taming.data.transforms.joint import Size

N_LABELS = 151  # unknown and 150


class Examples(sflckr.Examples):
    """The ADE20K examples, by default in `data/ade20k_*`; see SegmentationBase."""

    NAME = "ade20k"
    N_LABELS = N_LABELS

    def __init__(self, size: Size = 256, *args: Any, **options: Any) -> None:
        super().__init__(size, *args, **options)


class ADE20kBase(SegmentedImages):
    """A split of ADE20K: items "image", "segmentation" (see SegmentedImages), "scene_category", and paths.

    `data_root` holds `images/training/NAME.jpg`, `annotations/training/NAME.png`, the same for `validation`,
    and `sceneCategories.txt` with lines `NAME category`.

    Args:
        config: any of size, random_crop, interpolation and crop_size, which it overrides.
        size, random_crop, interpolation, crop_size: see FaultTolerantDataset.
        data_root: see above.
        data_csv: text file with one path a line, such as `training/NAME.jpg`; by default
            `data/ade20k_train.txt` or `data/ade20k_test.txt` if that exists, else all of the split's folder.
        options: see SegmentedImages and FaultTolerantDataset.

    Raises:
        FileNotFoundError: a list, the categories or all of the images do not exist.
        ValueError: an image has no scene category.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        random_crop: bool | None = None,
        interpolation: str = "bicubic",
        crop_size: Size = None,
        *,
        data_root: str | os.PathLike = "data/ade20k_root",
        data_csv: str | os.PathLike | None = None,
        **options: Any,
    ) -> None:
        self.split = self.get_split()
        settings = merge_config(
            self, config, size=size, random_crop=random_crop, interpolation=interpolation, crop_size=crop_size
        )
        self.data_root = data_root
        self.data_csv, names = self._names(data_root, data_csv)
        self.image_paths = names
        file = os.path.join(data_root, "sceneCategories.txt")
        self.scene_categories = _scene_categories(file, names)
        masks = with_extension(names)
        super().__init__(
            {
                "relative_file_path_": names,
                "file_path_": [os.path.join(data_root, "images", name) for name in names],
                "relative_segmentation_path_": masks,
                "segmentation_path_": [os.path.join(data_root, "annotations", name) for name in masks],
                "scene_category": [self.scene_categories[stem] for stem in _stems(names)],
            },
            n_labels=N_LABELS, source=self.data_csv, **settings, **options,
        )

    def get_split(self) -> str:
        """Return "train" or "validation"."""
        raise NotImplementedError("use ADE20kTrain or ADE20kValidation")

    def _names(
        self, data_root: str | os.PathLike, data_csv: str | os.PathLike | None
    ) -> tuple[str | os.PathLike, list[str]]:
        """Return the list or folder that names the images, and their paths below the folder `images`."""
        usual = {"train": "data/ade20k_train.txt", "validation": "data/ade20k_test.txt"}[self.split]
        if data_csv is None and not os.path.isfile(usual):
            images = os.path.join(data_root, "images")
            folder = os.path.join(images, {"train": "training"}.get(self.split, self.split))
            return folder, [os.path.relpath(path, images) for path in find_images(folder)]
        return data_csv or usual, read_lines(data_csv or usual, "image list")


class ADE20kTrain(ADE20kBase):
    """The training images, cropped at random by default; see ADE20kBase."""

    RANDOM_CROP = True

    def get_split(self) -> str:
        return "train"


class ADE20kValidation(ADE20kBase):
    """The validation images, cropped in the centre by default; see ADE20kBase."""

    def get_split(self) -> str:
        return "validation"


def _stems(names: list[str]) -> list[str]:
    return [os.path.splitext(os.path.basename(name))[0] for name in names]


def _scene_categories(file: str, names: list[str]) -> dict[str, str]:
    """Read the scene categories by the stem of an image's name; each of `names` must have one."""
    lines = read_lines(file, "list of scene categories")
    known = dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)
    unknown = [stem for stem in _stems(names) if stem not in known]
    if unknown:
        raise ValueError(
            f"{file} has no category for {len(unknown)} of {len(names)} images, such as {unknown[0]}: get "
            "the sceneCategories.txt of the same release"
        )
    return known
