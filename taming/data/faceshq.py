"""Faces: CelebA-HQ (npy files or images), FFHQ, and both together.

Which images are for training stands in lists (`data/celebahqtrain.txt` and so on, as in 2021); without them a
fixed draw from the folder decides, see `splits.py`. H W pixels of the crop.
"""

import os
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from taming.data.base import ConcatDatasetWithIndex, NumpyPaths
from taming.data.files.lists import EXTENSIONS
from taming.data.splits import split_images
from taming.data.transforms.joint import Size

Path = str | os.PathLike


class FacesBase(Dataset):
    """The images of a split: items "image" (H, W, 3) float32 in [-1, 1] and "file_path_", or some of these.

    Args:
        size: smallest side in pixels after resizing, of which a square is cropped in the centre.
        keys: what items hold; by default everything.
        root: folder of the images.
        list_file: text file with one path a line, relative to `root`; see `splits.py` for the default.
        crop_size: pixels; `size` by default.
        random_crop: crop anywhere, else in the centre.
        coord: add "coord", (H, W, 1) float32: the place of each pixel in the whole picture; see ImagePaths.
        max_bad_fraction: share of unreadable images that is tolerated.
    """

    ROOT = ""
    SPLIT = "train"
    LISTS: dict[str, str] = {}  # the usual lists by split
    VALIDATION_SHARE = 0.1  # of a folder without lists

    def __init__(
        self,
        size: Size,
        keys: Sequence[str] | None = None,
        *,
        root: Path | None = None,
        list_file: Path | None = None,
        crop_size: Size = None,
        random_crop: bool = False,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        if not (root or self.ROOT):
            raise ValueError(f"{type(self).__name__} has no usual folder: give root")
        paths = split_images(
            root or self.ROOT, self.SPLIT, list_file, self.LISTS, self.VALIDATION_SHARE, (*EXTENSIONS, ".npy")
        )
        self.data = NumpyPaths(
            paths, size, random_crop, crop_size=crop_size, coord=coord, max_bad_fraction=max_bad_fraction
        )
        self.keys = keys
        if unknown := set(keys or ()) - {"image", "file_path_", "coord"}:
            raise ValueError(f"keys name {', '.join(sorted(unknown))}; choose from image, file_path_, coord")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        return item if self.keys is None else {key: item[key] for key in self.keys}


class CelebAHQTrain(FacesBase):
    """The training images of CelebA-HQ; see FacesBase."""

    ROOT = "data/celebahq"
    LISTS = {"train": "data/celebahqtrain.txt", "validation": "data/celebahqvalidation.txt"}
    VALIDATION_SHARE = 1 / 6  # 5,000 of 30,000


class CelebAHQValidation(CelebAHQTrain):
    """The validation images of CelebA-HQ; see FacesBase."""

    SPLIT = "validation"


class FFHQTrain(FacesBase):
    """The training images of FFHQ; see FacesBase."""

    ROOT = "data/ffhq"
    LISTS = {"train": "data/ffhqtrain.txt", "validation": "data/ffhqvalidation.txt"}
    VALIDATION_SHARE = 1 / 7  # 10,000 of 70,000


class FFHQValidation(FFHQTrain):
    """The validation images of FFHQ; see FacesBase."""

    SPLIT = "validation"


class FacesHQTrain(Dataset):
    """CelebA-HQ and FFHQ: items as FacesBase, and "class", 0 for CelebA-HQ and 1 for FFHQ.

    Args:
        size: smallest side in pixels after resizing.
        keys: what items hold besides "class" and "coord"; by default everything.
        crop_size: pixels, cropped anywhere (in the centre for validation); `size` by default.
        coord: add "coord", (H, W, 1) float32 in [0, 1): the place of each pixel in the resized picture.
        celebahq_root: folder of CelebA-HQ.
        ffhq_root: folder of FFHQ.
        celebahq_list: text file with one path a line, relative to the folder; see `splits.py` for the
            default.
        ffhq_list: the same for FFHQ.
        max_bad_fraction: share of unreadable images that is tolerated.
    """

    PARTS: tuple[type[FacesBase], type[FacesBase]] = (CelebAHQTrain, FFHQTrain)
    RANDOM_CROP = True

    def __init__(
        self,
        size: Size,
        keys: Sequence[str] | None = None,
        crop_size: Size = None,
        coord: bool = False,
        *,
        celebahq_root: Path | None = None,
        ffhq_root: Path | None = None,
        celebahq_list: Path | None = None,
        ffhq_list: Path | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        if keys is not None and coord:
            keys = [*keys, *(["coord"] if "coord" not in keys else [])]
        celebahq, ffhq = self.PARTS
        common = {
            "crop_size": crop_size, "random_crop": self.RANDOM_CROP and crop_size is not None, "coord": coord,
            "max_bad_fraction": max_bad_fraction,
        }
        self.data = ConcatDatasetWithIndex([
            celebahq(size, keys, root=celebahq_root, list_file=celebahq_list, **common),
            ffhq(size, keys, root=ffhq_root, list_file=ffhq_list, **common),
        ])
        self.coord = coord

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, number = self.data[index]
        return item | {"class": number}


class FacesHQValidation(FacesHQTrain):
    """The validation images of both, cropped in the centre; see FacesHQTrain."""

    PARTS = (CelebAHQValidation, FFHQValidation)
    RANDOM_CROP = False
