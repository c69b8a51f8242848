"""Drawing tools of the built-in landscapes: fractal lines, smooth noise and an antialiased canvas, in numpy.

A scene is described in units of the image height, so that it looks the same at any size: y runs from 0 (top)
to 1 (bottom), x is 0 in the middle and W / (2 H) at the right edge; a wider image shows more of a scene.
Edges are antialiased by their analytic coverage of a pixel, which is much faster than supersampling.

H W pixels, h w a window of them, O octaves, K stars.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

Array = np.ndarray
Generator = np.random.Generator
Colour = tuple[float, float, float] | Array

TABLE = 64  # lattice points of one octave of 1-D noise; it repeats after that many
ROWS, COLUMNS = 16, 32  # lattice points of one octave of 2-D noise


def smoothstep(low: float, high: float, value: Array) -> Array:
    """Rise from 0 at `low` to 1 at `high` with flat ends."""
    t = np.clip((value - low) * (1.0 / (high - low)), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def rgb(colour: Colour) -> Array:
    """Return a colour (3,) in [0, 1] as float32 (3, 1, 1), to blend it with planes."""
    return np.asarray(colour, np.float32).reshape(3, 1, 1)


def mix(first: Array, second: Array | float | np.floating, weight: float | Array) -> Array:
    """Blend linearly: `first` at weight 0, `second` at weight 1."""
    return first + (second - first) * weight


def fractal(
    rng: Generator, x: Array, frequency: float, *, octaves: int, finest: float, gain: float = 0.5,
    smooth: bool = False,
) -> Array:
    """Return 1-D value noise, one row per octave; the sum of all rows is a line, that of a few a smooth one.

    Args:
        x: (W,) positions in image heights.
        frequency: lattice points per image height of the first octave; it doubles with each one.
        finest: highest frequency that the pixels can show; octaves above it fade out (their random numbers
            are generated all the same, so that every size shows the same scene).
        gain: amplitude of an octave relative to that of the one before.
        smooth: round hills instead of straight slopes with sharp peaks.

    Returns:
        (O, W) float32; the first row lies in [-1, 1].
    """
    table = rng.random((octaves, TABLE), dtype=np.float32) * 2.0 - 1.0
    offset = rng.random((octaves, 1), dtype=np.float32) * TABLE
    scale = frequency * 2.0 ** np.arange(octaves, dtype=np.float32)[:, None]
    weight = gain ** np.arange(octaves, dtype=np.float32)[:, None] * np.clip(2.0 - scale / finest, 0.0, 1.0)
    position = x.astype(np.float32) * scale + offset
    cell = np.floor(position)
    part = position - cell
    if smooth:
        part = part * part * (3.0 - 2.0 * part)
    index = cell.astype(np.int64)
    row = np.arange(octaves)[:, None] * TABLE
    flat = table.ravel()
    left, right = flat[index % TABLE + row], flat[(index + 1) % TABLE + row]
    return (left + (right - left) * part) * weight


def _hat(position: Array, count: int) -> Array:
    """Return the weights (N, count) of the periodic lattice points 0..count-1 at positions (N,)."""
    away = np.abs((position[:, None] - np.arange(count, dtype=np.float32) + count / 2) % count - count / 2)
    near = np.clip(1.0 - away, 0.0, 1.0)
    return near * near * (3.0 - 2.0 * near)


def field(
    rng: Generator, y: Array, x: Array, frequency: tuple[float, float], *, octaves: int, gain: float = 0.5
) -> Array:
    """Return smooth 2-D noise (h, w), about [-1, 1], on a grid with rows y (h,) and columns x (w,).

    An octave is one small product of matrices, since the interpolation of a lattice is separable.
    """
    total = np.zeros((len(y), len(x)), np.float32)
    for octave in range(octaves):
        table = rng.random((ROWS, COLUMNS), dtype=np.float32) * 2.0 - 1.0
        down, along = rng.random(2, dtype=np.float32) * (ROWS, COLUMNS)
        rows = _hat((y * (frequency[0] * 2**octave) + down).astype(np.float32), ROWS)
        columns = _hat((x * (frequency[1] * 2**octave) + along).astype(np.float32), COLUMNS)
        total += (rows @ (table * gain**octave)) @ columns.T
    return total


class Canvas:
    """Planes to paint on from far to near: colour, and on request label, depth and object.

    Attributes:
        rgb: (3, H, W) float32 in [0, 1].
        label: (H, W) uint8, label of the topmost object; None unless `extras`.
        depth: (H, W) float32, 0 near to 1 far; None unless `extras`.
        owner: (H, W) int16, number of the topmost of `things`, counted from 1, or 0; None unless `extras`.
        things: kinds of the single objects painted so far, such as "palm".
        y: (H, 1) and x: (W,), centres of the pixels in image heights.
    """

    margin = 0.9  # image heights of ridge beyond either edge, for shadows that fall into the image

    def __init__(self, height: int, width: int, extras: bool = False) -> None:
        self.height, self.width = height, width
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
        self.x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / height
        beyond = int(np.ceil(self.margin * height))
        self.inside = slice(beyond, beyond + width)
        self.wide = (np.arange(-beyond, width + beyond, dtype=np.float32) + 0.5 - width / 2) / height
        self.finest = height / 3  # three pixels to a lattice cell
        self.rgb = np.zeros((3, height, width), np.float32)
        self.label = np.zeros((height, width), np.uint8) if extras else None
        self.depth = np.ones((height, width), np.float32) if extras else None
        self.owner = np.zeros((height, width), np.int16) if extras else None
        self.things: list[str] = []
        self._thing = 0  # number of the object that is being painted

    def line(self, rng: Generator, frequency: float, **kwargs: Any) -> Array:
        """Generate `fractal` octaves for this canvas, margins included: (O, W + 2 margins)."""
        return fractal(rng, self.wide, frequency, finest=self.finest, **kwargs)

    @contextmanager
    def thing(self, kind: str) -> Iterator[None]:
        """Count what is painted in the block as one object of a kind."""
        self.things.append(kind)
        self._thing = len(self.things)
        yield
        self._thing = 0

    def window(self, left: float, right: float, top: float, bottom: float) -> tuple[slice, slice]:
        """Return the pixels that a box, in image heights, can touch: (rows, columns), perhaps empty."""
        middle = self.width / 2
        vertical = top * self.height - 1, bottom * self.height + 2
        horizontal = left * self.height + middle - 1, right * self.height + middle + 2
        rows = slice(*(int(np.clip(v, 0, self.height)) for v in vertical))
        return rows, slice(*(int(np.clip(v, 0, self.width)) for v in horizontal))

    def edge(self, distance: Array, steepness: float | Array = 1.0) -> Array:
        """Return the coverage of a pixel whose centre is `distance` image heights inside an edge: [0, 1]."""
        return np.clip(distance * (self.height / steepness) + 0.5, 0.0, 1.0)

    def below(self, ridge: Array) -> tuple[tuple[slice, slice], Array]:
        """Return the window and the coverage (h, W) of the area below a line (W + 2 margins,) or (W,)."""
        if len(ridge) != self.width:
            ridge = ridge[self.inside]
        slope = np.gradient(ridge) * self.height if self.width > 1 else np.zeros(1)
        rows = slice(int(np.clip(ridge.min() * self.height - 2, 0, self.height)), self.height)
        steep = np.sqrt(1.0 + np.minimum(slope * slope, 9.0)).astype(np.float32)
        return (rows, slice(None)), self.edge(self.y[rows] - ridge.astype(np.float32), steep)

    def paint(
        self, window: tuple[slice, slice], cover: Array, colour: Array, label: int | None = None,
        depth: float | Array | None = None,
    ) -> None:
        """Blend a colour (3, 1 or h, 1 or w) into a window by its coverage (h, w); set label and depth."""
        rows, columns = window
        target = self.rgb[:, rows, columns]
        target += cover * (colour - target)
        if self.label is None or self.owner is None or self.depth is None or label is None:
            return
        covered = cover > 0.5
        self.label[rows, columns] = np.where(covered, label, self.label[rows, columns])
        self.owner[rows, columns] = np.where(covered, self._thing, self.owner[rows, columns])
        if depth is not None:
            far = self.depth[rows, columns]
            far += cover * (depth - far)

    def relief(
        self, rng: Generator, window: tuple[slice, slice], ridge: Array, gist: Array, *, side: float,
        wobble: float, sharp: float, lean: float = 0.0,
    ) -> Array:
        """Return the light on each pixel under a ridge, (h, W) in [0, 1]: bright flanks face the sun.

        The border between two flanks starts at a peak of `gist` (the line without its small octaves), and
        runs down with random turns.

        Args:
            side: +1 for light from the right, -1 from the left.
            wobble: size of the turns, in image heights.
            sharp: slope of the ridge at which a flank is fully lit or dark; less gives more contrast.
            lean: how far the borders lean sideways per image height of descent.
        """
        rows = window[0]
        y = self.y[rows]
        slope = np.gradient(gist) * self.height  # image y grows downwards: positive falls to the right
        drop = np.maximum(y - ridge[self.inside], 0.0)
        bend = field(rng, self.y[rows, 0], self.x, (6.0, 3.0), octaves=3)
        where = self.x + wobble * bend * np.minimum(drop * 12.0, 1.0) + lean * drop
        falls = np.interp(where, self.wide, slope).astype(np.float32)
        return smoothstep(-sharp, sharp, falls * side)

    def stars(self, rng: Generator, amount: int = 400, lowest: float = 0.62) -> Array:
        """Return the light of small stars (H, W), spread over eight image heights; one sum of Gaussians."""
        x, y, bright = rng.random((3, amount), dtype=np.float32)
        x, y = x * 8.0 - 4.0, y * lowest
        seen = np.abs(x) < self.width / (2 * self.height) + 0.02
        x, y, bright = x[seen], y[seen], bright[seen] ** 4
        radius = 0.0035 + 0.0045 * bright
        spread = radius**2 + (0.45 / self.height) ** 2  # no star is sharper than a pixel
        power = (0.35 + 0.9 * bright) * radius**2 / spread * np.clip((lowest - y) * 4.0, 0.0, 1.0)
        rows = np.exp(-((self.y - y) ** 2) / spread) * power  # (H, K)
        columns = np.exp(-((self.x[:, None] - x) ** 2) / spread)  # (W, K)
        return rows @ columns.T

    def mirror(self, top: float, squeeze: float = 1.0) -> Array:
        """Return the reflection in still water below y = `top`: (3, h, W), the rows above it upside down."""
        start = int(np.clip(np.floor(top * self.height), 0, self.height - 1))
        y = self.y[start:, 0]
        source = np.clip((2 * top - y - (squeeze - 1) * (y - top)) * self.height - 0.5, 0, max(start - 1, 0))
        upper = np.floor(source).astype(int)
        lower = np.minimum(upper + 1, max(start - 1, 0))
        return mix(self.rgb[:, upper], self.rgb[:, lower], (source - upper).astype(np.float32)[:, None])
