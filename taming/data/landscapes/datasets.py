"""A built-in data set: landscapes of sixteen classes, painted when they are read. No files, no download.

It lets a newcomer train both stages without data (`make demo`), and has conditions of every kind: a class, a
segmentation, a depth map, edges, the pose of a person, a layout of objects, coordinates, a smaller image, the
upper half. `scenery.py`, `sky.py`, `plants.py` and `people.py` paint, with the tools of `terrain.py`;
`objects.py` finds the boxes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from taming.data.conditional_builder.objects_bbox import BUILDERS
from taming.data.conditional_builder.utils import filter_annotations, rescale_annotations
from taming.data.helper_types import Annotation
from taming.data.landscapes.objects import CATEGORIES, MAX_OBJECTS, objects_of
from taming.data.landscapes.people import paint_person
from taming.data.landscapes.scenery import PAINTERS, draw
from taming.data.landscapes.sky import LABELS, LIGHTS
from taming.data.landscapes.terrain import Canvas
from taming.data.pose import PoseTokens, limb_map
from taming.data.sampler import seeded
from taming.data.transforms.edges import canny, gray
from taming.data.transforms.joint import JointParams, JointTransform, check_size
from taming.data.transforms.scale import shrink
from taming.data.utils import custom_collate
from taming.images import from_uint8

KEYS = (
    "image", "class_label", "segmentation", "depth", "human_label", "edges", "objects", "objects_bbox",
    "objects_center_points", "lr_image", "upper_half", "coord",
)
POSE_KEYS = ("keypoints", "pose", "pose_tokens")
SPLITS = ("train", "validation")
SMALLEST = 32  # pixels; below that trees and waves are narrower than a pixel
FIGURES = 0.8  # fraction of the scenes that show a person, if poses are asked for
NEEDS = {  # the planes of the whole scene that each key needs
    "image": {"image"}, "lr_image": {"image"}, "upper_half": {"image"}, "edges": {"edges"},
    "segmentation": {"segmentation"}, "depth": {"depth"}, "keypoints": {"keypoints"},
    "pose_tokens": {"keypoints"}, "pose": {"pose"}, "objects": {"objects"},
    "objects_bbox": {"objects"}, "objects_center_points": {"objects"},
}


def _class_names(biomes: Sequence[str], times: Sequence[str]) -> tuple[str, ...]:
    """Return the name of every biome at every time, such as "mountains at sunset"; biomes vary slowest."""
    return tuple(f"{biome} {'by' if time == 'day' else 'at'} {time}" for biome in biomes for time in times)


class Landscapes(Dataset):
    """Landscapes of four biomes at four times of day; item i is of class i % 16 and differs from all others.

    Items hold, as `keys` says (float32 unless it says otherwise):
        image: (H, W, 3) in [-1, 1].
        class_label: int, biome * 4 + time.
        segmentation: (H, W, 10), one-hot over `labels`; with `figures` there is an eleventh, "person".
        depth: (H, W, 1) in [-1, 1], near -1, far (the sky) 1.
        human_label: the name of the class, such as "mountains at sunset".
        edges: (H, W, 1), 1 on Canny edges, else -1.
        keypoints: (17, 3), the joints of the person as in `taming.data.pose`; all 0 without one.
        pose: (H, W, 3) in [-1, 1], these joints as a limb map, black without one.
        pose_tokens: int64 (34,), these joints as tokens of `PoseTokens(pose_bins)`.
        objects: list of Annotation, boxes in fractions of the image; categories in `category_names`.
        objects_bbox, objects_center_points: int64, the largest 12 of these as tokens of the conditional
            builders, in a random order that is always the same.
        lr_image: (H / lr_factor, W / lr_factor, 3) in [-1, 1].
        upper_half: (H / 2, W, 3) in [-1, 1].
        coord: (H, W, 1) in [0, 1), the row-major position of each pixel in the whole scene.

    A scene depends on (seed, split, index) alone and is the same at every size; a wider image shows more of
    it. A person, if there is one, is added in front of it. Random crops use torch's global generator.

    Args:
        size: pixels of a square image, or [H, W]; at least 32 each.
        length: number of items.
        seed: of all scenes; an integer, not negative.
        split: "train" or "validation"; their scenes differ.
        keys: what an item holds.
        cache: keep painted scenes in memory, 3 bytes a pixel for images, for later epochs. Each worker
            process of a loader keeps its own, and loses it unless `persistent_workers` is on.
        figures: fraction of the scenes with a person in front; None: 0.8 if keypoints, pose or pose_tokens
            are asked for, else 0. Give it to a first stage too, if its transformer is to generate people.
        crop_size: pixels of a crop, a side or [H, W]; the whole scene when None.
        random_crop: crop at a random position instead of the centre.
        lr_factor: how many times smaller "lr_image" is.
        pose_bins: positions along a side that "pose_tokens" distinguish; the vocabulary has one token more.

    Raises:
        ValueError: an argument is out of its range.
    """

    biomes = tuple(PAINTERS)  # mountains, desert, forest, coast
    times = tuple(LIGHTS)  # dawn, day, sunset, night
    class_names = _class_names(biomes, times)
    labels: tuple[str, ...] = LABELS
    category_names = CATEGORIES
    collate_fn = staticmethod(custom_collate)  # objects stay lists
    no_tokens = 512  # vocabulary of layouts: categories, and a grid of 22x22 places

    def __init__(
        self,
        size: int | Sequence[int] = 64,
        length: int = 4000,
        *,
        seed: int = 0,
        split: str = "train",
        keys: Sequence[str] = ("image", "class_label"),
        cache: bool = False,
        figures: float | None = None,
        crop_size: int | Sequence[int] | None = None,
        random_crop: bool = False,
        lr_factor: int = 4,
        pose_bins: int = 64,
    ) -> None:
        self.height, self.width = _height_width(size)
        if length < 1:
            raise ValueError(f"length is {length}; a data set needs at least 1 item")
        if seed < 0:
            raise ValueError(f"seed is {seed}; give an integer that is not negative")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        self.keys = _known_keys(keys)
        self.figures = _fraction_of_figures(figures, self.keys)
        if self.figures > 0:
            self.labels = (*LABELS, "person")
        crop = check_size("crop_size", tuple(crop_size) if isinstance(crop_size, Iterable) else crop_size)
        if crop and (crop[0] > self.height or crop[1] > self.width):
            raise ValueError(
                f"crop_size is {crop[0]}x{crop[1]} (height x width), but size only {self.height}x{self.width}"
            )
        if not 1 <= lr_factor <= min(crop or (self.height, self.width)):
            raise ValueError(f"lr_factor is {lr_factor}; give an integer from 1 to the size of the image")
        if pose_bins < 1:
            raise ValueError(f"pose_bins is {pose_bins}; give at least 1 position along a side")
        self.length, self.seed, self.split, self.lr_factor = int(length), int(seed), split, lr_factor
        self.pose_bins = pose_bins
        self._transform = JointTransform(None, crop, random_crop) if crop else None
        self._builders: dict[str, Any] | None = None
        self._cache: dict[int, dict[str, Any]] | None = {} if cache else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        index = int(index)
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is outside of {self.length} items")
        index %= self.length
        label = index % len(self.class_names)
        planes = self._planes(index)
        params = self._params()

        def cut(key: str) -> np.ndarray:  # uint8 (H, W, ...)
            return params.mask(planes[key])

        def joints() -> np.ndarray:
            return params.points(planes["keypoints"])

        make = {
            "image": lambda: from_uint8(cut("image")),
            "class_label": lambda: label,
            "segmentation": lambda: np.eye(len(self.labels), dtype=np.float32)[cut("segmentation")],
            "depth": lambda: from_uint8(cut("depth"))[..., None],
            "human_label": lambda: self.class_names[label],
            "edges": lambda: from_uint8(cut("edges"))[..., None],
            "keypoints": joints,
            "pose": lambda: from_uint8(cut("pose")),
            "pose_tokens": lambda: self.conditional_builders["pose_tokens"].build(joints(), params.shape),
            "objects": lambda: _transformed(planes["objects"], params),
            "objects_bbox": lambda: self._layout("objects_bbox", planes["objects"], params, index),
            "objects_center_points": lambda: self._layout(
                "objects_center_points", planes["objects"], params, index
            ),
            "lr_image": lambda: from_uint8(shrink(cut("image"), self.lr_factor)),
            "upper_half": lambda: from_uint8(cut("image")[: params.shape[0] // 2]),
            "coord": params.coord,
        }
        return {key: make[key]() for key in self.keys}

    def _params(self) -> JointParams:
        """Sample the crop of a scene."""
        size = self.height, self.width
        return self._transform.get_params(*size) if self._transform else JointParams(size, size, (0, 0), size)

    def _planes(self, index: int) -> dict[str, Any]:
        """Paint, or find in the cache, what `keys` needs of one whole scene: uint8 planes (H, W, ...)."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        planes: dict[str, Any] = {}
        wanted = set().union(*(NEEDS.get(key, set()) for key in self.keys))
        if wanted:
            canvas, joints = self._paint(index, extras=bool(wanted & {"segmentation", "depth", "objects"}))
            if wanted & {"image", "edges"}:
                planes["image"] = np.rint(canvas.rgb * 255.0).astype(np.uint8).transpose(1, 2, 0)
            if "segmentation" in wanted:
                planes["segmentation"] = canvas.label
            if "depth" in wanted:
                assert canvas.depth is not None
                planes["depth"] = np.rint(np.clip(canvas.depth, 0.0, 1.0) * 255.0).astype(np.uint8)
            if "edges" in wanted:  # blurred by 1 pixel of 64, so that every size has the same edges
                found = canny(gray(from_uint8(planes["image"])), sigma=max(1.0, self.height / 64))
                planes["edges"] = found.astype(np.uint8) * 255
            if "keypoints" in wanted:
                planes["keypoints"] = joints
            if "pose" in wanted:
                planes["pose"] = limb_map(joints, (self.height, self.width))
            if "objects" in wanted:
                planes["objects"] = objects_of(canvas, index)
        if self._cache is not None:
            self._cache[index] = planes
        return planes

    def _paint(self, index: int, extras: bool) -> tuple[Canvas, np.ndarray]:
        """Paint scene number `index` with its own generator; return it and the joints (17, 3)."""
        key = (self.seed, SPLITS.index(self.split), index)
        biome, time = divmod(index % len(self.class_names), len(self.times))
        canvas = Canvas(self.height, self.width, extras)
        scene = draw(canvas, np.random.default_rng(key), self.biomes[biome], self.times[time])
        if self.figures > 0:
            rng = np.random.default_rng((*key, 1))  # another generator: the scene stays the same
            if rng.random() < self.figures:
                return canvas, paint_person(scene, rng)
        return canvas, np.zeros((17, 3), np.float32)

    # ---- layouts

    @property
    def conditional_builders(self) -> dict[str, Any]:
        """The builders of tokens of objects and joints, by the key of items."""
        if self._builders is None:
            sizes = len(self.category_names), MAX_OBJECTS, self.no_tokens
            self._builders = {key: builder(*sizes, False, False, False) for key, builder in BUILDERS.items()}
            self._builders["pose_tokens"] = PoseTokens(self.pose_bins)
        return self._builders

    def plot_conditionals(self, key: str, tokens: Tensor, figure_size: tuple[int, int]) -> Tensor:
        """Draw tokens (B, M) of the kind `key` as images (B, 3, height, width) in [-1, 1]."""
        builder = self.conditional_builders[key]
        if key == "pose_tokens":
            return builder.plot_batch(tokens, figure_size)
        return builder.plot_batch(tokens, self.label_for_plot, figure_size)

    def label_for_plot(self, category_no: int) -> str:
        """Return a category's name, or its number where there is no such category (sampled layouts)."""
        known = category_no < len(self.category_names)
        return self.category_names[category_no] if known else str(category_no)

    def _layout(self, key: str, objects: list[Annotation], params: JointParams, index: int) -> Tensor:
        shown = _transformed(objects, params)
        with seeded(self.seed, SPLITS.index(self.split), index):  # the builder shuffles
            return self.conditional_builders[key].build(shown)


