"""A person in a built-in landscape: seventeen joints in a random pose, and how they are painted.

Points are in image heights, x from the middle of the image, y down from the top (see `terrain.py`); within a
person, in fractions of the person's height. A joint is x, y, visibility, in the order of `taming.data.pose`.
"""

import numpy as np

from taming.data.landscapes.plants import NEAR
from taming.data.landscapes.sky import Scene
from taming.data.landscapes.terrain import Array, Generator

PERSON = 10  # after the labels of taming.data.landscapes.sky
SKINS = ((0.95, 0.78, 0.66), (0.82, 0.60, 0.45), (0.56, 0.38, 0.27), (0.36, 0.24, 0.18))
SHIRTS = ((0.90, 0.15, 0.15), (0.95, 0.80, 0.15), (0.95, 0.95, 0.95), (0.15, 0.40, 0.90), (0.90, 0.40, 0.75))
TROUSERS = ((0.12, 0.16, 0.34), (0.22, 0.20, 0.20), (0.48, 0.36, 0.24), (0.10, 0.30, 0.26))
HAIR = (0.20, 0.14, 0.10)
# Lengths, in fractions of the height.
HEAD, NECK, TORSO, SHOULDER, HIP, UPPER_ARM, FOREARM, THIGH, SHANK = (
    0.068, 0.115, 0.28, 0.105, 0.060, 0.165, 0.155, 0.245, 0.235
)


def attitude(rng: Generator) -> tuple[Array, bool]:
    """Sample a pose: points (17, 2) in fractions of the height, soles at y = 0, up negative; and whether the
    person faces the viewer, so that their left is on the right.
    """
    facing = rng.random() < 0.7
    spread, bend = rng.uniform(-4, 26, 2), rng.uniform(-4, 24, 2)  # degrees, of the legs: left, right
    raised, elbow = rng.uniform(4, 165, 2), rng.uniform(-10, 95, 2)  # of the arms
    lean, nod = rng.uniform(-7, 7), rng.uniform(-10, 10)
    places = np.zeros((17, 2))
    trunk = _direction(180 + lean)  # from the hips up
    shoulders = TORSO * trunk
    skull = shoulders + NECK * _direction(180 + lean + nod)
    for side, sign in ((0, 1.0), (1, -1.0)):  # left, right; facing, the left has the larger x
        across = sign * np.array((np.cos(np.radians(lean)), np.sin(np.radians(lean))))
        places[5 + side] = shoulders + SHOULDER * across
        places[7 + side] = places[5 + side] + UPPER_ARM * _direction(sign * raised[side])
        places[9 + side] = places[7 + side] + FOREARM * _direction(sign * (raised[side] + elbow[side]))
        places[11 + side] = HIP * across
        places[13 + side] = places[11 + side] + THIGH * _direction(sign * spread[side])
        places[15 + side] = places[13 + side] + SHANK * _direction(sign * (spread[side] - bend[side]))
        places[1 + side] = skull + (0.40 * HEAD * across - (0.0, 0.25 * HEAD))
        places[3 + side] = skull + 0.95 * HEAD * across
    places[0] = skull + (0.0, 0.10 * HEAD)
    places[:, 1] -= places[15:, 1].max() + 0.03  # the lower foot stands on the ground
    if not facing:
        places[:, 0] *= -1.0
    return places, facing


def _direction(degrees: float) -> Array:
    """Return the unit vector (2,) at an angle from straight down, positive towards growing x."""
    return np.array((np.sin(np.radians(degrees)), np.cos(np.radians(degrees))))


def paint_person(scene: Scene, rng: Generator) -> Array:
    """Paint one person in front of everything; return the joints (17, 3) in pixels, 0 for a hidden face."""
    canvas = scene.canvas
    places, facing = attitude(rng)
    x, y, tall = rng.uniform(-0.28, 0.28), rng.uniform(0.90, 0.975), rng.uniform(0.60, 0.85)
    x *= min(1.0, canvas.width / canvas.height)  # in a portrait the person stays in view
    skin, shirt, trousers = (
        scene.lit(colours[rng.integers(len(colours))], 0.75) for colours in (SKINS, SHIRTS, TROUSERS)
    )
    places = places * tall + (x, y)
    with canvas.thing("person"):
        _body(scene, places, tall, skin, shirt, trousers)
        skull = (places[3] + places[4]) / 2
        crown = skull - (0.0, 0.35 * HEAD * tall)
        hair = scene.lit(HAIR, 0.6)
        _limb(scene, crown, crown, HEAD * tall, HEAD * tall, hair)
        low = skull + (0.0, 0.15 * HEAD * tall)
        _limb(scene, low, low, 0.92 * HEAD * tall, 0.92 * HEAD * tall, skin if facing else hair)
    np.clip(canvas.rgb, 0.0, 1.0, out=canvas.rgb)
    joints = np.full((17, 3), 2.0, np.float32)
    joints[:, :2] = places * canvas.height + (canvas.width / 2, 0.0)
    if not facing:
        joints[:3] = 0.0  # nose and eyes
    outside = ~((joints[:, :2] >= 0) & (joints[:, :2] <= (canvas.width, canvas.height))).all(1)
    joints[outside] = 0.0
    return joints


def _body(scene: Scene, places: Array, tall: float, skin: Array, shirt: Array, trousers: Array) -> None:
    """Paint legs, trunk and arms."""
    for hip, knee, ankle in ((11, 13, 15), (12, 14, 16)):
        _limb(scene, places[hip], places[knee], 0.055 * tall, 0.042 * tall, trousers)
        _limb(scene, places[knee], places[ankle], 0.042 * tall, 0.030 * tall, trousers)
    shoulders, hips = places[5:7], places[11:13]
    for share in (0.15, 0.5, 0.85):  # three strokes from hips to shoulders fill the trunk
        top, bottom = (pair[0] + share * (pair[1] - pair[0]) for pair in (shoulders, hips))
        _limb(scene, top, bottom, 0.050 * tall, 0.046 * tall, shirt)
    _limb(scene, shoulders.mean(0), (places[3] + places[4]) / 2, 0.032 * tall, 0.032 * tall, skin)
    for shoulder, elbow, wrist in ((5, 7, 9), (6, 8, 10)):
        _limb(scene, places[shoulder], places[elbow], 0.036 * tall, 0.030 * tall, shirt)
        _limb(scene, places[elbow], places[wrist], 0.029 * tall, 0.024 * tall, skin)


def _limb(scene: Scene, start: Array, end: Array, thick: float, thin: float, colour: Array) -> None:
    """Paint a stroke with round ends, whose half width changes from `thick` to `thin`."""
    canvas = scene.canvas
    (left, top), (right, bottom) = np.minimum(start, end) - thick, np.maximum(start, end) + thick
    window = canvas.window(left, right, top, bottom)
    if any(part.stop <= part.start for part in window):
        return
    px, py = canvas.x[window[1]] - start[0], canvas.y[window[0]] - start[1]
    step = end - start
    length = float(step @ step)
    along = np.clip((px * step[0] + py * step[1]) / length, 0.0, 1.0) if length else np.zeros_like(px + py)
    away = np.hypot(px - along * step[0], py - along * step[1])
    cover = canvas.edge(thick + (thin - thick) * along - away).astype(np.float32)
    canvas.paint(window, cover, colour, PERSON, NEAR)
