"""Faces: CelebA-HQ (npy files or images), FFHQ, and both together.

Lists say which images are for training (`data/celebahqtrain.txt` and so on, as in 2021); without them the
folder is split by names, see `splits.py`. H W pixels of the crop.
"""

import os
from collections.abc import Sequence
from typing import Any

from taming.data.base import ConcatDatasetWithIndex, DelegatingDataset, ImagePaths, NumpyPaths  # noqa: F401
from taming.data.files.lists import EXTENSIONS
from taming.data.splits import split_images
from taming.data.transforms.joint import Size

Path = str | os.PathLike


class FacesBase(DelegatingDataset):
    """The images of a split: items "image" (H, W, 3) float32 in [-1, 1] and "file_path_", or some of these.

    A subclass without NAME sets `data`, and perhaps `keys`, itself, as in 2021.

    Args:
        size: see FaultTolerantDataset.
        keys: what items hold; by default everything.
        root: folder of the images; by default data/NAME.
        list_file: text file with one path a line, relative to `root`; see `splits.py` for the default.
        options: see FaultTolerantDataset.
    """

    NAME = ""  # of the usual folder and lists, data/NAME and data/NAMEtrain.txt
    SPLIT = "train"
    VALIDATION_SHARE = 0.1  # of a folder without lists

    def __init__(
        self,
        size: Size = None,
        keys: Sequence[str] | None = None,
        *,
        root: Path | None = None,
        list_file: Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.keys = keys
        if unknown := set(keys or ()) - {"image", "file_path_", "coord"}:
            raise ValueError(f"keys name {', '.join(sorted(unknown))}; choose from image, file_path_, coord")
        if root or self.NAME:
            lists = {split: f"data/{self.NAME}{split}.txt" for split in ("train", "validation") if self.NAME}
            paths = split_images(
                root or f"data/{self.NAME}", self.SPLIT, list_file, lists, self.VALIDATION_SHARE,
                (*EXTENSIONS, ".npy"),
            )
            self.data = NumpyPaths(paths, size, **self.defaults(options))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        return item if self.keys is None else {key: item[key] for key in self.keys}


class CelebAHQTrain(FacesBase):
    """The training images of CelebA-HQ; see FacesBase."""

    NAME, VALIDATION_SHARE = "celebahq", 1 / 6  # 5,000 of 30,000


class CelebAHQValidation(CelebAHQTrain):
    """The validation images of CelebA-HQ; see FacesBase."""

    SPLIT = "validation"


class FFHQTrain(FacesBase):
    """The training images of FFHQ; see FacesBase."""

    NAME, VALIDATION_SHARE = "ffhq", 1 / 7  # 10,000 of 70,000


class FFHQValidation(FFHQTrain):
    """The validation images of FFHQ; see FacesBase."""

    SPLIT = "validation"


class FacesHQTrain(DelegatingDataset):
    """CelebA-HQ and FFHQ: items as FacesBase, and "class", 0 for CelebA-HQ and 1 for FFHQ.

    With `crop_size` images are cropped at random (in the centre for validation), else in the centre.

    Args:
        size, crop_size, coord: see FaultTolerantDataset.
        keys: what items hold besides "class" and "coord"; by default everything.
        celebahq_root, ffhq_root: folders of the images.
        celebahq_list, ffhq_list: text files with one path a line, relative to the folder; see `splits.py` for
            the default.
        options: see FaultTolerantDataset.
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
        **options: Any,
    ) -> None:
        if keys is not None and coord:
            keys = [*keys, *(["coord"] if "coord" not in keys else [])]
        options = {"random_crop": self.RANDOM_CROP and crop_size is not None, **options}
        celebahq, ffhq = (
            part(size, keys, root=root, list_file=list_file, crop_size=crop_size, coord=coord, **options)
            for part, root, list_file in zip(
                self.PARTS, (celebahq_root, ffhq_root), (celebahq_list, ffhq_list), strict=True
            )
        )
        self.data = ConcatDatasetWithIndex([celebahq, ffhq])
        self.coord = coord

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, number = self.data[index]
        return item | {"class": number}


class FacesHQValidation(FacesHQTrain):
    """The validation images of both, cropped in the centre; see FacesHQTrain."""

    PARTS = (CelebAHQValidation, FFHQValidation)
    RANDOM_CROP = False
