"""LSUN churches and towers, from a folder of images or from the lmdb files as they are distributed.

H W pixels of the crop. Reading lmdb files needs the package lmdb, of the extra `data`.
"""

import io
import os
from typing import Any

import numpy as np

from taming.data.base import DelegatingDataset, ImagePaths
from taming.data.files.errors import BadImage
from taming.data.files.images import read_transformed
from taming.data.splits import split_images
from taming.data.transforms.joint import JointParams, Size

Path = str | os.PathLike


class LmdbImages(ImagePaths):
    """The images of an LSUN lmdb file: items as ImagePaths; "file_path_" is the file's, then the image's key.

    The file is opened once in each process, when its first image is wanted.

    Args:
        root: folder of `data.mdb`; the others are those of ImagePaths.

    Raises:
        ValueError: the package lmdb is missing, or the file is broken, cut off or empty.
    """

    def __init__(self, root: Path, size: Size = None, random_crop: bool = False, **options: Any) -> None:
        self.root = os.path.realpath(root)
        try:
            with _environment(self.root).begin() as transaction:
                keys = [bytes(key).decode("ascii") for key in transaction.cursor().iternext(values=False)]
        except _lmdb().Error as error:
            raise ValueError(
                f"{self.root} is no lmdb folder that can be read: {error}; fetch it or unpack it again"
            ) from error
        if not keys:
            raise ValueError(f"{self.root} holds no images")
        super().__init__([f"{self.root}/{key}" for key in keys], size, random_crop, **options)

    def read(self, path: Path) -> tuple[np.ndarray, JointParams]:
        key = os.fspath(path).rsplit("/", 1)[-1]
        with _environment(self.root).begin() as transaction:
            data = transaction.get(key.encode("ascii"))
        if data is None:
            raise BadImage(f"{self.root} holds no image {key}")
        return read_transformed(path, self.transform, io.BytesIO(data))


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


_environments: dict[str, tuple[int, Any]] = {}  # folder -> process, open environment


def _environment(root: str) -> Any:
    """Open an lmdb folder once in each process; lmdb allows no second time, and no sharing.

    Raises:
        ValueError: its file is cut off.
    """
    process, environment = _environments.get(root, (0, None))
    if process != os.getpid():
        if environment is not None:  # of the process that forked this one
            environment.close()
        environment = _lmdb().open(root, readonly=True, lock=False, readahead=False, meminit=False)
        _check_whole(environment, os.path.join(root, "data.mdb"))
        _environments[root] = os.getpid(), environment
    return environment


def _check_whole(environment: Any, file: str) -> None:
    """Close an environment whose file is shorter than it says: reading beyond the end kills the process.

    Of a whole file the last pages can be missing as well, if what they were for was removed at once.
    """
    wanted = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if (size := os.path.getsize(file)) < wanted:
        environment.close()
        raise ValueError(
            f"{file} is cut off: it has {size} bytes of {wanted} or more; fetch it or unpack it again (if it "
            "is whole, since images were removed from it, use what `mdb_copy -c` makes of it)"
        )


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            'reading lmdb files needs the package lmdb: pip install "taming[data]", or pip install lmdb; or '
            "unpack the images into a folder"
        ) from error
    return lmdb
