"""CIFAR-10 and STL-10 through torchvision, as items of our form. H W pixels."""

import os
from typing import Any

import numpy as np
from torchvision import datasets

from taming.data.base import FaultTolerantDataset
from taming.data.transforms.joint import Size


class _TorchvisionImages(FaultTolerantDataset):
    """A labelled data set of torchvision.

    Items hold "image" (H, W, 3) float32 in [-1, 1], and, unless the split has no labels, "class_label" (int)
    and "human_label".

    Args:
        root: folder of the files; by default ROOT of the class.
        split: one of SPLITS of the class; "validation" is torchvision's test set.
        size: see FaultTolerantDataset.
        download: fetch the files if they are missing.
        options: see FaultTolerantDataset.

    Raises:
        FileNotFoundError: the files are missing or broken.
        ValueError: an unknown split.
    """

    ROOT = ""
    SPLITS: dict[str, dict[str, Any]]  # the arguments of SOURCE for each split
    SOURCE: Any

    def __init__(
        self,
        root: str | os.PathLike | None = None,
        split: str = "train",
        size: Size = None,
        *,
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(size, **options)
        if split not in self.SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(self.SPLITS)}")
        root = root or self.ROOT
        try:
            self.data = self.SOURCE(root, download=download, **self.SPLITS[split])
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{type(self).__name__} is not in {os.fspath(root)}, or broken ({error}): put its files "
                "there, or set download: true"
            ) from error
        self.labelled = "unlabeled" not in split
        self.class_names = list(self.data.classes)

    def __len__(self) -> int:
        return len(self.data)

    def load_sample(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        pixels = np.asarray(image)
        params = self.transform.get_params(*pixels.shape[:2])
        item = self.image_item(params.image(pixels), params)
        labels = {"class_label": int(label), "human_label": self.class_names[label]} if self.labelled else {}
        return item | labels


class CIFAR10(_TorchvisionImages):
    """CIFAR-10, ten classes of 32 x 32 pixels, in `cifar-10-batches-py`; see its base class."""

    ROOT = "data/cifar10"
    SPLITS = {"train": {"train": True}, "validation": {"train": False}}
    SOURCE = datasets.CIFAR10


class STL10(_TorchvisionImages):
    """STL-10, ten classes of 96 x 96 pixels, and 100,000 images without labels, in `stl10_binary`."""

    ROOT = "data/stl10"
    SPLITS = {
        split: {"split": "test" if split == "validation" else split}
        for split in ("train", "validation", "unlabeled", "train+unlabeled")
    }
    SOURCE = datasets.STL10
