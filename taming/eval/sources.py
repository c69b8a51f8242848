"""Where the images of an evaluation come from: a folder, an .npz file, or a data set.

Images are uint8 (B, 3, H, W), and have numbers: image i is the same in every run and process.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from taming.data.base import ImagePaths
from taming.data.files.errors import BadSample
from taming.data.files.lists import find_images
from taming.eval.npz import NpzFile
from taming.images import to_uint8
from taming.inference.dataset import batch_of, build_dataset
from taming.inference.provenance import data_metadata, digest

Description = dict[str, Any]
Size = int | Sequence[int]

SAID = 100  # reasons in a result


class ImageSource:
    """N images by number.

    Attributes:
        channels: of the images before gray ones were repeated to 3.
    """

    channels: int = 3

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, numbers: Sequence[int]) -> tuple[list[int], Tensor]:
        """Return the numbers of those images that can be read, and the images, uint8 (B, 3, H, W).

        Raises:
            ValueError: they differ in size; the message names two.
        """
        raise NotImplementedError

    def why_bad(self, number: int) -> str:
        """Say why an image cannot be read."""
        raise NotImplementedError

    def why_left_out(self, bad: Tensor) -> list[str]:
        """Say of the first hundred numbers (n,) of images that cannot be read, why."""
        return [self.why_bad(number) for number in bad[:SAID].tolist()]

    def describe(self) -> Description:
        """Say what the images are, for the protocol of a result: no paths, which differ by machine."""
        raise NotImplementedError

    def identity(self) -> Description:
        """Say all that tells the images from others on this machine."""
        return self.describe()


class FolderImages(ImageSource):
    """The image files of a folder, at any depth, in the order of their names.

    Args:
        folder: the folder.
        size: the smaller side is resized to it and the centre cropped, as data sets do; None keeps the
            images' own size, which must be the same for all.
        limit: take that many at most, from the first.
    """

    def __init__(self, folder: Path, size: Size | None = None, limit: int | None = None):
        self.size = size
        self.reader = ImagePaths(find_images(folder)[:limit], size)
        self.paths: list[str] = self.reader.labels["file_path_"]
        self._first: tuple[str, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, numbers: Sequence[int]) -> tuple[list[int], Tensor]:
        """Read files; those that cannot be read are left out."""
        good, pixels = [], []
        for number in numbers:
            try:
                image = self.reader.read(self.paths[number])[0]  # (H, W, 3)
            except BadSample:
                continue
            self._first = self._first or (self.paths[number], image.shape)
            if image.shape != self._first[1]:
                this, other = (f"{shape[0]}x{shape[1]}" for shape in (image.shape, self._first[1]))
                raise ValueError(
                    f"{self.paths[number]} has {this} pixels and {self._first[0]} has {other}: give a size, "
                    "to which all are resized and cropped (--size)"
                )
            good.append(number)
            pixels.append(torch.from_numpy(np.ascontiguousarray(image)))
        images = (
            torch.stack(pixels).permute(0, 3, 1, 2) if pixels else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        )
        return good, images

    def why_bad(self, number: int) -> str:
        """Read it again."""
        try:
            self.reader.read(self.paths[number])
        except BadSample as error:
            return str(error)
        return f"{self.paths[number]} could not be read before, and can now"

    def describe(self) -> Description:
        """Describe resizing and crop."""
        resize = "none" if self.size is None else f"smaller side to {self.size}, bicubic; centre crop"
        return {"kind": "folder", "count": len(self), "resize": resize}

    def identity(self) -> Description:
        """Add the files, their sizes and times."""
        states = [
            (path, status.st_size, status.st_mtime_ns) for path in self.paths for status in [os.stat(path)]
        ]
        return self.describe() | {"files": digest(states)}


class NpzImages(ImageSource):
    """The images `arr_0`, uint8 (N, H, W, 3), of an .npz file; they stay in the file.

    Raises:
        ValueError: there is no such array.
    """

    def __init__(self, path: Path, limit: int | None = None):
        with NpzFile(path) as file:
            pixels = file.mapped("arr_0")
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
            raise ValueError(f"{path}: arr_0 is {pixels.dtype} {pixels.shape}, not uint8 (N, H, W, 3)")
        self.path, self.pixels = path, pixels[:limit]

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, numbers: Sequence[int]) -> tuple[list[int], Tensor]:
        """Read from the file."""
        return list(numbers), torch.from_numpy(np.array(self.pixels[list(numbers)])).permute(0, 3, 1, 2)

    def describe(self) -> Description:
        """Describe the array."""
        return {"kind": "npz", "count": len(self), "resize": "none"}

    def identity(self) -> Description:
        """Add the file, its size and time."""
        status = self.path.stat()
        return self.describe() | {
            "file": str(self.path.resolve()),
            "state": [status.st_size, status.st_mtime_ns],
        }


class DatasetImages(ImageSource):
    """The images of one split of a config's data; item i has random numbers of its own.

    Args:
        section: the section `data` of a config.
        split: train, validation or test.
        key: the entry of the items that is an image.
        seed: of crops and flips.
        limit: take that many at most, from the first.
    """

    def __init__(
        self, section: DictConfig, split: str, key: str = "image", *, seed: int = 0, limit: int | None = None
    ):
        self.dataset = build_dataset(section, split, seed)
        self.key, self.count = key, min(len(self.dataset), limit or len(self.dataset))
        self._identity = data_metadata(section, split) | {"seed": seed}
        if key not in (item := self.dataset[0]):
            raise ValueError(f"items of the {split} data have no {key}, but {', '.join(item)}")
        self.channels = item[key].shape[-1]
        if self.channels not in (1, 3):
            raise ValueError(
                f"{key} of the {split} data has {self.channels} channels: it is not an image to compare"
            )

    def __len__(self) -> int:
        return self.count

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return a batch of items as models take them."""
        return batch_of(self.dataset, numbers)

    def read(self, numbers: Sequence[int]) -> tuple[list[int], Tensor]:
        """Load items; images of one channel are gray. Of bad items, the data set takes the next good one."""
        return list(numbers), pixels_of(self.batch(numbers)[self.key].permute(0, 3, 1, 2))

    def describe(self) -> Description:
        """Describe the data by its configuration."""
        return {"kind": "dataset", "count": len(self), **self._identity}


def open_source(path: Path, size: Size | None = None, limit: int | None = None) -> ImageSource:
    """Open a folder of images or an .npz file."""
    if path.is_dir():
        return FolderImages(path, size, limit)
    if size is not None:
        raise ValueError(f"{path}: images of a file keep their size: leave --size out")
    return NpzImages(path, limit)


def pixels_of(images: Tensor) -> Tensor:
    """Turn images (B, 1 or 3, H, W) in [-1, 1] into the nearest 8-bit pixels (B, 3, H, W)."""
    return to_uint8(images).expand(-1, 3, -1, -1)


def content_hash(images: Tensor) -> Tensor:
    """Return sha256 of the pixels of each image (B, 3, H, W): uint8 (B, 32)."""
    pixels = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    sums = [hashlib.sha256(image.tobytes()).digest() for image in pixels]
    return torch.from_numpy(np.frombuffer(b"".join(sums), np.uint8).reshape(-1, 32).copy())


def hash_of_set(hashes: Tensor) -> str:
    """Return one hash for a set of images, in their order, from that of each."""
    return hashlib.sha256(hashes.numpy().tobytes()).hexdigest()

