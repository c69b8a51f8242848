"""CIFAR-10 and STL-10 through torchvision, as items of our form. H W pixels."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchvision import datasets

from taming.data.transforms.joint import JointTransform, Size
from taming.images import from_uint8

Root = str | os.PathLike


class _Labelled(Dataset):
    """Items "image" (H, W, 3) float32 in [-1, 1], and unless there are no labels "class_label" (int) and
    "human_label".
    """

    def __init__(
        self,
        open_set: Callable[[bool], Any],
        root: Root,
        size: Size,
        random_crop: bool,
        flip: bool,
        crop_size: Size,
        download: bool,
        labelled: bool = True,
    ) -> None:
        self.labelled = labelled
        try:
            self.data = open_set(download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{type(self).__name__} is not in {os.fspath(root)}, or broken ({error}): put its files "
                "there, or set download: true"
            ) from error
        self.class_names = list(self.data.classes)
        self.transform = JointTransform(size, crop_size, random_crop, flip=flip)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        picture, label = self.data[index % len(self)]
        pixels = np.asarray(picture)
        item = {"image": from_uint8(self.transform.get_params(*pixels.shape[:2]).image(pixels))}
        if not self.labelled:
            return item
        return item | {"class_label": int(label), "human_label": self.class_names[label]}


class CIFAR10(_Labelled):
    """CIFAR-10, ten classes of 32 x 32 pixels.

    Args:
        root: folder in which `cifar-10-batches-py` lies.
        split: "train" or "validation" (its test images).
        size: smallest side in pixels after resizing; None for 32.
        random_crop: crop anywhere, else in the centre; matters with `crop_size`.
        flip: mirror every second picture, drawn at random.
        crop_size: pixels; `size` by default.
        download: fetch the files if they are missing.

    Raises:
        FileNotFoundError: the files are missing.
        ValueError: an unknown split.
    """

    def __init__(
        self,
        root: Root = "data/cifar10",
        split: str = "train",
        size: Size = None,
        *,
        random_crop: bool = False,
        flip: bool = False,
        crop_size: Size = None,
        download: bool = False,
    ) -> None:
        train = {"train": True, "validation": False}[_known(split, ("train", "validation"))]
        super().__init__(
            lambda fetch: datasets.CIFAR10(root, train=train, download=fetch), root, size, random_crop, flip,
            crop_size, download,
        )


class STL10(_Labelled):
    """STL-10, ten classes of 96 x 96 pixels, and 100,000 images without labels.

    Args:
        root: folder in which `stl10_binary` lies.
        split: "train", "validation" (its test images), or without labels "unlabeled" or
            "train+unlabeled".
        size: smallest side in pixels after resizing; None for 96.
        random_crop: crop anywhere, else in the centre; matters with `crop_size`.
        flip: mirror every second picture, drawn at random.
        crop_size: pixels; `size` by default.
        download: fetch the files if they are missing.

    Raises:
        FileNotFoundError: the files are missing.
        ValueError: an unknown split.
    """

    def __init__(
        self,
        root: Root = "data/stl10",
        split: str = "train",
        size: Size = None,
        *,
        random_crop: bool = False,
        flip: bool = False,
        crop_size: Size = None,
        download: bool = False,
    ) -> None:
        _known(split, ("train", "validation", "unlabeled", "train+unlabeled"))
        part = "test" if split == "validation" else split
        super().__init__(
            lambda fetch: datasets.STL10(root, split=part, download=fetch), root, size, random_crop, flip,
            crop_size, download, "unlabeled" not in split,
        )


def _known(split: str, splits: tuple[str, ...]) -> str:
    if split not in splits:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(splits)}")
    return split
