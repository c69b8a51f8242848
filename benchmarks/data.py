"""How fast image files become items, beside Pillow alone, out of tar shards, and through loader processes."""

import argparse
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.parts import Row, in_turn, pick, row
from taming.data.base import ImagePaths
from taming.data.files.lists import find_images
from taming.data.landscapes import Landscapes
from taming.data.shards import TarShards
from taming.data.shards.writer import pack
from taming.data.transforms.edges import canny, gray
from taming.images import from_uint8, to_uint8

LONGEST = 640  # pixels: files of a given folder whose longer side is another are left out


def data(options: argparse.Namespace) -> list[Row]:
    """JPEGs of 640 pixels to items of 256 x 256: one core, shards, loader processes."""
    size, count = pick(options, "pixels", 256, 64), 8 if options.quick else 100
    with TemporaryDirectory() as place, jpegs(options.folder, Path(place, "painted"), count) as paths:
        folder, packed = Path(place, "folder"), Path(place, "shards")
        folder.mkdir()
        for number, path in enumerate(paths):
            shutil.copy(path, folder / f"{number:06d}.jpg")
        for _ in pack(folder, packed, max_samples=max(1, len(paths) // 4)):
            pass
        files, shards = ImagePaths(find_images(folder), size), TarShards(packed, size)
        order = np.random.default_rng(0).permutation(len(paths)).tolist()
        edges = [plain(path, size) for path in paths[:20]]
        workers = options.workers
        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "Pillow alone": (len(paths), lambda: [plain(path, size) for path in paths]),
            "ImagePaths": (len(paths), lambda: [files.preprocess_image(path) for path in paths]),
            "folder, at random": (len(paths), lambda: [files[i] for i in order]),
            "shards, at random": (len(paths), lambda: [shards[i] for i in order]),
            "edges of images read before": (len(edges), lambda: [canny(gray(image)) for image in edges]),
            f"folder, {workers} loader processes": (8 * len(paths), lambda: through_workers(files, workers)),
        }
        agreement = [psnr(plain(path, size), files.preprocess_image(path)) for path in paths]
        found = in_turn(options, {name: way for name, (_, way) in ways.items()})
    against = {"ImagePaths": "Pillow alone", "shards, at random": "folder, at random"}
    rows = [
        row(f"{size} pixels, {name}", runs, images_per_s=ways[name][0] / runs.median,
            **({"speedup": runs.speedup(found[against[name]])} if name in against else {}))
        for name, runs in found.items()
    ]
    rows[1]["psnr_min_db"] = min(agreement)
    return rows


def through_workers(dataset: ImagePaths, workers: int) -> None:
    """Read a data set eight times over by loader processes, their start included."""
    indices = [*range(len(dataset))] * 8
    for _ in DataLoader(dataset, min(16, len(dataset)), sampler=indices, num_workers=workers):
        pass


@contextmanager
def jpegs(folder: Path | None, place: Path, count: int) -> Iterator[list[str]]:
    """Yield the paths of so many JPEGs: of a folder, or landscapes that are painted to `place`."""
    if folder is not None:
        found = [path for path in find_images(folder, (".jpg", ".jpeg")) if max(size_of(path)) == LONGEST]
        if not found:
            raise ValueError(f"no JPEG in {folder} has a longer side of {LONGEST} pixels")
        yield found[:count]
        return
    place.mkdir()
    painted = Landscapes([480, LONGEST], split="train", length=count, cache=False)
    paths = [str(place / f"{i:06d}.jpg") for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(to_uint8(painted[i]["image"])).save(path, quality=90)
    yield paths


def size_of(path: str) -> tuple[int, int]:
    """Return width and height of an image file."""
    with Image.open(path) as image:
        return image.size


def plain(path: str, size: int) -> np.ndarray:
    """Read one image by Pillow alone: (size, size, 3) float32 in [-1, 1]."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    scale = size / min(width, height)
    w, h = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (w - size) // 2, (h - size) // 2
    image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return from_uint8(np.asarray(image))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal to noise, in dB, of two images in [-1, 1], compared as 8 bits."""
    error = np.mean((to_uint8(first).astype(float) - to_uint8(second)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


PARTS = {"data": data}
