"""The contents of the built-in landscapes: four biomes, each painted from far to near.

Colours are sRGB triples in [0, 1]; lengths are in image heights, y down from the top (see `terrain.py`).
"""

from collections.abc import Callable

import numpy as np

from taming.data.landscapes import sky
from taming.data.landscapes.plants import cactus, conifer, palm, scatter, treeline
from taming.data.landscapes.sky import GRASS, ROCK, SAND, TREES, WATER, Scene
from taming.data.landscapes.terrain import Array, Canvas, Colour, Generator, field, mix, rgb, smoothstep


def paint_range(
    scene: Scene, base: float, height: float, depth: float, colour: Colour, *, frequency: float, snow: float,
    hero: float = 0.0,
) -> None:
    """Paint one mountain range whose line varies by `height` around y = `base`, with snow above y = `snow`.

    `hero` is how far one great peak, somewhere near the middle, rises above the others.
    """
    canvas, rng = scene.canvas, scene.rng
    lines = canvas.line(rng, frequency, octaves=7, gain=0.48)
    lines[1] += hero / height * np.maximum(1.0 - 2.6 * np.abs(canvas.wide - scene.uniform(-0.34, 0.34)), 0.0)
    ridge = base - height * lines.sum(0)
    gist = base - height * lines[:3].sum(0)
    window, cover = canvas.below(ridge)
    shine = canvas.relief(
        rng, window, ridge, gist, side=scene.side, wobble=0.06, sharp=0.45 * height * frequency
    )
    fade = depth + (1.0 - depth) * 0.55 * smoothstep(base - height, base + 0.22, canvas.y[window[0]])
    canvas.paint(window, cover, scene.far(scene.lit(colour, shine), fade), sky.MOUNTAIN, depth)
    tongues = canvas.line(rng, 9.0, octaves=3, gain=0.6)[:, canvas.inside].sum(0)
    lie = snow + 0.05 * tongues - 0.06 * (shine - 0.5)  # more snow on the shaded flank
    white = cover * smoothstep(-0.012, 0.012, lie - canvas.y[window[0]])
    snowy = scene.far(scene.lit((1.15, 1.1, 1.05), 0.2 + shine), depth * 0.45)
    canvas.paint(window, white, snowy, sky.SNOW, depth)


def paint_hill(
    scene: Scene, line: Array, depth: float, colour: Colour, label: int, *, shine: float = 0.5,
    mist: float = 0.0, trees: tuple[float, float] | None = None,
) -> None:
    """Paint a plain slope below a line (W + margins,), which fades into mist, of strength `mist`, downwards.

    `trees` is the spacing and the height of conifers on it, in image heights.
    """
    canvas = scene.canvas
    tall = trees[1] if trees else 0.0
    window, cover = canvas.below(line - treeline(scene.rng, canvas.wide, *trees) if trees else line)
    drop = np.clip((canvas.y[window[0]] - line[canvas.inside] + tall) * 5.0, 0.0, 1.0).astype(np.float32)
    faded = scene.far(scene.lit(colour, shine), np.minimum(depth + mist * drop, 1.0))
    canvas.paint(window, cover, faded, label, depth)