def _transformed(objects: Sequence[Annotation], params: JointParams) -> list[Annotation]:
    """Return the objects that a crop shows, with boxes in fractions of the crop."""
    if params.shape == params.source:
        return list(objects)
    (height, width), (top, left) = params.source, params.corner
    crop = left / width, top / height, params.shape[1] / width, params.shape[0] / height
    shown = rescale_annotations(filter_annotations(objects, crop), crop, False)
    return [annotation._replace(area=annotation.bbox[2] * annotation.bbox[3]) for annotation in shown]


def _known_keys(keys: str | Sequence[str]) -> tuple[str, ...]:
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    unknown = [key for key in keys if key not in KEYS + POSE_KEYS]
    if unknown:
        raise ValueError(
            f"keys name {', '.join(map(repr, unknown))}; choose from {', '.join(KEYS + POSE_KEYS)}"
        )
    return keys


def _fraction_of_figures(figures: float | None, keys: tuple[str, ...]) -> float:
    posed = [key for key in keys if key in POSE_KEYS]
    if figures is None:
        return FIGURES if posed else 0.0
    if not 0 <= figures <= 1 or (posed and figures == 0):
        why = f", and above 0 for {', '.join(posed)}" if posed else ""
        raise ValueError(f"figures is {figures}; give a fraction of the scenes, 0 to 1{why}")
    return float(figures)


def _height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a size: one number for a square, or two (OmegaConf lists too)."""
    pair = tuple(size) if isinstance(size, Iterable) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, (int, np.integer)) for n in pair):
        raise ValueError(f"size is {size!r}; give one integer or [height, width]")
    if min(pair) < SMALLEST:
        raise ValueError(f"size is {size!r}; height and width must be at least {SMALLEST} pixels")
    return int(pair[0]), int(pair[1])
