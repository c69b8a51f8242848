"""LSUN churches and towers, from a folder of images or from the lmdb files as they are distributed.

H W pixels of the crop.
"""

import io
import os
from typing import Any

from taming.data.base import DelegatingDataset, FaultTolerantDataset, ImagePaths
from taming.data.files.errors import file_errors
from taming.data.files.images import MAX_FILE, read_transformed
from taming.data.files.lmdb_file import read_entries
from taming.data.splits import split_images
from taming.data.transforms.joint import Size
from taming.util import open_file

Path = str | os.PathLike


class LmdbImages(FaultTolerantDataset):
    """The images of an LSUN lmdb file: items as ImagePaths; "file_path_" is the file's, then the image's key.

    Args:
        root: folder of `data.mdb`.
        size, random_crop, options: see FaultTolerantDataset.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is broken, cut off or empty.
    """

    def __init__(
        self, root: Path, size: Size = None, random_crop: bool | None = None, **options: Any
    ) -> None:
        super().__init__(size, random_crop, **options)
        self.root = os.path.realpath(root)
        self.file = os.path.join(self.root, "data.mdb")
        try:
            self.entries = read_entries(self.file)
        except ValueError as error:
            raise ValueError(
                f"{self.root} is not an lmdb folder that can be read: {error}; fetch it or unpack it again"
            ) from error
        if not len(self):
            raise ValueError(f"{self.root} holds no images")

    def __len__(self) -> int:
        return len(self.entries.offsets)

    def load_sample(self, index: int) -> dict[str, Any]:
        path = f"{self.root}/{self.entries.key(index).decode('utf-8', 'backslashreplace')}"
        offset, size = int(self.entries.offsets[index]), int(self.entries.sizes[index])
        with file_errors(path):
            if size > MAX_FILE:
                raise ValueError(f"{size} bytes, more than {MAX_FILE} are not read")
            with open_file(self.file) as file:
                data = os.pread(file.fileno(), size, offset)
            if len(data) < size:
                raise ValueError("it is beyond the end of the file")
        pixels, params = read_transformed(path, self.transform, io.BytesIO(data))
        return self.image_item(pixels, params) | {"file_path_": path}


class LSUNBase(DelegatingDataset):
    """A category of LSUN: items "image" (H, W, 3) float32 in [-1, 1] and "file_path_".

    Args:
        size: see FaultTolerantDataset; the images of LSUN have 256 pixels or more.
        root: folder of images, or of an lmdb file `data.mdb`; by default the category's lmdb folder below
            data/lsun if that exists, such as `church_outdoor_train_lmdb`, else its images, such as
            `churches`.
        list_file: text file with one path a line, relative to a folder of images; see `splits.py` for the
            default.
        options: see FaultTolerantDataset; training images are cropped at random and mirrored by default.
    """

    CATEGORY, FOLDER = "", ""  # as LSUN calls it, and the usual folder of its images
    SPLIT = "train"
    VALIDATION_SHARE = 0.01  # of a folder without lists

    def __init__(
        self, size: Size = 256, *, root: Path | None = None, list_file: Path | None = None, **options: Any
    ) -> None:
        super().__init__()
        options = {"random_crop": self.SPLIT == "train", "flip": self.SPLIT == "train", **options}
        names = {"train": f"{self.CATEGORY}_train", "validation": f"{self.CATEGORY}_val"}
        if root is None:
            usual = f"data/lsun/{names[self.SPLIT]}_lmdb"
            root = usual if os.path.isdir(usual) else f"data/lsun/{self.FOLDER}"
        if os.path.isfile(os.path.join(root, "data.mdb")):
            self.data = LmdbImages(root, size, **options)
        else:
            lists = {split: f"data/lsun/{name}.txt" for split, name in names.items()}
            paths = split_images(root, self.SPLIT, list_file, lists, self.VALIDATION_SHARE)
            self.data = ImagePaths(paths, size, **options)


class LSUNChurchesTrain(LSUNBase):
    """The training images of churches; see LSUNBase."""

    CATEGORY, FOLDER = "church_outdoor", "churches"


class LSUNChurchesValidation(LSUNChurchesTrain):
    """The validation images of churches, cropped in the centre; see LSUNBase."""

    SPLIT = "validation"


class LSUNTowersTrain(LSUNBase):
    """The training images of towers; see LSUNBase."""

    CATEGORY, FOLDER = "tower", "towers"


class LSUNTowersValidation(LSUNTowersTrain):
    """The validation images of towers, cropped in the centre; see LSUNBase."""

    SPLIT = "validation"
