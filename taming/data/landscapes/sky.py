"""The light and the sky of the built-in landscapes: four times of day, the scene, sun and clouds.

Colours are sRGB triples in [0, 1]; lengths are in image heights, y down from the top (see `terrain.py`).
"""

from dataclasses import dataclass

import numpy as np

from taming.data.landscapes.terrain import Array, Canvas, Colour, Generator, field, mix, rgb, smoothstep

LABELS = ("sky", "sun or moon", "cloud", "mountain", "snow", "water", "trees", "grass", "sand", "rock")
SKY, SUN, CLOUD, MOUNTAIN, SNOW, WATER, TREES, GRASS, SAND, ROCK = range(len(LABELS))


@dataclass(frozen=True)
class Light:
    """The light of one time of day.

    Attributes:
        sky: colours from the zenith to the horizon, evenly spaced.
        orb, glow: colours of the sun or the moon, and of the light around it.
        key, ambient: light on lit flanks only, and everywhere; they multiply the colour of an object.
        haze: colour of what is far; `fog` is its share in the farthest layer, 0 to 1.
        cloud: colours of the lit and the shaded side of a cloud.
        height: range of y of the sun or moon; `radius` is its radius, `bloom` that of the glow.
        drain: desaturation of objects, 0 to 1.
        starry: whether there are stars.
    """

    sky: tuple[Colour, ...]
    orb: Colour
    glow: Colour
    key: Colour
    ambient: Colour
    haze: Colour
    fog: float
    cloud: tuple[Colour, Colour]
    height: tuple[float, float]
    radius: float
    bloom: float
    drain: float = 0.0
    starry: bool = False


LIGHTS = {
    "dawn": Light(
        sky=((0.50, 0.62, 0.82), (0.72, 0.73, 0.86), (0.95, 0.78, 0.80), (1.00, 0.88, 0.76)),
        orb=(1.0, 0.99, 0.93), glow=(0.12, 0.10, -0.04), key=(0.56, 0.42, 0.36), ambient=(0.50, 0.48, 0.60),
        haze=(0.94, 0.82, 0.83), fog=0.82, cloud=((1.0, 0.90, 0.86), (0.82, 0.72, 0.82)),
        height=(0.34, 0.44), radius=0.055, bloom=0.30,
    ),
    "day": Light(
        sky=((0.13, 0.42, 0.80), (0.28, 0.58, 0.90), (0.54, 0.78, 0.96), (0.82, 0.93, 0.98)),
        orb=(1.0, 1.0, 0.90), glow=(0.34, 0.28, 0.14), key=(0.62, 0.59, 0.50), ambient=(0.44, 0.49, 0.56),
        haze=(0.70, 0.85, 0.96), fog=0.66, cloud=((1.0, 1.0, 1.0), (0.74, 0.82, 0.91)),
        height=(0.10, 0.20), radius=0.050, bloom=0.22,
    ),
    "sunset": Light(
        sky=((0.23, 0.13, 0.38), (0.62, 0.20, 0.42), (0.95, 0.42, 0.28), (1.00, 0.76, 0.32)),
        orb=(1.0, 0.93, 0.62), glow=(0.50, 0.24, 0.04), key=(0.68, 0.36, 0.16), ambient=(0.28, 0.18, 0.30),
        haze=(0.98, 0.56, 0.32), fog=0.70, cloud=((1.0, 0.62, 0.36), (0.52, 0.20, 0.38)),
        height=(0.34, 0.45), radius=0.085, bloom=0.34,
    ),
    "night": Light(
        sky=((0.02, 0.03, 0.11), (0.04, 0.07, 0.20), (0.08, 0.14, 0.32), (0.16, 0.25, 0.46)),
        orb=(0.97, 0.96, 0.86), glow=(0.16, 0.20, 0.26), key=(0.38, 0.44, 0.60), ambient=(0.13, 0.16, 0.29),
        haze=(0.16, 0.24, 0.44), fog=0.74, cloud=((0.26, 0.33, 0.50), (0.09, 0.13, 0.27)),
        height=(0.11, 0.24), radius=0.055, bloom=0.20, drain=0.45, starry=True,
    ),
}


