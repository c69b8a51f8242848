"""Your own images: a folder or a list file; or one folder per class, for class-conditional models."""

import logging
import os

from taming.data.base import ImagePaths
from taming.data.files.lists import (
    class_folders,
    existing_folder,
    find_images,
    read_class_names,
    read_list_file,
)
from taming.data.transforms.joint import Size

logger = logging.getLogger(__name__)

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
        folder = existing_folder(folder)
        own = class_folders(folder)
        self.class_names = own if classes_from is None else read_class_names(classes_from)
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


