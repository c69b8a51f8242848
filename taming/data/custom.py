"""Your own images: a folder or a list file; or one folder per class, for class-conditional models."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

from taming.data.base import ConcatDatasetWithIndex, DelegatingDataset, ImagePaths, NumpyPaths  # noqa: F401
from taming.data.files import lists
from taming.data.files.lists import find_images
from taming.data.splits import choose_side
from taming.data.transforms.joint import Size
from taming.parameters import Range

Path = str | os.PathLike
Share = Annotated[float, Range(0, 1, above=True)]


class FolderImages(ImagePaths):
    """The images of a list file or of a folder, or the training or validation share of them.

    Args:
        size: smallest side in pixels after resizing, or [height, width].
        list_file: one image path a line; or give `folder`.
        side: "train" or "validation", with `split`.
        folder: searched for images at any depth.
        split: the share of the images that is for validation, such as 0.1; the others are for training. Names
            of files decide, so that an image never changes sides.
        options: see FaultTolerantDataset.
    """

    def __init__(
        self,
        size: Size,
        list_file: Path | None,
        side: str,
        /,
        *,
        folder: Path | None = None,
        split: Share | None = None,
        **options: Any,
    ) -> None:
        if list_file is not None and folder is None:
            paths, source = lists.read_list_file(list_file), list_file
        elif folder is not None and list_file is None:
            paths, source = find_images(folder), folder
        else:
            given = "neither was" if folder is None else f"both {list_file} and {folder} were"
            raise ValueError(f"give a list file of images or a folder: {given} given")
        super().__init__(take_share(paths, folder, side, split, source), size, **options)


def take_share(
    paths: Sequence[str], folder: Path | None, side: str, split: float | None, source: Path
) -> Sequence[str]:
    """Return the paths of one side of a split, or all without one; names count from `folder`, if given."""
    if split is None:
        return paths
    names = {path if folder is None else os.path.relpath(path, folder): path for path in paths}
    return [names[name] for name in choose_side(list(names), side, split, source)]


class CustomBase(DelegatingDataset):
    """The images in `data`, which a subclass sets."""

    OPTIONS = FolderImages
    SIDE = "train"


class CustomTrain(CustomBase):
    """Training images of your own: items {"image", "file_path_"}, and "coord" if asked for.

    Images are cropped at random and mirrored by default, which 2021 did not do; turn `flip` off for text and
    the like. With less `crop_size` than `size`, random crops also move along the smaller side.

    Args:
        size: smallest side in pixels after resizing, or [height, width].
        training_images_list_file: one image path a line; or give `folder`.
        options: see FolderImages, with `split` for CustomTest too, and FaultTolerantDataset.
    """

    RANDOM_CROP = FLIP = True

    def __init__(self, size: Size, training_images_list_file: Path | None = None, **options: Any) -> None:
        super().__init__()
        self.data = FolderImages(size, training_images_list_file, self.SIDE, **self.defaults(options))


class CustomTest(CustomBase):
    """Test images of your own, cropped in the centre and not mirrored; otherwise as CustomTrain."""

    SIDE = "validation"

    def __init__(self, size: Size, test_images_list_file: Path | None = None, **options: Any) -> None:
        super().__init__()
        self.data = FolderImages(size, test_images_list_file, self.SIDE, **self.defaults(options))


class CustomClassTrain(CustomBase):
    """Training images in one folder per class: items as CustomTrain, with "class_label" and "human_label".

    "class_label" is the number of the class, "human_label" the name of its folder; `class_names` has them in
    order.

    Args:
        size: smallest side in pixels after resizing, or [height, width].
        folder: holds one folder per class.
        classes_from: another such folder, or a text file with one name a line, that numbers the classes; by
            default the number is the position in the sorted names of `folder`.
        split: see FolderImages; the validation share is for CustomClassTest.
        options: see CustomTrain.

    Raises:
        ValueError: `folder` holds classes that `classes_from` does not name, or a class without images.
    """

    RANDOM_CROP = FLIP = True

    def __init__(
        self,
        size: Size,
        folder: Path,
        classes_from: Path | None = None,
        *,
        split: Share | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        folder = lists.existing_folder(folder)
        own = lists.class_folders(folder)
        self.class_names = own if classes_from is None else lists.read_class_names(classes_from)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        if unknown := [name for name in own if name not in numbers]:
            raise ValueError(
                f"{len(unknown)} class folders of {folder} are unknown to {classes_from}, which has "
                f"{len(numbers)} classes: {', '.join(unknown[:5])}; rename or remove them, or add those "
                "classes to the training set"
            )
        found = [path for name in own for path in find_images(folder / name)]
        paths = take_share(found, folder, self.SIDE, split, folder)
        names = [os.path.relpath(path, folder).split(os.sep)[0] for path in paths]
        labels = {"class_label": [numbers[name] for name in names], "human_label": names}
        self.data = ImagePaths(paths, size, labels=labels, **self.defaults(options))
        self.data.class_names = self.class_names


class CustomClassTest(CustomClassTrain):
    """Test images in one folder per class, cropped in the centre and not mirrored.

    Classes may be missing from `folder`. `classes_from`, the training folder (or a text file with one class
    name a line), is required unless `split` is given: without it, a test folder that lacks a class would
    silently shift the numbers of the classes after it.
    """

    SIDE = "validation"
    RANDOM_CROP = FLIP = False

    def __init__(self, size: Size, folder: Path, classes_from: Path | None = None, **options: Any) -> None:
        if classes_from is None and options.get("split") is None:
            raise ValueError("CustomClassTest needs classes_from, the training folder, or split")
        super().__init__(size, folder, classes_from, **options)