@dataclass
class Scene:
    """One scene that is being painted: the canvas, its random numbers and its light."""

    canvas: Canvas
    rng: Generator
    light: Light
    horizon: float
    sun: tuple[float, float]
    side: float

    def uniform(self, low: float, high: float) -> float:
        """Sample one number."""
        return low + (high - low) * self.rng.random()

    def lit(self, colour: Colour, shine: float | Array = 0.5) -> Array:
        """Return a colour in this light: `shine` 0 in the shade, 1 in full light (a number or (h, w))."""
        base = rgb(colour)
        base = mix(base, base.mean(), self.light.drain)
        return np.minimum(base * (rgb(self.light.ambient) + rgb(self.light.key) * shine), 1.0)

    def far(self, colour: Array, depth: float | Array) -> Array:
        """Return a colour faded into the haze (aerial perspective): `depth` 0 near, 1 at the horizon."""
        return mix(colour, rgb(self.light.haze), self.light.fog * depth)


def paint_sky(scene: Scene, clouds: float, moonlit: bool) -> None:
    """Paint the gradient, stars, the sun or moon with its glow, and clouds; `clouds` 0 (none) to 1 (many)."""
    canvas, light, rng = scene.canvas, scene.light, scene.rng
    stops = np.asarray(light.sky, np.float32)
    place = np.clip(canvas.y[:, 0] / scene.horizon, 0.0, 1.0) * (len(stops) - 1)
    for plane, column in zip(canvas.rgb, stops.T, strict=True):
        plane[:] = np.interp(place, np.arange(len(stops)), column)[:, None]
    away = np.sqrt((canvas.x - scene.sun[0]) ** 2 + (canvas.y - scene.sun[1]) ** 2)
    if light.starry:
        canvas.rgb += canvas.stars(rng) * (away > light.radius) * rgb((0.95, 0.97, 1.0))
    glow = np.exp(away * (-1.0 / light.bloom)) + 0.6 * np.exp(-((away / (1.9 * light.radius)) ** 2))
    canvas.rgb += rgb(light.glow) * glow
    np.clip(canvas.rgb, 0.0, 1.0, out=canvas.rgb)
    disc = canvas.edge(light.radius - away)
    if moonlit:  # a crescent: the disc without another one
        bite = scene.side * light.radius * scene.uniform(0.55, 1.05)
        shadow = np.sqrt((canvas.x - scene.sun[0] + bite) ** 2 + (canvas.y - scene.sun[1] + 0.3 * bite) ** 2)
        disc = disc * (1.0 - canvas.edge(light.radius - shadow))
    everywhere = (slice(None), slice(None))
    with canvas.thing("moon" if moonlit else "sun"):
        canvas.paint(everywhere, disc, rgb(light.orb), SUN, 1.0)
    rows = canvas.window(0, 0, 0, scene.horizon)[0]
    y = canvas.y[rows]
    puffs = field(rng, (canvas.y[rows, 0] - 0.9) ** 2 * -0.9, canvas.x, (8.0, 2.4), octaves=4, gain=0.45)
    body = smoothstep(0.0, 0.30, puffs - (0.95 - 1.05 * clouds))
    body = body * np.clip((scene.horizon - y) * 6.0, 0.0, 1.0)
    shift = max(1, round(0.025 * canvas.height))
    above = np.concatenate([puffs[:1].repeat(shift, 0), puffs[:-shift]])[: len(puffs)]
    shine = smoothstep(-0.35, 0.45, puffs - above + 0.1)
    colour = mix(rgb(light.cloud[1]), rgb(light.cloud[0]), shine)
    canvas.paint((rows, slice(None)), 0.92 * body, colour, CLOUD, 0.97)
