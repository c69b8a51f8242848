"""Label maps as PNG files of ids. H W pixels, L labels."""

import os
from typing import IO

import numpy as np

from taming.data.files.errors import BadSample, file_errors
from taming.data.files.images import decode, open_image
from taming.data.transforms.joint import JointParams

UNLABELED = 255  # in the files of COCO-Stuff; one more, in 8 bits, is 0
ID_MODES = ("L", "P", "1", "I", "I;16")  # of Pillow; other images have colours


def read_ids(file: str | os.PathLike | IO[bytes]) -> np.ndarray:
    """Read a label map: (H, W), uint8, or int32 where the file has 16 bits; of a palette image the indices.

    Raises:
        BadSample: the file is not an image, too large, or has colours instead of ids.
    """
    with file_errors(file, "segmentation", BadSample), open_image(file) as image:
        ids, mode = np.asarray(decode(image)), image.mode
    if mode not in ID_MODES:
        raise BadSample(
            f"segmentation {file} has mode {mode}, but a label map has one channel of ids (mode L or P): "
            "convert colours to ids"
        )
    return ids.astype(np.int32 if ids.dtype.itemsize > 1 else np.uint8, copy=False)


def check_same_size(what: str, path: str, values: np.ndarray, params: JointParams) -> None:
    """Raise BadSample if a map (H, W, ...) that belongs to an image has another size than the image."""
    if values.shape[:2] != params.source:
        raise BadSample(
            f"{what} {path} has {values.shape[0]}x{values.shape[1]} pixels (height x width), its image "
            f"{params.source[0]}x{params.source[1]}: both must be of one size"
        )


def validate_ids(ids: np.ndarray, name: object, n_labels: int, shift: bool = False) -> np.ndarray:
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
