"""Lists of files: text files that name them, and folders that hold them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

EXTENSIONS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_PROBES = 64  # files that a list is judged by


def read_lines(list_file: str | os.PathLike, what: str) -> list[str]:
    """Read the lines of a text file that are not blank; `what` says in messages what they are.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: there are none, or it is no text.
    """
    if not os.path.isfile(list_file):
        raise FileNotFoundError(
            f"{what} {os.fspath(list_file)} does not exist (working directory: {os.getcwd()}); write it, or "
            "give the path of yours"
        )
    try:
        with open(list_file, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} {os.fspath(list_file)} is no UTF-8 text ({error}): save it as UTF-8"
        ) from error
    if not any(lines):
        raise ValueError(f"{what} {os.fspath(list_file)} is empty")
    return [line for line in lines if line]


def check_some_exist(paths: Sequence[str], source: str | os.PathLike) -> None:
    """Look for a few of the files that a list names; single ones may be missing, but not all.

    Raises:
        FileNotFoundError: the list and the folder do not belong together.
    """
    probes = paths[::max(1, len(paths) // _PROBES)]
    if not any(os.path.isfile(path) for path in probes):
        raise FileNotFoundError(
            f"none of {len(probes)} files that {os.fspath(source)} names exists, such as {probes[0]} "
            f"(working directory: {os.getcwd()}): check the folder of the data"
        )


def find_images(folder: str | os.PathLike, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """Find the images below a folder, at any depth and through links, sorted; hidden ones are left out.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds no image; the message lists the file name extensions that were looked for.
    """
    folder = existing_folder(folder)
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


def existing_folder(folder: str | os.PathLike) -> Path:
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


def class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise ValueError(f"folder {folder} holds no class folders: give each class a folder there")
    return names


def read_class_names(source: str | os.PathLike) -> list[str]:
    source = Path(source)
    if not source.is_file():
        return class_folders(existing_folder(source))
    names = read_lines(source, "class name file")
    if len(set(names)) != len(names):
        raise ValueError(f"class name file {source} names a class twice: write each name once, one a line")
    return names
