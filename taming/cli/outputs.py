"""Where pictures are to go: seen to be possible before they are drawn."""

import os
from pathlib import Path


def check_folder(folder: Path, option: str = "--outdir") -> None:
    """Raise ValueError unless files can be written to a folder, which may be new."""
    _check_place(folder, f"{option} {folder}")


def check_png(file: Path, option: str) -> None:
    """Raise ValueError unless a PNG file can be written there."""
    if file.is_dir():
        raise ValueError(f"{option} {file} is a folder: name a file, {file / 'picture.png'} for instance")
    if file.suffix.lower() != ".png":
        raise ValueError(f"{option} {file}: what is written is a PNG: choose a name that ends in .png")
    _check_place(file.parent, f"{option} {file}")


def _check_place(folder: Path, given: str) -> None:
    """Raise ValueError unless the folder, or the nearest one above that is there, can be written to."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"{given}: {place} is a file: name another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{given}: {place} may not be written to: name another folder")
