"""Pictures with label maps: what S-FLCKR, ADE20K and COCO have in common.

H W pixels of the crop, L labels. A label map is an 8-bit PNG of ids; items hold it one-hot, (H, W, L)
float32, or as ids, (H, W), which are four L times smaller on their way to the device.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taming.data.base import FaultTolerantDataset
from taming.data.files.images import read_transformed
from taming.data.files.label_maps import check_same_size, encode_ids, read_ids, validate_ids
from taming.data.files.lists import check_some_exist
from taming.data.transforms.joint import JointParams, JointTransform
from taming.images import from_uint8


class SegmentedImages(FaultTolerantDataset):
    """Items {"image": (H, W, 3) float32 in [-1, 1], "segmentation": see below, and one value per label}.

    "segmentation" is one-hot, (H, W, n_labels) float32, or with `segmentation_ids` the ids themselves, (H,
    W), uint8 where n_labels <= 256. An image that cannot be read, a label map of another size, and ids
    outside of 0 .. n_labels - 1 make a bad sample, which is skipped as FaultTolerantDataset says.

    Args:
        labels: lists of one length by key; "file_path_" and "segmentation_path_" (or `mask_key`) name the
            files.
        transform: where both are resized and cropped to.
        n_labels: number of labels.
        shift_segmentation: add 1 to the ids of the files; 255, unlabeled, becomes 0.
        segmentation_ids: give ids instead of one-hot vectors.
        source: the list that names the files, for messages.
        max_bad_fraction: share of bad samples that is tolerated.
    """

    image_key, mask_key = "file_path_", "segmentation_path_"

    def __init__(
        self,
        labels: Mapping[str, Sequence[Any]],
        transform: JointTransform,
        *,
        n_labels: int,
        shift_segmentation: bool = False,
        segmentation_ids: bool = False,
        source: str | os.PathLike = "the list",
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(max_bad_fraction)
        self.labels = dict(labels)
        self.transform = transform
        self.n_labels = n_labels
        self.shift_segmentation = shift_segmentation
        self.segmentation_ids = segmentation_ids
        for key in (self.image_key, self.mask_key):
            check_some_exist(self.labels[key], source)

    def __len__(self) -> int:
        return len(self.labels[self.image_key])

    def load_sample(self, index: int) -> dict[str, Any]:
        item = {key: values[index] for key, values in self.labels.items()}
        pixels, params = read_transformed(item[self.image_key], self.transform)
        item["image"] = from_uint8(pixels)  # (H, W, 3)
        item["segmentation"] = self.encode(self.read_mask(item[self.mask_key], params))
        return item

    def read_mask(self, path: str, params: JointParams) -> np.ndarray:
        """Read the ids (H, W) of a label map, moved like its picture, and check them."""
        ids = read_ids(path)
        check_same_size("segmentation", path, ids, params)
        return params.mask(validate_ids(ids, path, self.n_labels, self.shift_segmentation))

    def encode(self, ids: np.ndarray) -> np.ndarray:
        """Turn ids (H, W) into what items hold."""
        return encode_ids(ids, self.n_labels, self.segmentation_ids)
