"""Your own images: a folder or a list file; or one folder per class, for class-conditional models."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from taming.data.base import ImagePaths, read_lines
from taming.data.transforms.joint import Size

logger = logging.getLogger(__name__)

EXTENSIONS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_images(folder: str | os.PathLike, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Find the images below a folder, at any depth and through links, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds no image; the message lists the file name extensions that were looked for.
    """
    folder = _existing_folder(folder)
    found = sorted(_walk(folder, extensions))
    if not found:
        raise ValueError(f"folder {folder} and those below hold no images ({', '.join(extensions)})")
    return found


def read_list_file(list_file: str | os.PathLike) -> list[str]:
    """Read image paths from a text file, one a line, in its order; blank lines are left out.

    A relative path counts from the working directory (as in 2021), or else from the folder of the list file.

    Raises:
        FileNotFoundError: the list file does not exist.
        ValueError: it is empty or no UTF-8, or names files that do not exist: says how many, and shows the
            first five.
    """
    list_file = Path(list_file)
    names = read_lines(list_file, "image list file")
    paths, missing = [], []
    for name in names:
        beside = os.path.join(list_file.parent, name)  # of an absolute name, that name
        path = name if os.path.isfile(name) else beside if os.path.isfile(beside) else None
        (missing if path is None else paths).append(path or name)
    if missing:
        shown = "\n  ".join(missing[:5])
        raise ValueError(
            f"{len(missing)} of {len(names)} images named in {list_file} do not exist; relative paths were "
            "looked for in the "
            f"working directory {os.getcwd()} and in {list_file.parent}. The first:\n  {shown}"
        )
    return paths


class CustomBase(ImagePaths):
    """The images of a list file or of a folder, whichever is given."""

    def __init__(
        self,
        size: Size,
        list_file: str | os.PathLike | None,
        folder: str | os.PathLike | None,
        *,
        crop_size: Size = None,
        random_crop: bool = False,
        flip: bool = False,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        if (list_file is None) == (folder is None):
            given = "neither was" if folder is None else f"both {list_file} and {folder} were"
            raise ValueError(f"{type(self).__name__} takes a list file of images or a folder: {given} given")
        super().__init__(
            find_images(folder) if list_file is None else read_list_file(list_file),
            size, random_crop, flip=flip, crop_size=crop_size, coord=coord, max_bad_fraction=max_bad_fraction,
        )


class CustomTrain(CustomBase):
    """Training images of your own: items {"image", "file_path_"}, and "coord" if asked for; see ImagePaths.

    Args:
        size: smallest side in pixels after resizing, or [height, width].
        training_images_list_file: one image path a line; or give `folder`, which is searched at any depth.
        crop_size: pixels; `size` by default. Give less for random crops that also move along the smaller
            side.
        random_crop: on, where the 2021 class cropped in the centre.
        flip: mirror at random; turn off for text, faces with a side, and the like. (Not done in 2021.)
        coord: add the position of each pixel in the whole picture, for coordinate conditioning.
        max_bad_fraction: share of unreadable files that is tolerated.
    """

    def __init__(
        self,
        size: Size,
        training_images_list_file: str | os.PathLike | None = None,
        *,
        folder: str | os.PathLike | None = None,
        crop_size: Size = None,
        random_crop: bool = True,
        flip: bool = True,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, training_images_list_file, folder,
            crop_size=crop_size, random_crop=random_crop, flip=flip, coord=coord,
            max_bad_fraction=max_bad_fraction,
        )


class CustomTest(CustomBase):
    """Test images of your own, cropped in the centre and not mirrored; otherwise as CustomTrain."""

    def __init__(
        self,
        size: Size,
        test_images_list_file: str | os.PathLike | None = None,
        *,
        folder: str | os.PathLike | None = None,
        crop_size: Size = None,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, test_images_list_file, folder,
            crop_size=crop_size, coord=coord, max_bad_fraction=max_bad_fraction,
        )


class CustomClassBase(ImagePaths):
    """Images in a folder of class folders, with "class_label" (int) and "human_label" (the class folder's
    name).

    Classes are numbered in the sorted order of their names, which `class_names` holds.
    """

    def __init__(
        self,
        size: Size,
        folder: str | os.PathLike,
        classes_from: str | os.PathLike | None,
        *,
        crop_size: Size = None,
        random_crop: bool = False,
        flip: bool = False,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        folder = _existing_folder(folder)
        own = _class_folders(folder)
        self.class_names = own if classes_from is None else _read_class_names(classes_from)
        unknown = [name for name in own if name not in set(self.class_names)]
        if unknown:
            raise ValueError(
                f"{len(unknown)} class folders of {folder} are unknown to {classes_from}, which has "
                f"{len(self.class_names)} "
                f"classes: {', '.join(unknown[:5])}; rename or remove them, or add those classes to the "
                "training set"
            )
        paths = {name: find_images(folder / name) for name in own}
        names = [name for name in own for _ in paths[name]]
        numbers = {name: number for number, name in enumerate(self.class_names)}
        super().__init__(
            [path for name in own for path in paths[name]],
            size, random_crop, {"class_label": [numbers[name] for name in names], "human_label": names},
            flip=flip, crop_size=crop_size, coord=coord, max_bad_fraction=max_bad_fraction,
        )


class CustomClassTrain(CustomClassBase):
    """Training images in one folder per class: items as CustomTrain, with "class_label" and "human_label".

    Args:
        size: smallest side in pixels after resizing, or [height, width].
        folder: holds one folder per class; class number = place in the sorted names.
        classes_from: another such folder, or a text file with one name a line, that fixes the numbering
            instead.
    """

    def __init__(
        self,
        size: Size,
        folder: str | os.PathLike,
        *,
        classes_from: str | os.PathLike | None = None,
        crop_size: Size = None,
        random_crop: bool = True,
        flip: bool = True,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, folder, classes_from,
            crop_size=crop_size, random_crop=random_crop, flip=flip, coord=coord,
            max_bad_fraction=max_bad_fraction,
        )


class CustomClassTest(CustomClassBase):
    """Test images in one folder per class, cropped in the centre and not mirrored.

    `classes_from` has no default: a test folder that lacks a class would silently shift the numbers of those
    after it.

    Args:
        size: smallest side in pixels after resizing, or [height, width].
        folder: holds one folder per class; classes may be missing, but none may be unknown.
        classes_from: the training folder (or a text file with one class name a line), which numbers the
            classes.
    """

    def __init__(
        self,
        size: Size,
        folder: str | os.PathLike,
        classes_from: str | os.PathLike,
        *,
        crop_size: Size = None,
        coord: bool = False,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__(
            size, folder, classes_from, crop_size=crop_size, coord=coord, max_bad_fraction=max_bad_fraction
        )


def _existing_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"image folder {folder} {what} (working directory: {os.getcwd()})")
    return folder


def _walk(folder: Path, extensions: tuple[str, ...]) -> Iterator[str]:
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(extensions):
                yield os.path.join(parent, name)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise ValueError(f"folder {folder} holds no class folders: give each class a folder there")
    return names


def _read_class_names(source: str | os.PathLike) -> list[str]:
    source = Path(source)
    if not source.is_file():
        return _class_folders(_existing_folder(source))
    names = read_lines(source, "class name file")
    if len(set(names)) != len(names):
        raise ValueError(f"class name file {source} names a class twice: write each name once, one a line")
    return names
