"""One image file into RGB pixels, and a list of image files into a data set.

H W pixels of the crop, h w pixels of the whole picture after resizing. Items are dicts of HWC float32 arrays
in [-1, 1].
"""

import bisect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from taming.data.files.errors import BadSample
from taming.data.files.images import read_npy, read_transformed
from taming.data.transforms.joint import JointParams, JointTransform, Size
from taming.images import from_uint8

logger = logging.getLogger(__name__)

Path = str | os.PathLike


class FaultTolerantDataset(Dataset):
    """A data set that goes on where single samples are bad; subclasses say how many there are, and load one.

    A bad sample is skipped with a warning: the next good one takes its place. When more than
    `max_bad_fraction` of them, and at least two, turn out bad, the data set raises. Bad samples are counted
    per copy of the data set, that is per loader process.

    Args:
        max_bad_fraction: share of bad samples that is tolerated.
    """

    def __init__(self, max_bad_fraction: float = 0.01) -> None:
        self.max_bad_fraction = max_bad_fraction
        self._bad: dict[int, str] = {}  # index -> why it cannot be used

    def __len__(self) -> int:
        raise NotImplementedError

    def load_sample(self, index: int) -> dict[str, Any]:
        """Load one item, 0 <= index < len.

        Raises:
            BadSample: this one cannot be used, others may.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        for step in range(len(self)):  # that many are tried only if max_bad_fraction tolerates everything
            candidate = (index + step) % len(self)
            if candidate in self._bad:
                continue
            try:
                return self.load_sample(candidate)
            except BadSample as error:
                self._note_bad(candidate, error)
        raise AssertionError("unreachable: a data set without any readable image has raised")

    def _note_bad(self, index: int, error: BadSample) -> None:
        self._bad[index] = str(error)
        count, total = len(self._bad), len(self)
        if count == total or (count >= 2 and count > self.max_bad_fraction * total):
            first = "\n  ".join(list(self._bad.values())[:5])
            raise ValueError(
                f"{count} of {total} images cannot be read so far, more than "
                f"max_bad_fraction={self.max_bad_fraction} allows; "
                f"repair or remove them, or raise max_bad_fraction. The first:\n  {first}"
            ) from error
        logger.warning("%s; the next image takes its place (%d of %d are bad so far)", error, count, total)


class ImagePaths(FaultTolerantDataset):
    """Image files as items {"image": HWC float32 in [-1, 1], "file_path_": str, and one value per label}.

    `size`, `crop_size`, `random_crop` and `flip` are those of JointTransform. A file that cannot be read, or
    is smaller than a `crop_size` without `size`, is skipped as FaultTolerantDataset says, with its labels.

    Args:
        paths: image files.
        size: pixels of the smallest side, or [height, width]; None leaves pictures as they are.
        random_crop: crop anywhere, else in the centre.
        labels: lists as long as `paths`, by the key that items hold them under.
        flip: mirror every second picture, drawn at random.
        crop_size: pixels; `size` by default.
        coord: add "coord", HW1 float32 in [0, 1): the row-major position i / (h * w) of each pixel in the
            whole resized picture, of which the crop is a part (as FacesHQ did in 2021).
        max_bad_fraction: share of bad samples that is tolerated.

    Raises:
        ValueError: no paths, labels of another length, or a crop that is larger than `size`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: Size = None,
        random_crop: bool = False,
        labels: Mapping[str, Sequence[Any]] | None = None,
        *,
        flip: bool = False,
        crop_size: Size = None,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(max_bad_fraction)
        self.paths = [os.fspath(path) for path in paths]
        if not self.paths:
            raise ValueError("the list of image paths is empty: give at least one image")
        for key, values in (labels or {}).items():
            if len(values) != len(self.paths):
                raise ValueError(
                    f"labels[{key!r}] has {len(values)} values for {len(self.paths)} images: give one each"
                )
        self.labels = {**(labels or {}), "file_path_": self.paths}
        self.transform = JointTransform(size, crop_size, random_crop, flip=flip)
        self.coord = coord

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that pictures are resized to cover, in pixels."""
        return self.transform.size

    def __len__(self) -> int:
        return len(self.paths)

    def load_sample(self, index: int) -> dict[str, Any]:
        return self.load(self.paths[index]) | self.labels_of(index)

    def labels_of(self, index: int) -> dict[str, Any]:
        """Return what an item holds besides the picture, without reading it."""
        return {key: values[index] for key, values in self.labels.items()}

    def preprocess_image(self, image_path: Path) -> np.ndarray:
        """Read, resize, crop and flip one file: (H, W, 3) float32 in [-1, 1]."""
        return self.load(image_path)["image"]

    def load(self, path: Path) -> dict[str, np.ndarray]:
        """Read one file into "image" (H, W, 3), float32 in [-1, 1], and "coord" (H, W, 1) if asked for."""
        pixels, params = self.read(path)
        item = {"image": from_uint8(pixels)}  # (H, W, 3)
        return item | ({"coord": params.coord()} if self.coord else {})

    def read(self, path: Path) -> tuple[np.ndarray, JointParams]:
        """Read one file, resized and cropped: uint8 (H, W, 3), and where that lies in the picture."""
        return read_transformed(path, self.transform)


class NumpyPaths(ImagePaths):
    """Pictures saved by numpy, uint8 (1, 3, H, W) as CelebA-HQ was, (3, H, W) or (H, W, 3); else ImagePaths.

    Files of other extensions than .npy are read as images.
    """

    def read(self, path: Path) -> tuple[np.ndarray, JointParams]:
        if not os.fspath(path).endswith(".npy"):
            return super().read(path)
        pixels = read_npy(path)
        params = self.transform.get_params(*pixels.shape[:2], path)
        return params.image(pixels), params


class ConcatDatasetWithIndex(ConcatDataset):
    """Data sets one after the other; items are pairs (item, number of its data set)."""

    def __getitem__(self, idx: int) -> tuple[Any, int]:
        if not -len(self) <= idx < len(self):
            raise IndexError(f"index {idx} of {len(self)} images")
        number = bisect.bisect_right(self.cumulative_sizes, idx % len(self))
        first = self.cumulative_sizes[number - 1] if number else 0
        return self.datasets[number][idx % len(self) - first], number


def merge_config(owner: object, config: Mapping[str, Any] | None, **settings: Any) -> dict[str, Any]:
    """Return the settings, those of `config` instead where it has them; `owner` is named in messages.

    Raises:
        ValueError: `config` has others.
    """
    if unknown := set(config or ()) - set(settings):
        raise ValueError(
            f"config of {type(owner).__name__} has {', '.join(sorted(map(str, unknown)))}; it may have "
            f"{', '.join(settings)}"
        )
    return settings | dict(config or {})


def image_batches(
    paths: Sequence[str | os.PathLike], size: Size, multiple: int, batch_size: int, bad: list[str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Read images, in their order, into batches of neighbours of the same size: (paths, (B, 3, H, W)).

    Args:
        size: resize and crop to it, as ImagePaths does; None keeps each picture's own.
        multiple: what both sides are cropped to a multiple of, around the centre, in pixels.
        batch_size: most images in a batch.
        bad: gets a line for each file that cannot be read or used, or is smaller than `multiple`.
    """
    reader = ImagePaths(paths, size)
    batch: list[tuple[str, Tensor]] = []
    for path in reader.paths:
        try:
            image = torch.from_numpy(reader.load(path)["image"])  # (H, W, 3)
        except BadSample as error:
            bad.append(str(error))
            continue
        height, width = (side // multiple * multiple for side in image.shape[:2])
        if height == 0 or width == 0:
            bad.append(f"{path} is smaller than {multiple} pixels: give a size to enlarge it")
            continue
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        image = image[top:top + height, left:left + width].permute(2, 0, 1)
        if batch and (len(batch) == batch_size or batch[0][1].shape != image.shape):
            yield [name for name, _ in batch], torch.stack([x for _, x in batch])
            batch = []
        batch.append((path, image))
    if batch:
        yield [name for name, _ in batch], torch.stack([x for _, x in batch])
