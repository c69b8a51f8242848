"""Training and validation images: by two lists, or else by a fixed split of one folder."""

import hashlib
import os
from collections.abc import Sequence

from taming.data.files.lists import EXTENSIONS, check_some_exist, find_images, read_lines

Path = str | os.PathLike


def split_by_name(names: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Split names into training and validation, about `share` of them, by a hash of each name.

    A name falls to the same side on every machine, whatever other names there are, except that a side that
    would be empty gets one of several names.
    """
    order = {name: _position(name) for name in names}
    sides = [name for name in names if order[name] >= share], [name for name in names if order[name] < share]
    if len(names) > 1 and not all(sides):
        single = min(names, key=lambda name: abs(order[name] - share))
        rest = [name for name in names if name != single]
        return (rest, [single]) if sides[0] else ([single], rest)
    return sides


def _position(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone, uniform over names."""
    digest = hashlib.sha256(name.replace(os.sep, "/").encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose_side(names: Sequence[str], split: str, share: float, source: Path) -> list[str]:
    """Return the names of one split, "train" or "validation"; validation gets `share`.

    Raises:
        ValueError: there is none, or `share` is not between 0 and 1; `source` stands in the message.
    """
    if not 0 < share < 1:
        raise ValueError(f"split is {share}; give the share of validation images, such as 0.1")
    chosen = split_by_name(names, share)[split == "validation"]
    if not chosen:
        raise ValueError(
            f"of {len(names)} images in {os.fspath(source)} none fell to {split}, which gets a share of "
            f"{share if split == 'validation' else 1 - share:.2f}: add images, or give a list of them"
        )
    return chosen


def split_images(
    root: Path,
    split: str,
    list_file: Path | None,
    usual: dict[str, str],
    share: float,
    extensions: tuple[str, ...] = EXTENSIONS,
) -> list[str]:
    """Return the image files of a split.

    Args:
        root: folder of the images.
        split: "train" or "validation".
        list_file: text file with one path a line, relative to `root`; None for the usual list of the split,
            or, if neither split has one, for a share of the folder.
        usual: the usual list file of each split.
        share: of the folder that is for validation.
        extensions: of images.

    Raises:
        FileNotFoundError: the list, the folder or the files do not exist, or only the other split has a list.
        ValueError: the list or the folder holds no image, or this split got none.
    """
    present = [name for name, file in usual.items() if os.path.isfile(file)]
    if list_file is None and present:
        list_file = usual[split]
        if split not in present:
            raise FileNotFoundError(
                f"{usual[present[0]]} lists the images for {present[0]}, but {list_file}, for {split}, does "
                "not exist: write it, or remove the other"
            )
    if list_file is not None:
        paths = [os.path.join(root, name) for name in read_lines(list_file, "image list")]
        check_some_exist(paths, list_file)
        return paths
    names = [os.path.relpath(path, root) for path in find_images(root, extensions)]
    return [os.path.join(root, name) for name in choose_side(names, split, share, root)]