def paint_water(scene: Scene, top: float, colour: Colour, *, mirror: float, far: float) -> None:
    """Paint water from y = `top` to the bottom: its own colour, its reflections, the path of the light."""
    canvas, light, rng = scene.canvas, scene.light, scene.rng
    upside = canvas.mirror(top, squeeze=1.15)
    start = canvas.height - upside.shape[1]
    window = (slice(start, None), slice(None))
    drop = np.maximum(canvas.y[start:] - top, 0.0)  # (h, 1)
    along = np.log2(1.0 + drop[:, 0] * 18.0)  # ripples grow towards the viewer
    ripple = field(rng, along * 4.0, canvas.x, (1.0, 2.6), octaves=2)
    calm = np.clip(drop * canvas.height * 0.08, 0.0, 1.0)  # ripples narrower than a pixel are not drawn
    near = np.clip(drop / (1.0 - top), 0.0, 1.0)
    body = scene.far(scene.lit(colour, 0.55), far * (1.0 - near))
    colours = mix(body, upside, mirror * (1.0 - 0.45 * near)) * (1.0 + 0.09 * calm * ripple)
    path = np.exp(-(((canvas.x - scene.sun[0]) / (0.045 + 0.22 * drop)) ** 2))
    glitter = path * smoothstep(-0.35, 0.55, ripple * calm + 0.25 * (1.0 - calm)) * (1.0 - 0.5 * near)
    colours = mix(colours, rgb(light.orb), glitter * (0.5 if light.starry else 0.62))
    cover = canvas.edge(canvas.y[start:] - top) + np.zeros_like(canvas.x)
    canvas.paint(window, cover, np.clip(colours, 0.0, 1.0), WATER, 0.85 * (1.0 - near) ** 1.5 + 0.05)


def at(scene: Scene, line: Array, x: float) -> float:
    """Return y of a line (W + margins,) at x."""
    return float(np.interp(x, scene.canvas.wide, line))


def mountains(scene: Scene) -> None:
    """Paint snowy peaks in several ranges, wooded foothills, and a lake or a meadow in front."""
    canvas, rng = scene.canvas, scene.rng
    lake = rng.random() < 0.6
    shore = scene.uniform(0.72, 0.78)
    paint_range(scene, scene.uniform(0.44, 0.50), 0.10, 0.95, (0.42, 0.50, 0.62), frequency=2.2, snow=0.43)
    paint_range(
        scene, scene.uniform(0.50, 0.54), 0.15, 0.60, (0.40, 0.43, 0.52), frequency=1.8, snow=0.50,
        hero=scene.uniform(0.20, 0.28),
    )
    paint_range(scene, scene.uniform(0.62, 0.66), 0.13, 0.36, (0.32, 0.36, 0.42), frequency=1.9, snow=0.50)
    hill = shore - 0.05 - 0.03 * canvas.line(rng, 1.6, octaves=4, smooth=True).sum(0)
    paint_hill(scene, hill, 0.22, (0.16, 0.32, 0.26), TREES, mist=0.25, trees=(0.028, 0.065))
    if lake:
        paint_water(scene, shore, (0.16, 0.38, 0.50), mirror=0.72, far=0.3)
    meadow = (0.90 if lake else 0.80) + 0.035 * canvas.line(rng, 1.1, octaves=2, smooth=True).sum(0)
    paint_hill(scene, meadow, 0.06, (0.34, 0.50, 0.24), GRASS, shine=0.6)
    for x, build in scatter(scene, 0.17, scene.uniform(0.3, 0.75)):
        foot = at(scene, meadow, x) + 0.05
        conifer(scene, x, foot, 0.14 + 0.10 * build[2], build, (0.10, 0.24, 0.18), TREES)


