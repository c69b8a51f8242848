"""A built-in image set: painted landscapes of sixteen kinds, drawn on the fly. No files, no download.

It lets a newcomer train both stages without data (`make demo`), and offers conditions of every kind: a class,
a segmentation, a depth map. What is painted stands in `scenery.py` and `sky.py`, the pens in
`terrain.py` and `plants.py`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from torch.utils.data import Dataset

from taming.data.scenery import PAINTERS, draw
from taming.data.sky import LABELS, LIGHTS
from taming.data.terrain import Canvas
from taming.images import from_uint8

KEYS = ("image", "class_label", "segmentation", "depth", "human_label")
SPLITS = ("train", "validation")
SMALLEST = 32  # pixels; below that trees and waves are narrower than a pixel


def _class_names(biomes: Sequence[str], times: Sequence[str]) -> tuple[str, ...]:
    """Name every biome at every time, such as "mountains at sunset"; biomes vary slowest."""
    return tuple(f"{biome} {'by' if time == 'day' else 'at'} {time}" for biome in biomes for time in times)


class Landscapes(Dataset):
    """Landscapes of four biomes at four times of day; item i is of class i % 16, its details are its own.

    Items hold, as `keys` says:
        image: (H, W, 3) float32 in [-1, 1].
        class_label: int, biome * 4 + time.
        segmentation: (H, W, 10) float32, one-hot over `Landscapes.labels`.
        depth: (H, W, 1) float32 in [-1, 1], near -1, far (the sky) 1.
        human_label: the name of the class, such as "mountains at sunset".

    A scene depends on (seed, split, index) alone and is the same at every size; a wider image shows more
    of it.

    Args:
        size: pixels of a square image, or [H, W]; at least 32 each.
        length: number of items.
        seed: which set of scenes; a whole number, not negative.
        split: "train" or "validation"; their scenes differ.
        keys: what an item holds.
        cache: keep what was drawn in memory, 3 bytes a pixel for images, so that a second epoch is free.
            Each worker process of a loader keeps its own, and loses it unless `persistent_workers` is on.

    Raises:
        ValueError: an argument is out of its range; the message says which and what would do.
    """

    biomes = tuple(PAINTERS)  # mountains, desert, forest, coast
    times = tuple(LIGHTS)  # dawn, day, sunset, night
    class_names = _class_names(biomes, times)
    labels = LABELS

    def __init__(
        self,
        size: int | Sequence[int] = 64,
        length: int = 4000,
        *,
        seed: int = 0,
        split: str = "train",
        keys: Sequence[str] = ("image", "class_label"),
        cache: bool = False,
    ):
        self.height, self.width = _height_width(size)
        if length < 1:
            raise ValueError(f"length is {length}; a data set needs at least 1 item")
        if seed < 0:
            raise ValueError(f"seed is {seed}; give a whole number that is not negative")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        keys = (keys,) if isinstance(keys, str) else tuple(keys)
        unknown = [key for key in keys if key not in KEYS]
        if unknown:
            raise ValueError(f"keys name {', '.join(map(repr, unknown))}; choose from {', '.join(KEYS)}")
        self.length, self.seed, self.split, self.keys = int(length), int(seed), split, keys
        self._cache: dict[int, dict[str, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is outside of {self.length} items")
        index %= self.length
        label = index % len(self.class_names)
        pixels = self._pixels(index)
        make = {
            "image": lambda: from_uint8(pixels["image"]),
            "class_label": lambda: label,
            "segmentation": lambda: np.eye(len(self.labels), dtype=np.float32)[pixels["segmentation"]],
            "depth": lambda: from_uint8(pixels["depth"])[..., None],
            "human_label": lambda: self.class_names[label],
        }
        return {key: make[key]() for key in self.keys}

    def _pixels(self, index: int) -> dict[str, np.ndarray]:
        """Draw, or find in the cache, the uint8 planes (H, W, ...) of one item that `keys` asks for."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        planes: dict[str, np.ndarray] = {}
        wanted = {"image", "segmentation", "depth"} & set(self.keys)
        if wanted:
            canvas = self._draw(index, extras=wanted != {"image"})
            if "image" in wanted:
                planes["image"] = np.rint(canvas.rgb * 255.0).astype(np.uint8).transpose(1, 2, 0)
            if "segmentation" in wanted:
                planes["segmentation"] = canvas.label
            if "depth" in wanted:
                planes["depth"] = np.rint(np.clip(canvas.depth, 0.0, 1.0) * 255.0).astype(np.uint8)
        if self._cache is not None:
            self._cache[index] = planes
        return planes

    def _draw(self, index: int, extras: bool) -> Canvas:
        """Paint scene number `index` with a generator of its own."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        biome, time = divmod(index % len(self.class_names), len(self.times))
        canvas = Canvas(self.height, self.width, extras)
        draw(canvas, rng, self.biomes[biome], self.times[time])
        return canvas


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Read a size: one number for a square, or two (OmegaConf lists too)."""
    pair = tuple(size) if isinstance(size, Iterable) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, (int, np.integer)) for n in pair):
        raise ValueError(f"size is {size!r}; give one whole number or [height, width]")
    if min(pair) < SMALLEST:
        raise ValueError(f"size is {size!r}; height and width must be at least {SMALLEST} pixels")
    return int(pair[0]), int(pair[1])
