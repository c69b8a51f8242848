"""What data sets of images have in common, and a list of image files as a data set.

H W pixels of the crop. Items are dicts; images are (H, W, 3) float32 in [-1, 1].
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
from taming.parameters import Probability

logger = logging.getLogger(__name__)

Path = str | os.PathLike


class FaultTolerantDataset(Dataset):
    """A data set of images that tolerates bad samples; subclasses implement `__len__` and `load_sample`.

    A sample for which `load_sample` raises BadSample is skipped with a warning, and the next good one takes
    its place. The data set raises ValueError when more than `max_bad_fraction` of the samples, and at least
    two, turn out bad. Bad samples are counted per copy of the data set, that is per loader process.

    Every data set of this package that is built on it takes these arguments:

    Args:
        size: pixels of the smallest side after resizing, before a square crop; or [height, width],
            a rectangle that images are resized to cover; None keeps images as they are.
        random_crop: crop at a random position instead of the centre; by default RANDOM_CROP of the class.
        crop_size: pixels of the crop, a side or [height, width]; `size` by default.
        flip: mirror images at random, half of them; by default FLIP of the class.
        interpolation: for resizing images: nearest, bilinear, bicubic, area or lanczos.
        coord: add "coord" to items, (H, W, 1) float32 in [0, 1): the row-major position i / (h * w) of each
            pixel in the whole resized image of h x w pixels (as FacesHQ did in 2021).
        max_bad_fraction: fraction of bad samples that is tolerated, 0..1.

    Raises:
        ValueError: `crop_size` is larger than `size`, or a value is out of its range.
    """

    RANDOM_CROP = False
    FLIP = False

    def __init__(
        self,
        size: Size = None,
        random_crop: bool | None = None,
        *,
        crop_size: Size = None,
        flip: bool | None = None,
        interpolation: str = "bicubic",
        coord: bool = False,
        max_bad_fraction: Probability = 0.01,
    ) -> None:
        self.size, self.interpolation, self.coord = size, interpolation, coord
        self.random_crop = self.RANDOM_CROP if random_crop is None else random_crop
        flip = self.FLIP if flip is None else flip
        self.transform = JointTransform(
            size, crop_size, self.random_crop, flip=flip, interpolation=interpolation
        )
        self.crop_size = self.transform.crop_size
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
        for step in range(len(self)):  # all are tried only if max_bad_fraction tolerates everything
            candidate = (index + step) % len(self)
            if candidate in self._bad:
                continue
            try:
                return self.load_sample(candidate)
            except BadSample as error:
                self._note_bad(candidate, error)
        raise AssertionError("unreachable: a data set without any readable image has raised")

    def image_item(self, pixels: np.ndarray, params: JointParams) -> dict[str, Any]:
        """Return "image" of transformed pixels (H, W, 3) uint8, and "coord" if it is asked for."""
        item = {"image": from_uint8(pixels)}  # (H, W, 3)
        return item | ({"coord": params.coord()} if self.coord else {})

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
    """Image files as items {"image": (H, W, 3) float32 in [-1, 1], "file_path_": str}, and the labels.

    A file that cannot be read, or is smaller than a `crop_size` without `size`, is a bad sample.

    Args:
        paths: image files.
        size, random_crop: see FaultTolerantDataset.
        labels: values by index, as many as `paths`, by the key that items hold them under.
        options: see FaultTolerantDataset.

    Raises:
        ValueError: no paths, or labels of another length.
    """

    class_names: Sequence[str] = ()  # of labels["class_label"]; a data set that knows them sets them

    def __init__(
        self,
        paths: Sequence[Path],
        size: Size = None,
        random_crop: bool | None = None,
        labels: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(size, random_crop, **options)
        if not len(paths):
            raise ValueError("the list of image paths is empty: give at least one image")
        for key, values in (labels or {}).items():
            if isinstance(values, list | tuple | np.ndarray) and len(values) != len(paths):
                raise ValueError(
                    f"labels[{key!r}] has {len(values)} values for {len(paths)} images: give one each"
                )
        self.labels: dict[str, Any] = {**(labels or {}), "file_path_": [os.fspath(path) for path in paths]}
        self.preprocessor = self.transform  # 2021's name: preprocessor(image=pixels)["image"]

    def __len__(self) -> int:
        return len(self.labels["file_path_"])

    def load_sample(self, index: int) -> dict[str, Any]:
        labels = self.labels_of(index)
        return self.load(labels["file_path_"]) | labels

    def labels_of(self, index: int) -> dict[str, Any]:
        """Return what an item holds besides the image, without reading the file."""
        return {key: values[index] for key, values in self.labels.items()}

    def preprocess_image(self, image_path: Path) -> np.ndarray:
        """Read, resize, crop and flip one file: (H, W, 3) float32 in [-1, 1]. Subclasses may override it."""
        return from_uint8(self.read(image_path)[0])

    def load(self, path: Path) -> dict[str, Any]:
        """Read one file into "image" (H, W, 3), float32 in [-1, 1], and "coord" if it is asked for."""
        return self.image_item(*self.read(path)) if self.coord else {"image": self.preprocess_image(path)}

    def read(self, path: Path) -> tuple[np.ndarray, JointParams]:
        """Read one file, resized and cropped: uint8 (H, W, 3), and the parameters of the transform."""
        return read_transformed(path, self.transform)


class NumpyPaths(ImagePaths):
    """Images saved by numpy, uint8 (1, 3, H, W) as CelebA-HQ was, (3, H, W) or (H, W, 3); else ImagePaths.

    Files of other extensions than .npy are read as images.
    """

    def read(self, path: Path) -> tuple[np.ndarray, JointParams]:
        if not os.fspath(path).endswith(".npy"):
            return super().read(path)
        pixels = read_npy(path)
        params = self.transform.get_params(pixels.shape[0], pixels.shape[1], path)
        return params.image(pixels), params


class DelegatingDataset(Dataset):
    """A data set whose items are those of `data`, another data set, which a subclass sets.

    A subclass outside of this package may call `super().__init__()` with any arguments, and then set `data`.
    """

    RANDOM_CROP = False  # the defaults of random_crop and flip
    FLIP = False
    OPTIONS: type = FaultTolerantDataset  # takes `**options` of the constructors; see taming.parameters

    def __init__(self, *args: Any, **options: Any) -> None:
        self.data: Any = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index]

    def defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of FaultTolerantDataset, with the defaults of this class."""
        return {"random_crop": self.RANDOM_CROP, "flip": self.FLIP, **options}


class ConcatDatasetWithIndex(ConcatDataset):
    """Data sets one after the other; items are pairs (item, number of its data set)."""

    def __getitem__(self, idx: int) -> tuple[Any, int]:
        if not -len(self) <= idx < len(self):
            raise IndexError(f"index {idx} of {len(self)} images")
        number = bisect.bisect_right(self.cumulative_sizes, idx % len(self))
        first = self.cumulative_sizes[number - 1] if number else 0
        return self.datasets[number][idx % len(self) - first], number


def merge_config(owner: object, config: Mapping[str, Any] | None, **settings: Any) -> dict[str, Any]:
    """Return the settings, replaced by those of `config` where it has them; `owner` is named in messages.

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
        size: resize and crop to it, as ImagePaths does; None keeps each image's own.
        multiple: what both sides are cropped to a multiple of, around the centre, in pixels.
        batch_size: most images in a batch.
        bad: gets a line for each file that cannot be read or used, or is smaller than `multiple`.
    """
    reader = ImagePaths(paths, size)
    batch: list[tuple[str, Tensor]] = []
    for path in reader.labels["file_path_"]:
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
