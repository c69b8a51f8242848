"""ADE20K, 150 labels and 0 for unknown: the examples, and the whole set with its scene categories."""

import os
from collections.abc import Mapping
from typing import Any

from taming.data.base import merge_config
from taming.data.files.lists import find_images, read_lines
from taming.data.segmented import SegmentedImages
from taming.data.sflckr import SegmentationBase
from taming.data.transforms.joint import JointTransform, Size

N_LABELS = 151  # unknown and 150


class Examples(SegmentationBase):
    """The ADE20K examples; see SegmentationBase."""

    def __init__(
        self,
        size: Size = 256,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        *,
        data_csv: str | os.PathLike = "data/ade20k_examples.txt",
        data_root: str | os.PathLike = "data/ade20k_images",
        segmentation_root: str | os.PathLike = "data/ade20k_segmentations",
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            data_csv, data_root, segmentation_root, size, random_crop, interpolation, N_LABELS,
            segmentation_ids=segmentation_ids, max_bad_fraction=max_bad_fraction,
        )


class ADE20kBase(SegmentedImages):
    """A split of ADE20K: items "image", "segmentation" (see SegmentedImages), "scene_category", and paths.

    `data_root` holds `images/training/NAME.jpg`, `annotations/training/NAME.png`, the same for `validation`,
    and `sceneCategories.txt` with lines `NAME category`.

    Args:
        config: any of size, random_crop, interpolation and crop_size, which it overrides.
        size: smallest side in pixels after resizing.
        random_crop: crop anywhere, else in the centre.
        interpolation: of the images: nearest, bilinear, bicubic, area or lanczos.
        crop_size: pixels; `size` by default.
        data_root: see above.
        data_csv: text file with one path a line, such as `training/NAME.jpg`; by default
            `data/ade20k_train.txt` or `data/ade20k_test.txt` if that exists, else all of the split's folder.
        segmentation_ids: give ids (H, W) instead of one-hot vectors.
        max_bad_fraction: share of bad samples that is tolerated.

    Raises:
        FileNotFoundError: a list, the categories or all of the images do not exist.
        ValueError: an image has no scene category.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        crop_size: Size = None,
        *,
        data_root: str | os.PathLike = "data/ade20k_root",
        data_csv: str | os.PathLike | None = None,
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.split = self.get_split()
        settings = merge_config(
            self, config, size=size, random_crop=random_crop, interpolation=interpolation, crop_size=crop_size
        )
        source, names = self._names(data_root, data_csv)
        masks = [os.path.splitext(name)[0] + ".png" for name in names]
        super().__init__(
            {
                "relative_file_path_": names,
                "file_path_": [os.path.join(data_root, "images", name) for name in names],
                "relative_segmentation_path_": masks,
                "segmentation_path_": [os.path.join(data_root, "annotations", name) for name in masks],
                "scene_category": _scene_categories(os.path.join(data_root, "sceneCategories.txt"), names),
            },
            JointTransform(**settings),
            n_labels=N_LABELS, segmentation_ids=segmentation_ids, source=source,
            max_bad_fraction=max_bad_fraction,
        )

    def get_split(self) -> str:
        """Return "train" or "validation"."""
        raise NotImplementedError("use ADE20kTrain or ADE20kValidation")

    def _names(
        self, data_root: str | os.PathLike, data_csv: str | os.PathLike | None
    ) -> tuple[str | os.PathLike, list[str]]:
        """Return what names the images, and their names, relative to the folder `images`."""
        usual = {"train": "data/ade20k_train.txt", "validation": "data/ade20k_test.txt"}[self.split]
        if data_csv is None and not os.path.isfile(usual):
            images = os.path.join(data_root, "images")
            folder = os.path.join(images, {"train": "training"}.get(self.split, self.split))
            return folder, [os.path.relpath(path, images) for path in find_images(folder)]
        return data_csv or usual, read_lines(data_csv or usual, "image list")


class ADE20kTrain(ADE20kBase):
    """The training images, cropped anywhere by default; see ADE20kBase."""

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: Size = None,
        random_crop: bool = True,
        interpolation: str = "bicubic",
        crop_size: Size = None,
        *,
        data_root: str | os.PathLike = "data/ade20k_root",
        data_csv: str | os.PathLike | None = None,
        segmentation_ids: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            config, size, random_crop, interpolation, crop_size, data_root=data_root, data_csv=data_csv,
            segmentation_ids=segmentation_ids, max_bad_fraction=max_bad_fraction,
        )

    def get_split(self) -> str:
        return "train"


class ADE20kValidation(ADE20kBase):
    """The validation images, cropped in the centre by default; see ADE20kBase."""

    def get_split(self) -> str:
        return "validation"


def _scene_categories(file: str, names: list[str]) -> list[str]:
    """Look up the scene category of each image."""
    lines = read_lines(file, "list of scene categories")
    known = dict(line.split(maxsplit=1) for line in lines if len(line.split()) > 1)
    stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
    unknown = [stem for stem in stems if stem not in known]
    if unknown:
        raise ValueError(
            f"{file} has no category for {len(unknown)} of {len(names)} images, such as {unknown[0]}: get "
            "the sceneCategories.txt of the same release"
        )
    return [known[stem] for stem in stems]