def desert(scene: Scene) -> None:
    """Paint table mountains on the horizon, dunes with sharp crests and one bright flank, perhaps cacti."""
    canvas, rng = scene.canvas, scene.rng
    for depth, base, rise in ((0.85, 0.60, 0.13), (0.6, 0.635, 0.17)):
        lines = canvas.line(rng, 1.6, octaves=5, gain=0.42, smooth=True).sum(0)
        table = smoothstep(0.05, 0.20, lines) * 0.75 + smoothstep(0.5, 0.58, lines) * 0.25
        ridge = base - rise * table - 0.012 * lines
        window, cover = canvas.below(ridge)
        gist = base - 0.12 * lines
        shine = canvas.relief(rng, window, ridge, gist, side=scene.side, wobble=0.06, sharp=0.35)
        strata = 0.06 * np.sin(canvas.y[window[0]] * 110.0) * min(1.0, canvas.height / 128)
        rock = scene.far(scene.lit((0.70, 0.36, 0.26), shine + strata), depth)
        canvas.paint(window, cover, rock, ROCK, depth)
    tops = (0.61, 0.68, 0.77, 0.88)
    lean = 2.2 * scene.side
    for k, top in enumerate(tops):
        depth = 0.45 * (1.0 - k / len(tops)) ** 1.3
        lines = canvas.line(rng, 1.5 - 0.2 * k, octaves=3, gain=0.35)
        swing = 0.022 + 0.022 * k
        ridge = top - swing * soften(lines.sum(0), 0.035 * canvas.height)
        gist = soften(ridge, 0.07 * canvas.height)  # softens the oblique border of the shade
        window, cover = canvas.below(ridge)
        shine = canvas.relief(
            rng, window, ridge, gist, side=scene.side, wobble=0.05, sharp=0.5 * swing, lean=lean
        )
        drop = np.clip((canvas.y[window[0]] - ridge[canvas.inside]) * 3.5, 0.0, 1.0).astype(np.float32)
        shine = mix(shine, np.float32(0.62), drop)  # near the foot of a dune the sand reflects light
        colour = mix(np.asarray((0.95, 0.66, 0.40)), np.asarray((0.98, 0.74, 0.46)), rng.random())
        dune = scene.far(scene.lit(colour, 0.15 + 0.95 * shine), depth)
        canvas.paint(window, cover, dune, SAND, depth * 0.9)
        if k == 2:
            for x, build in scatter(scene, 0.26, 0.45):
                foot = at(scene, ridge, x) + 0.03
                cactus(scene, x, foot, 0.13 + 0.11 * build[4], build, (0.20, 0.38, 0.20), TREES)


def soften(line: Array, radius: float) -> Array:
    """Smooth a line (N,) with a window of `radius` pixels: (N,) float32."""
    reach = int(np.ceil(radius))
    weights = np.maximum(1.0 + np.cos(np.pi * np.arange(-reach, reach + 1) / radius), 0.0)
    weights[np.abs(np.arange(-reach, reach + 1)) > radius] = 0.0
    padded = np.pad(line, reach, mode="edge")
    return np.convolve(padded, weights / weights.sum(), mode="valid").astype(np.float32)


def forest(scene: Scene) -> None:
    """Paint rows of conifers in mist, one behind the other, and a clearing framed by tall trees."""
    canvas, rng = scene.canvas, scene.rng
    hue = rng.random()
    green = mix(np.asarray((0.14, 0.40, 0.24)), np.asarray((0.26, 0.44, 0.16)), hue)
    ranks = ((0.36, 0.88, 0.026, 0.06), (0.46, 0.64, 0.036, 0.10), (0.58, 0.40, 0.052, 0.15))
    for top, depth, spacing, height in ranks:
        hill = top + 0.06 - 0.075 * canvas.line(rng, 1.2, octaves=2, smooth=True).sum(0)
        mist = 0.36 * (0.3 + depth)
        paint_hill(scene, hill, depth, green, TREES, shine=0.55, mist=mist, trees=(spacing, height))
    meadow = 0.87 + 0.03 * canvas.line(rng, 1.0, octaves=2, smooth=True).sum(0)
    paint_hill(scene, meadow, 0.04, (0.42, 0.58, 0.20), GRASS, shine=0.65)
    for x, build in scatter(scene, 0.075, 0.85):
        foot = at(scene, meadow, x) + 0.02
        conifer(scene, x, foot, 0.16 + 0.16 * build[2], build, 0.8 * green, TREES, 0.16)
    for offset in (-0.06, 0.06):
        for x, build in scatter(scene, 0.92, 0.8, offset, 0.2):
            conifer(scene, x, 0.92 + 0.10 * build[3], 0.42 + 0.30 * build[2], build, 0.58 * green, TREES)


