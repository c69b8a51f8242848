"""Images with label maps: what S-FLCKR, ADE20K and COCO have in common.

H W pixels of the crop, L labels. A label map is an 8-bit PNG of ids; items hold it one-hot, (H, W, L)
float32, or as ids, (H, W), which take 4 L times less memory.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taming.data.base import FaultTolerantDataset
from taming.data.files.images import read_transformed
from taming.data.files.label_maps import check_same_size, encode_ids, read_ids, validate_ids
from taming.data.files.lists import check_some_exist
from taming.data.transforms.joint import JointParams, Size

MASK = ".png"  # extension of label maps


def with_extension(names: Sequence[str], extension: str = MASK) -> list[str]:
    """Return file names with another extension."""
    return [os.path.splitext(name)[0] + extension for name in names]


class SegmentedImages(FaultTolerantDataset):
    """Items {"image": (H, W, 3) float32 in [-1, 1], "segmentation": see below, and one value per label}.

    "segmentation" is one-hot, (H, W, n_labels) float32, or with `segmentation_ids` the ids themselves, (H,
    W), uint8 where n_labels <= 256. An image that cannot be read, a label map of another size, and ids
    outside 0 .. n_labels - 1 make a bad sample.

    Args:
        labels: lists of one length by key; "file_path_" and "segmentation_path_" (or `mask_key`) name the
            files.
        size, random_crop: see FaultTolerantDataset.
        n_labels: number of labels.
        shift_segmentation: add 1 to the ids of the files; 255, unlabeled, becomes 0.
        segmentation_ids: return ids instead of one-hot vectors.
        source: the list that names the files, for messages.
        options: see FaultTolerantDataset.

    Raises:
        FileNotFoundError: none of the files exists.
    """

    image_key, mask_key = "file_path_", "segmentation_path_"

    def __init__(
        self,
        labels: Mapping[str, Sequence[Any]],
        size: Size = None,
        random_crop: bool | None = None,
        *,
        n_labels: int,
        shift_segmentation: bool = False,
        segmentation_ids: bool = False,
        source: str | os.PathLike = "the list",
        **options: Any,
    ) -> None:
        super().__init__(size, random_crop, **options)
        self.labels = dict(labels)
        self.n_labels = n_labels
        self.shift_segmentation = shift_segmentation
        self.segmentation_ids = segmentation_ids
        for key in (self.image_key, self.mask_key):
            check_some_exist(self.labels[key], source)

    def __len__(self) -> int:
        return len(self.labels[self.image_key])

    def load_sample(self, index: int) -> dict[str, Any]:
        item = {key: values[index] for key, values in self.labels.items()}
        return item | self.load(item[self.image_key], item[self.mask_key])

    def load(self, image_path: str, segmentation_path: str) -> dict[str, Any]:
        """Read an image and its label map into "image", "segmentation", and "coord" if it is asked for."""
        pixels, params = read_transformed(image_path, self.transform)
        segmentation = self.read_segmentation(segmentation_path, params)
        return self.image_item(pixels, params) | {"segmentation": segmentation}

    def preprocess_image(self, image_path: str, segmentation_path: str) -> tuple[np.ndarray, np.ndarray]:
        """Return "image" and "segmentation" of `load`; the call of 2021."""
        item = self.load(image_path, segmentation_path)
        return item["image"], item["segmentation"]

    def read_segmentation(self, path: str, params: JointParams) -> np.ndarray:
        """Read a label map, check it, and transform it as its image: "segmentation" of an item."""
        ids = read_ids(path)
        check_same_size("segmentation", path, ids, params)
        ids = params.mask(validate_ids(ids, path, self.n_labels, self.shift_segmentation))
        return encode_ids(ids, self.n_labels, self.segmentation_ids)
