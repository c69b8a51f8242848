"""Poses: the 17 joints of COCO, drawn as limb maps, and as tokens.

P people, K = 17 joints, H W pixels, M tokens. A joint is x, y (pixels; continuous, x = 0 is the left edge of
the image, x = W its right one) and its visibility: 0 not given, 1 hidden, 2 visible; 1 and 2 are treated
alike. A joint outside the image counts as not given, as after a crop (`JointParams.points`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from taming.images import from_uint8

JOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee",
    "left_ankle", "right_ankle",
)
# The joint that each becomes in a mirrored image: `swap` of JointParams.points.
MIRRORED = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)

Colour = tuple[int, int, int]  # 0..255
# Joint, joint, colour; the right side of a person is warm, the left cold: front and back differ.
LIMBS: tuple[tuple[int, int, Colour], ...] = (
    (5, 11, (120, 200, 255)), (6, 12, (255, 200, 120)), (11, 12, (200, 200, 200)), (5, 6, (255, 255, 255)),
    (11, 13, (0, 120, 255)), (13, 15, (0, 60, 200)), (12, 14, (255, 80, 0)), (14, 16, (200, 30, 0)),
    (5, 7, (0, 230, 220)), (7, 9, (0, 190, 90)), (6, 8, (255, 220, 0)), (8, 10, (190, 150, 0)),
    (0, 1, (190, 120, 255)), (1, 3, (110, 60, 220)), (0, 2, (255, 120, 190)), (2, 4, (220, 40, 130)),
)
NECK = (220, 220, 220)  # from between the shoulders to the nose; COCO has no joint for it

_FINE = 4  # limbs are drawn that many times larger, and averaged


def as_people(keypoints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Convert joints (17, 3), (P, 17, 3) or COCO's flat lists of 51 to (P, 17, 3) float32, and check them.

    Joints outside the image, of `size` = (H, W) pixels, get the visibility 0.

    Raises:
        ValueError: another number of joints, or a given joint with coordinates that are not finite.
    """
    points = np.asarray(keypoints, dtype=np.float32)
    if points.ndim <= 2 and points.shape[-1:] == (3 * len(JOINTS),):
        points = points.reshape(-1, len(JOINTS), 3)
    points = points[None] if points.ndim == 2 else points
    if points.ndim != 3 or points.shape[1:] != (len(JOINTS), 3):
        raise ValueError(
            f"keypoints have the shape {np.shape(keypoints)}, but must be (17, 3) or (P, 17, 3): x, y and "
            "visibility of COCO's 17 joints"
        )
    given = points[..., 2] > 0
    if not np.isfinite(points[given]).all():
        raise ValueError("keypoints hold a joint whose coordinates are not finite: give it the visibility 0")
    height, width = size
    x, y = points[..., 0], points[..., 1]
    inside = given & (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
    points = points.copy()
    points[~inside, 2] = 0
    return points


def limb_map(keypoints: np.ndarray, size: tuple[int, int], thickness: float | None = None) -> np.ndarray:
    """Draw joints as coloured limbs on black: uint8 (H, W, 3).

    A limb is drawn if both of its joints are given. Later people cover earlier ones.

    Args:
        keypoints: see as_people.
        size: (H, W) in pixels.
        thickness: of a limb, in pixels; by default a 32nd of the shorter side, at least 1.5.
    """
    height, width = size
    thickness = thickness or max(1.5, min(size) / 32)
    canvas = Image.new("RGB", (width * _FINE, height * _FINE))
    draw = ImageDraw.Draw(canvas)
    for person in as_people(keypoints, size):
        shoulders = person[5:7]
        if (shoulders[:, 2] > 0).all() and person[0, 2] > 0:
            _stroke(draw, shoulders[:, :2].mean(0), person[0, :2], NECK, thickness)
        for first, second, colour in LIMBS:
            if person[first, 2] > 0 and person[second, 2] > 0:
                _stroke(draw, person[first, :2], person[second, :2], colour, thickness)
        for x, y, _ in person[person[:, 2] > 0]:  # joints without a limb too
            _dot(draw, *_fine((x, y)), (255, 255, 255), 0.35 * thickness * _FINE)
    return np.asarray(canvas.reduce(_FINE))


def _stroke(
    draw: ImageDraw.ImageDraw, start: np.ndarray, end: np.ndarray, colour: Colour, thickness: float
) -> None:
    ends = [_fine(start), _fine(end)]
    draw.line(ends, fill=colour, width=max(1, round(thickness * _FINE)))
    for x, y in ends:
        _dot(draw, x, y, colour, 0.5 * thickness * _FINE)


def _fine(point: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return a point of the large image; for Pillow, whole numbers are the centres of pixels."""
    return float(point[0]) * _FINE - 0.5, float(point[1]) * _FINE - 0.5


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, colour: Colour, radius: float) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


class PoseTokens:
    """Turns the joints of an image into M tokens, x and y of each joint, and back.

    A token b < no_bins is a position: b / no_bins to (b + 1) / no_bins of the image's width or height. The
    two tokens of a joint that is not given, or of a missing person, are no_bins.

    Args:
        no_bins: positions along a side.
        max_people: people that the sequence has room for; of more, the largest are taken.

    Raises:
        ValueError: no bins, or no room for a person.
    """

    kind = "pose"

    def __init__(self, no_bins: int = 64, max_people: int = 1) -> None:
        if no_bins < 1 or max_people < 1:
            raise ValueError(
                "poses need at least one bin and one person, got "
                f"no_bins={no_bins} and max_people={max_people}"
            )
        self.no_bins, self.max_people = no_bins, max_people

    @property
    def none(self) -> int:
        """The token of joints that are not given."""
        return self.no_bins

    @property
    def no_tokens(self) -> int:
        """V, the vocabulary."""
        return self.no_bins + 1

    @property
    def embedding_dim(self) -> int:
        """M, the number of tokens of every pose: its part of the transformer's block size."""
        return self.max_people * len(JOINTS) * 2

    def build(self, keypoints: np.ndarray, size: tuple[int, int]) -> Tensor:
        """Turn joints (see as_people) in an image of `size` = (H, W) pixels into M tokens, int64 (M,)."""
        people = as_people(keypoints, size)
        people = people[(people[..., 2] > 0).any(1)]
        largest = sorted(people, key=_extent, reverse=True)[: self.max_people]  # those of one size keep order
        tokens = np.full((self.max_people, len(JOINTS), 2), self.none, dtype=np.int64)
        for number, person in enumerate(largest):
            given = person[:, 2] > 0
            share = person[given, :2] / np.array(size[::-1], dtype=np.float32)
            tokens[number, given] = np.clip(share * self.no_bins, 0, self.no_bins - 1).astype(np.int64)
        return torch.from_numpy(tokens.reshape(-1))

    def inverse_build(self, tokens: Tensor | Sequence[int], size: tuple[int, int]) -> np.ndarray:
        """Turn M tokens into joints (max_people, 17, 3), float32, at the centres of their bins.

        Tokens of a larger vocabulary, which a transformer may sample, count as "not given".

        Raises:
            ValueError: another number of tokens.
        """
        row = torch.as_tensor(tokens).cpu().numpy()
        if row.shape != (self.embedding_dim,):
            raise ValueError(f"a pose has {self.embedding_dim} tokens here, got {row.shape}")
        bins = row.reshape(self.max_people, len(JOINTS), 2)
        given = ((bins >= 0) & (bins < self.no_bins)).all(-1)
        people = np.zeros((self.max_people, len(JOINTS), 3), dtype=np.float32)
        people[..., :2] = (bins + 0.5) / self.no_bins * np.array(size[::-1], dtype=np.float32)
        people[..., 2] = 2
        people[~given] = 0
        return people

    def plot(self, tokens: Tensor, figure_size: tuple[int, int]) -> Tensor:
        """Draw tokens (M,) as a limb map (3, height, width) in [-1, 1]; `figure_size` is (width, height)."""
        size = figure_size[::-1]
        pixels = limb_map(self.inverse_build(tokens, size), size)
        return from_uint8(torch.from_numpy(pixels.copy())).permute(2, 0, 1)

    def plot_batch(self, tokens: Tensor, figure_size: tuple[int, int]) -> Tensor:
        """Draw tokens (B, M) as limb maps (B, 3, height, width) in [-1, 1], on the CPU; see `plot`."""
        return torch.stack([self.plot(row, figure_size) for row in tokens.detach().cpu()])


def _extent(person: np.ndarray) -> float:
    """Return the area of the box around the given joints (17, 3)."""
    points = person[person[:, 2] > 0, :2]
    return float(np.prod(points.max(0) - points.min(0)))
