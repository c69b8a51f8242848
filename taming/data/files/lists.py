"""Lists of files: text files that name them, and folders that hold them."""

import io
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from taming.util import open_file

logger = logging.getLogger(__name__)

EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)
_UNREAD = (  # images, too, but of kinds that are not read
    ".arw", ".cr2", ".cr3", ".dds", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".jxl", ".nef",
    ".orf", ".pcx", ".psd", ".raf", ".rw2", ".svg", ".tga", ".xcf",
)
_PROBES = 64  # files that a list is judged by
MAX_LIST = 1 << 30  # bytes of a list file
MAX_LINE = 1 << 16  # characters
MAX_LINES_MEMORY = 5 << 28  # bytes that its lines take: 9 million paths of 90 characters


def read_lines(list_file: str | os.PathLike, what: str) -> list[str]:
    """Read the lines of a text file that are not blank; `what` says in messages what they are.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: there are no lines, it is not a file of UTF-8 text, or it is too large.
    """
    name = os.fspath(list_file)
    if not os.path.exists(name):
        raise FileNotFoundError(
            f"{what} {name} does not exist (working directory: {os.getcwd()}); write it, or give the path of "
            "yours"
        )
    lines, memory = [], 0
    with open_file(name, what, max_bytes=MAX_LIST) as opened:
        text = io.TextIOWrapper(opened, encoding="utf-8-sig")
        try:
            while line := text.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise ValueError(f"{what} {name} has a line of more than {MAX_LINE} characters")
                if line := line.strip():
                    lines.append(line)
                    memory += sys.getsizeof(line)
                    if memory > MAX_LINES_MEMORY:
                        raise ValueError(f"{what} {name} has too many lines: use several smaller ones")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} {name} is not UTF-8 text ({error}): save it as UTF-8") from error
    if not lines:
        raise ValueError(f"{what} {name} is empty")
    return lines


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

    Images of kinds that are not read, such as HEIC, are counted in a warning.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it holds no image; the message lists the file name extensions that were looked for.
    """
    folder = existing_folder(folder)
    found: list[str] = []
    unread: Counter[str] = Counter()
    for path in _walk(folder):
        ending = os.path.splitext(path)[1].lower()
        if ending in extensions:
            found.append(path)
        elif ending in _UNREAD:
            unread[ending] += 1
    counts = ", ".join(f"{count} {ending}" for ending, count in sorted(unread.items()))
    if not found:
        other = f"; images of other kinds must be converted first: {counts}" if unread else ""
        raise ValueError(f"folder {folder} and those below hold no images ({', '.join(extensions)}){other}")
    if unread:
        logger.warning("folder %s: %s are not read; convert them to PNG or JPEG to use them", folder, counts)
    return sorted(found)


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
    paths: list[str] = []
    missing: list[str] = []
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
    """Return the path of a folder.

    Raises:
        FileNotFoundError: it does not exist, or is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"image folder {folder} {what} (working directory: {os.getcwd()})")
    return folder


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder that are not hidden."""
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder.

    Raises:
        ValueError: there are none.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if not names:
        raise ValueError(f"folder {folder} holds no class folders: give each class a folder there")
    return names


def read_class_names(source: str | os.PathLike) -> list[str]:
    """Read the names of classes: the lines of a text file, or the folders in a folder.

    Raises:
        FileNotFoundError: neither exists.
        ValueError: there are none, or a name occurs twice.
    """
    source = Path(source)
    if source.is_dir() or not source.exists():
        return class_folders(existing_folder(source))
    names = read_lines(source, "class name file")
    if len(set(names)) != len(names):
        raise ValueError(f"class name file {source} names a class twice: write each name once, one a line")
    return names