def coast(scene: Scene) -> None:
    """Paint the open sea with the path of the light, a headland, a beach with surf, perhaps palms."""
    canvas, rng = scene.canvas, scene.rng
    sea = scene.horizon
    way = -1.0 if rng.random() < 0.5 else 1.0  # the side of the headland
    headlands = (0.75, scene.uniform(-0.15, 0.2), 0.10), (0.42, scene.uniform(0.1, 0.35), 0.20)
    for depth, reach, rise in headlands:
        lines = canvas.line(rng, 2.0, octaves=6, gain=0.45).sum(0)
        grow = smoothstep(reach, reach + 0.35, canvas.wide * way)
        ridge = sea + 0.01 - grow * rise * (0.75 + 0.35 * lines)
        window, cover = canvas.below(ridge)
        shine = canvas.relief(rng, window, ridge, sea - 0.2 * lines, side=scene.side, wobble=0.05, sharp=0.4)
        canvas.paint(window, cover, scene.far(scene.lit((0.36, 0.42, 0.34), shine), depth), ROCK, depth)
    paint_water(scene, sea, (0.05, 0.50, 0.66), mirror=0.45, far=0.55)
    tilt = scene.uniform(-0.20, 0.20)
    wave = canvas.line(rng, 1.4, octaves=3, gain=0.4, smooth=True).sum(0)
    shore = scene.uniform(0.79, 0.85) + tilt * np.clip(canvas.wide, -0.8, 0.8) + 0.03 * wave
    swell = canvas.line(rng, 2.2, octaves=2, smooth=True).sum(0)
    for back, strength in ((0.085 + 0.012 * swell, 0.5), (0.035 + 0.008 * swell, 0.95)):
        crest = shore - back
        window, cover = canvas.below(crest)
        thick = np.clip((canvas.y[window[0]] - crest[canvas.inside]) / 0.035, 0.0, 1.0)
        foam = (cover * strength * (1.0 - thick)).astype(np.float32)
        canvas.paint(window, foam, scene.lit((1.0, 1.0, 1.0), 0.9))
    window, cover = canvas.below(shore)
    dry = smoothstep(0.0, 0.10, canvas.y[window[0]] - shore[canvas.inside]).astype(np.float32)
    sand = mix(scene.lit((0.80, 0.66, 0.50), 0.6), scene.lit((0.98, 0.87, 0.66), 0.75), dry)
    canvas.paint(window, cover, sand, SAND, 0.05)
    for x, build in scatter(scene, 0.55, 0.28, jitter=0.7):
        palm(scene, x, at(scene, shore, x) + 0.08, 0.40 + 0.20 * build[2], build, (0.10, 0.34, 0.16), TREES)


PAINTERS: dict[str, Callable[[Scene], None]] = {
    "mountains": mountains, "desert": desert, "forest": forest, "coast": coast,
}
HORIZONS = {"mountains": 0.62, "desert": 0.66, "forest": 0.50, "coast": 0.54}
CLOUDS = {"mountains": 0.62, "desert": 0.40, "forest": 0.45, "coast": 0.72}


def draw(canvas: Canvas, rng: Generator, biome: str, time: str) -> Scene:
    """Paint one scene, which the generator determines, on a canvas, which determines the part that is shown.

    Returns the scene, for further objects.
    """
    light = sky.LIGHTS[time]
    half = 0.40 * min(1.0, canvas.width / canvas.height)  # in a portrait the sun stays in view
    low, high = light.height
    across, up, cloudy = rng.random(3)
    sun = float((2 * across - 1) * half), float(low + (high - low) * up)
    scene = Scene(canvas, rng, light, HORIZONS[biome], sun, 1.0 if across > 0.5 else -1.0)
    if biome == "forest" and time in ("dawn", "sunset"):  # otherwise the trees hide the sun
        scene.sun = (scene.sun[0], scene.sun[1] - 0.12)
    sky.paint_sky(scene, CLOUDS[biome] * (0.35 + 0.65 * cloudy), moonlit=light.starry)
    PAINTERS[biome](scene)
    np.clip(canvas.rgb, 0.0, 1.0, out=canvas.rgb)
    return scene
