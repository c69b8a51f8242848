"""Helpers that data sets and notebooks of 2021 import: batches, downloads and archives, and square crops."""

import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import default_collate
from tqdm import tqdm

from taming.data.helper_types import Annotation
from taming.util import download


def custom_collate(batch: Sequence[Any]) -> Any:
    """Make a batch of items as torch's default_collate, but keep lists of Annotation and None as lists.

    Images differ in their number of annotations, so that a batch of these is a list with one list per image;
    a batch with None in it is the list of its values. Both apply at any depth of mappings and sequences.
    """
    first = batch[0]
    if any(value is None for value in batch):
        return list(batch)
    if isinstance(first, Mapping):
        return {key: custom_collate([item[key] for item in batch]) for key in first}
    if not isinstance(first, Sequence) or isinstance(first, str | bytes):
        return default_collate(batch)  # type: ignore[arg-type]  # it takes tuples as well
    if isinstance(first, Annotation) or all(_is_annotations(values) for values in batch):
        return list(batch)
    if len(set(map(len, batch))) > 1:
        raise ValueError(f"sequences of {sorted(set(map(len, batch)))} elements cannot form a batch")
    columns = [custom_collate(column) for column in zip(*batch, strict=True)]
    return type(first)(*columns) if hasattr(first, "_fields") else columns


def _is_annotations(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, Annotation) for value in values)


# ---- downloads and archives


def unpack(path: str) -> None:
    """Extract an archive, *.tar.gz, *.tar or *.zip, into its own folder.

    Members that would be written outside that folder are not allowed.

    Raises:
        NotImplementedError: another extension.
    """
    folder = os.path.split(path)[0] or "."
    if path.endswith((".tar.gz", ".tar")):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
    elif path.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    else:
        raise NotImplementedError(f"{path} is not an archive of a known kind: give a .tar.gz, .tar or .zip")


def reporthook(bar: tqdm) -> Callable[..., None]:
    """Return a hook for `urllib.request.urlretrieve` that updates a progress bar."""

    def hook(b: int = 1, bsize: int = 1, tsize: int | None = None) -> None:
        if tsize is not None:
            bar.total = tsize
        bar.update(b * bsize - bar.n)

    return hook


def get_root(name: str) -> str:
    """Return the folder data/NAME, which is made if it does not exist."""
    root = os.path.join("data", name)
    os.makedirs(root, exist_ok=True)
    return root


def is_prepared(root: str | os.PathLike) -> bool:
    """Return whether `mark_prepared` was called for a folder."""
    return Path(root, ".ready").exists()


def mark_prepared(root: str | os.PathLike) -> None:
    """Mark a folder as complete, by the empty file `.ready`."""
    Path(root, ".ready").touch()


def prompt_download(file_: str, source: str, target_dir: str, content_dir: str | None = None) -> str:
    """Ask on the terminal for a file until it, or the folder of its content, exists; return its path."""
    path = os.path.join(target_dir, file_)
    content = None if content_dir is None else os.path.join(target_dir, content_dir)
    while not os.path.exists(path) and not (content and os.path.exists(content)):
        print(f"Please download {file_} from {source} to {path}.")
        if content:
            print(f"Or place its content into {content}.")
        input("Press Enter when done...")
    return path


def download_url(file_: str, url: str, target_dir: str) -> str:
    """Download an http(s) address into a folder and return the path of the file; see taming.util.download."""
    path = os.path.join(target_dir, file_)
    download(url, path)
    return path


def download_urls(urls: Mapping[str, str], target_dir: str) -> dict[str, str]:
    """Download addresses by file name into a folder, and return the paths by file name."""
    return {name: download_url(name, url, target_dir) for name, url in urls.items()}


# ---- crops


def quadratic_crop(x: np.ndarray, bbox: Sequence[float], alpha: float = 1.0) -> np.ndarray:
    """Crop a square around the centre of a box from an image (H, W, ...): (S, S, ...).

    S is `alpha` times the longer side of the box, at least 2. The image is reflected beyond its borders.

    Args:
        bbox: left, top, right, bottom in pixels.
    """
    height, width = x.shape[:2]
    left, top, right, bottom = np.clip(np.asarray(bbox, np.float32), 0, max(height, width)).tolist()
    side = max(2, int(alpha * max(right - left, bottom - top)))
    row, column = 0.5 * (top + bottom), 0.5 * (left + right)
    padding = int(np.ceil(-min(row - side, column - side, width - column - side, height - row - side)))
    if padding > 0:
        x = np.pad(x, [(padding, padding)] * 2 + [(0, 0)] * (x.ndim - 2), "reflect")
        row, column = row + padding, column + padding
    first_row, first_column = int(row - side / 2), int(column - side / 2)
    return x[first_row:first_row + side, first_column:first_column + side].copy()
