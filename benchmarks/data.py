#!/usr/bin/env python
"""How fast pictures become items, beside Pillow alone, and out of tar shards, on one core.

    python benchmarks/data.py FOLDER_OF_JPEGS
    python benchmarks/data.py FOLDER_OF_JPEGS --size 128 --limit 200

The ways run in turn over the same files, again and again, and medians are shown, since other work on the
machine disturbs single runs. What comes out is compared as well. README.md in this folder says what the
numbers mean.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image

from taming.data.base import ImagePaths
from taming.data.files.lists import find_images
from taming.data.shards import TarShards
from taming.data.shards.writer import pack
from taming.data.transforms.edges import canny, gray
from taming.images import from_uint8, to_uint8

T = TypeVar("T")
Rates = dict[str, list[float]]  # of each way, images a second


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
    """Peak signal to noise, in dB, of two pictures in [-1, 1], compared as 8 bits."""
    error = np.mean((to_uint8(first).astype(float) - to_uint8(second)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def rate(read: Callable[[T], object], wanted: Sequence[T]) -> float:
    """Images a second."""
    start = time.perf_counter()
    for one in wanted:
        read(one)
    return len(wanted) / (time.perf_counter() - start)


def in_turn(ways: dict[str, Callable[[T], object]], wanted: Sequence[T], repeats: int) -> Rates:
    """Images a second of each way, measured one after the other, again and again."""
    rates: Rates = {name: [] for name in ways}
    for _ in range(repeats):
        for name, read in ways.items():
            rates[name].append(rate(read, wanted))
    return rates


def ratio(rates: Rates, new: str, old: str) -> float:
    """How much faster one way is than another: the median over pairs of neighbouring runs."""
    return median(n / o for n, o in zip(rates[new], rates[old], strict=True))


def decoding(paths: list[str], size: int, repeats: int) -> dict[str, object]:
    """Measure both ways in turn, and the worst and the mean agreement of their pictures."""
    data = ImagePaths(paths, size)
    agreement = [psnr(plain(path, size), data.preprocess_image(path)) for path in paths]  # also warms up
    ways = {"pillow": lambda path: plain(path, size), "taming": data.preprocess_image}
    rates = in_turn(ways, paths, repeats)
    finite = [value for value in agreement if value < math.inf]
    return {
        "images": len(paths), "size": size,
        "pillow_images_per_s": median(rates["pillow"]), "taming_images_per_s": median(rates["taming"]),
        "speedup": ratio(rates, "taming", "pillow"),
        "psnr_min_db": min(agreement), "psnr_mean_db": sum(finite) / len(finite) if finite else math.inf,
        "all_images_per_s": rates,
    }


def shards(paths: list[str], size: int, repeats: int) -> dict[str, object]:
    """Measure reading the files, copied into a folder, and the same out of tar shards, in random order."""
    with TemporaryDirectory() as place:
        folder, packed = Path(place, "folder"), Path(place, "shards")
        folder.mkdir()
        for number, path in enumerate(paths):
            shutil.copy(path, folder / f"{number:06d}{Path(path).suffix}")
        for _ in pack(folder, packed, max_samples=max(1, len(paths) // 4)):
            pass
        data = {"folder": ImagePaths(find_images(folder), size), "shards": TarShards(packed, size)}
        order = np.random.default_rng(0).permutation(len(paths)).tolist()
        ways = {name: each.__getitem__ for name, each in data.items()}
        in_turn(ways, order, 1)  # warms up
        rates = in_turn(ways, order, repeats)
    return {"shards_to_folder": ratio(rates, "shards", "folder"), "all_stored_images_per_s": rates}


def edges(paths: list[str], size: int) -> dict[str, object]:
    """Measure finding the edges of pictures of this size, without reading them."""
    pictures = {path: plain(path, size) for path in paths[:20]}
    found = rate(lambda path: canny(gray(pictures[path])), list(pictures))
    return {"edges_images_per_s": found}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write results/data_<date>.json."""
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("folder", help="JPEG files; those whose longest side is --longest are taken")
    parser.add_argument("--size", type=int, default=256, help="pixels of the pictures made; default: 256")
    parser.add_argument("--longest", type=int, default=640, help="pixels; 0 takes every image; default: 640")
    parser.add_argument("--limit", type=int, default=100, help="most images; default: 100")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way; default: 5")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/data_<date>.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    paths = [
        path for path in find_images(options.folder, (".jpg", ".jpeg"))
        if not options.longest or max(Image.open(path).size) == options.longest
    ][:options.limit]
    if not paths:
        parser.error(f"no JPEG in {options.folder} has a longest side of {options.longest} pixels")
    results = {
        "date": time.strftime("%Y-%m-%d %H:%M"), "cores": os.cpu_count(), "load_average": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
        "pillow": PIL.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
        **decoding(paths, options.size, options.repeats), **shards(paths, options.size, options.repeats),
        **edges(paths, options.size),
    }
    for key, value in results.items():
        print(f"{key:22} {value:.4g}" if isinstance(value, float) else f"{key:22} {value}")
    file = options.out or Path(__file__).parent / "results" / f"data_{time.strftime('%Y-%m-%d_%H-%M')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
