"""Trees of the built-in landscapes: far lines of conifers, and single conifers, cacti and palms near the eye.

Each takes a scene, the position of its foot and its height in image heights, and `build`: random numbers in
[0, 1) that determine its shape.
"""

from collections.abc import Iterator

import numpy as np

from taming.data.landscapes.sky import Scene
from taming.data.landscapes.terrain import TABLE, Array, Colour, Generator, smoothstep

NEAR = 0.03  # depth of objects in front


def treeline(rng: Generator, x: Array, spacing: float, height: float) -> Array:
    """Return the height of a row of conifers, one every `spacing`, at x (W,): (W,) float32 <= `height`."""
    tall, jitter = rng.random((2, TABLE), dtype=np.float32)
    offset = rng.random() * TABLE
    place = x / spacing + offset
    cell = np.floor(place).astype(np.int64)
    cells = cell + np.arange(-1, 2)[:, None]  # (3, W): a tree may be wider than its cell
    index = cells % TABLE
    away = np.abs(place - (cells + 0.5 + 0.8 * (jitter[index] - 0.5)))
    tops = np.maximum((0.4 + 0.6 * tall[index] ** 1.5) - away * 0.85, 0.0)
    return (height * tops.max(0)).astype(np.float32)


def scatter(
    scene: Scene, pitch: float, chance: float, offset: float = 0.0, jitter: float = 1.0, overhang: float = 0.3
) -> Iterator[tuple[float, Array]]:
    """Sample positions over the image's width, at most one every `pitch`: yield x and five numbers in [0, 1).

    The number of random numbers does not depend on the width.
    """
    numbers = scene.rng.random((TABLE, 7))
    half = scene.canvas.width / (2 * scene.canvas.height) + overhang
    for cell in range(int(np.floor(-half / pitch)), int(np.ceil(half / pitch)) + 1):
        wins, shift, *rest = numbers[cell % TABLE]
        x = (cell + 0.5 + jitter * (shift - 0.5)) * pitch + offset
        if wins < chance and abs(x) < half:
            yield x, np.asarray(rest)


def _visible(window: tuple[slice, slice]) -> bool:
    """Return whether a window holds any pixel."""
    return all(part.stop > part.start for part in window)


def conifer(
    scene: Scene, x: float, foot: float, height: float, build: Array, colour: Colour, label: int,
    depth: float = NEAR,
) -> None:
    """Paint one spruce in tiers, lit from the side of the sun."""
    canvas = scene.canvas
    wide = height * (0.19 + 0.07 * build[0])
    tiers = 5.0 + 2.5 * build[1]
    window = canvas.window(x - wide, x + wide, foot - height, foot)
    if not _visible(window):
        return
    along = (canvas.y[window[0]] - (foot - height)) / height  # (h, 1), 0 at the top
    across = canvas.x[window[1]] - x
    part = along * 0.94 * tiers
    tooth = part - np.floor(part)
    half = wide * np.clip(along * 1.06, 0.0, 1.0) * (0.62 + 0.38 * tooth)
    half = np.where(along > 0.93, 0.10 * wide, half)
    cover = canvas.edge(half - np.abs(across), 1.3) * canvas.edge(along * height)
    cover = cover * canvas.edge((1.0 - along) * height)
    shine = smoothstep(-0.7, 0.9, across * scene.side / wide + 0.55 * (tooth - 0.5))
    with canvas.thing("spruce"):
        canvas.paint(window, cover, scene.far(scene.lit(colour, 0.15 + 0.75 * shine), depth), label, depth)


def cactus(
    scene: Scene, x: float, foot: float, height: float, build: Array, colour: Colour, label: int
) -> None:
    """Paint one saguaro: a trunk and two bent arms, strokes with round ends."""
    canvas = scene.canvas
    least, spread = np.asarray((0.35, 0.35, 0.15, 0.20)), np.asarray((0.2, 0.2, 0.15, 0.15))
    left, right, low, high = least + spread * build[:4]
    reach = 0.24 * height
    window = canvas.window(x - 0.4 * height, x + 0.4 * height, foot - height * 1.1, foot)
    if not _visible(window):
        return
    px, py = canvas.x[window[1]] - x, foot - canvas.y[window[0]]  # up is positive
    strokes = [(0.0, 0.0, 0.0, height * 0.93, 0.075)]
    for side, joint, rise in ((-1.0, left * height, low * height), (1.0, right * height, high * height)):
        end = side * reach
        strokes += [(0.0, joint, end, joint, 0.05), (end, joint, end, joint + rise, 0.05)]
    depths = []
    for x0, y0, x1, y1, thick in strokes:  # distance to a vertical or horizontal stroke
        away = np.sqrt((px - np.clip(px, min(x0, x1), max(x0, x1))) ** 2 + (py - np.clip(py, y0, y1)) ** 2)
        depths.append(thick * height - away)
    cover = canvas.edge(np.maximum.reduce(depths))
    shine = smoothstep(-0.25, 0.35, px * scene.side / (0.3 * height))
    with canvas.thing("cactus"):
        canvas.paint(window, cover, scene.lit(colour, 0.1 + 0.7 * shine), label, NEAR)


def palm(
    scene: Scene, x: float, foot: float, height: float, build: Array, colour: Colour, label: int
) -> None:
    """Paint one palm: a bent, tapering trunk and a crown of drooping fronds."""
    canvas = scene.canvas
    bend = (0.44 * build[0] - 0.22) * height
    fronds = np.random.default_rng(int(build[1] * 2**32)).random((8, 2))
    span = 0.50 * height
    top = foot - height
    window = canvas.window(min(x, x + bend) - span, max(x, x + bend) + span, top - 0.3 * span, foot)
    if not _visible(window):
        return
    px, py = canvas.x[window[1]], canvas.y[window[0]]
    up = np.clip((foot - py) / height, 0.0, 1.0)
    trunk = canvas.edge(height * (0.034 - 0.014 * up) - np.abs(px - x - bend * up * up))
    trunk = trunk * canvas.edge(foot - py) * canvas.edge(py - top)
    wood = scene.lit((0.46, 0.34, 0.24), 0.45)
    leaves = []
    for k, (length, lift) in enumerate(fronds):
        side = 1.0 if k % 2 else -1.0
        reach = span * (0.62 + 0.38 * length)
        rise = (0.9 - 0.42 * (k // 2) + 0.15 * lift) * reach
        t = (px - x - bend) * side / reach
        spine = top - rise * t + 1.15 * reach * t * t
        thick = 0.16 * reach * np.sqrt(np.clip(t, 0.0, 1.0)) * np.clip(1.0 - t, 0.0, 1.0) + 0.006
        steep = np.sqrt(1.0 + (2.3 * t - rise / reach) ** 2)  # keeps the width of a frond where it hangs
        leaf = canvas.edge(thick * steep - np.abs(py - spine), steep) * ((t > -0.03) & (t < 1.0))
        leaves.append(leaf)
    shine = smoothstep(-1.0, 1.0, (px - x - bend) * scene.side / span) * np.ones_like(py)
    with canvas.thing("palm"):
        canvas.paint(window, trunk, wood, label, NEAR)
        canvas.paint(window, np.maximum.reduce(leaves), scene.lit(colour, 0.25 + 0.5 * shine), label, NEAR)
