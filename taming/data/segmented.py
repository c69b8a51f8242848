"""Pictures with label maps: what S-FLCKR, ADE20K and COCO have in common.

H W pixels of the crop, L labels. A label map is an 8-bit PNG of ids; items hold it one-hot, (H, W, L)
float32, or as ids, (H, W), which are four L times smaller on their way to the device.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from taming.data.base import BadSample, Samples, check_some_exist, names_file, read_placed
from taming.data.transforms.joint import PairedTransform, Placement
from taming.images import from_uint8

UNLABELED = 255  # in the files of COCO-Stuff; one more, in 8 bits, is 0
ID_MODES = ("L", "P", "1", "I", "I;16")  # of Pillow; other pictures have colours


def read_ids(path: str | os.PathLike) -> np.ndarray:
    """Read a label map: (H, W), uint8, or int32 where the file has 16 bits; of a palette image the indices.

    Raises:
        BadSample: the file is no image, or has colours instead of ids.
    """
    with names_file(path, "segmentation", BadSample), Image.open(path) as image:
        image.load()
    if image.mode not in ID_MODES:
        raise BadSample(
            f"segmentation {path} has mode {image.mode}, but a label map has one channel of ids (mode L or "
            "P): convert colours to ids"
        )
    ids = np.asarray(image)
    return ids.astype(np.int32 if ids.dtype.itemsize > 1 else np.uint8, copy=False)


def check_same_size(what: str, path: str, values: np.ndarray, placement: Placement) -> None:
    """Raise BadSample if a map (H, W, ...) that belongs to a picture has another size than the picture."""
    if values.shape[:2] != placement.source:
        raise BadSample(
            f"{what} {path} has {values.shape[0]}x{values.shape[1]} pixels (height x width), its image "
            f"{placement.source[0]}x{placement.source[1]}: both must be of one size"
        )


def checked_ids(ids: np.ndarray, name: object, n_labels: int, shift: bool = False) -> np.ndarray:
    """Return the ids of a label map, with `shift` one more and 0 for UNLABELED, none of them >= n_labels.

    Raises:
        BadSample: there are others; `name` says whose.
    """
    if shift:
        unlabeled = ids == UNLABELED
        ids = ids + 1
        ids[unlabeled] = 0
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= n_labels:
        raise BadSample(
            f"segmentation {name} holds label ids from {ids.min()} to {ids.max()}{', shifted by 1' * shift}, "
            f"but n_labels={n_labels} allows 0 to {n_labels - 1}: repair the file, or, if the data set takes "
            "them, raise n_labels, or set shift_segmentation where 255 means unlabeled"
        )
    return ids


def encode_ids(ids: np.ndarray, n_labels: int, as_ids: bool) -> np.ndarray:
    """Make ids (H, W) one-hot, (H, W, L) float32, or with `as_ids` small, uint8 where n_labels <= 256."""
    if as_ids:
        return ids.astype(np.uint8 if n_labels <= 256 else np.int32)
    onehot = np.zeros((*ids.shape, n_labels), dtype=np.float32)
    np.put_along_axis(onehot, ids[..., None].astype(np.int64), 1.0, axis=-1)
    return onehot  # (H, W, L)


class SegmentedImages(Samples):
    """Items {"image": (H, W, 3) float32 in [-1, 1], "segmentation": see below, and one value per label}.

    "segmentation" is one-hot, (H, W, n_labels) float32, or with `segmentation_ids` the ids themselves, (H,
    W), uint8 where n_labels <= 256. An image that cannot be read, a label map of another size, and ids
    outside of 0 .. n_labels - 1 make a bad sample, which is skipped as Samples says.

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
        transform: PairedTransform,
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
        pixels, placement = read_placed(item[self.image_key], self.transform)
        item["image"] = from_uint8(pixels)  # (H, W, 3)
        item["segmentation"] = self.encode(self.read_mask(item[self.mask_key], placement))
        return item

    def read_mask(self, path: str, placement: Placement) -> np.ndarray:
        """Read the ids (H, W) of a label map, moved like its picture, and check them."""
        ids = read_ids(path)
        check_same_size("segmentation", path, ids, placement)
        return placement.mask(checked_ids(ids, path, self.n_labels, self.shift_segmentation))

    def encode(self, ids: np.ndarray) -> np.ndarray:
        """Turn ids (H, W) into what items hold."""
        return encode_ids(ids, self.n_labels, self.segmentation_ids)
