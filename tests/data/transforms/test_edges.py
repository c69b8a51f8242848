"""Edges are thin, lie where the image changes, and weak ones count only beside strong ones."""

import numpy as np
import pytest

from taming.data.transforms.edges import _hysteresis, canny, gray


def test_a_step_is_one_line_at_its_place():
    image = np.full((40, 50), -1.0)
    image[:, 25:] = 1.0
    image[:, 25] = 0.0  # the steepest place
    edges = canny(image, sigma=1.0)
    assert edges.shape == (40, 50) and edges.dtype == bool
    assert edges[1:-1, 25].all() and edges.sum() == 38
    assert not edges[0].any() and not edges[-1].any()
    assert np.array_equal(canny(image.T, sigma=1.0), edges.T)


@pytest.mark.parametrize("radius", [8, 14])
def test_a_disk_gives_a_thin_closed_circle_of_its_radius(radius):
    y, x = np.mgrid[:48, :48] - 23.5
    distance = np.hypot(x, y)
    edges = canny(np.clip(radius - distance, -1, 1), sigma=2)  # a soft rim
    found = distance[edges]
    assert abs(found.mean() - radius) < 0.4 and np.ptp(found) < 1.5
    assert 0.7 < edges.sum() / (2 * np.pi * radius) < 1.3
    angles = np.sort(np.arctan2(y, x)[edges])
    assert np.diff(angles).max() < 3 / radius  # no gap of more than three pixels


def test_mirrored_and_turned_images_have_mirrored_and_turned_edges():
    rng = np.random.default_rng(0)
    image = np.kron(rng.uniform(-1, 1, (6, 8)), np.ones((8, 8)))
    edges = canny(image)
    assert 0.03 < edges.mean() < 0.3
    for move in (np.flipud, np.fliplr, np.transpose, lambda a: np.rot90(a, 2)):
        moved = canny(np.ascontiguousarray(move(image)))
        assert (moved != move(edges)).mean() < 0.01  # ties aside


def test_thresholds_are_gradients():
    ramp = np.tile(np.linspace(-1, 1, 41), (20, 1))
    ramp[:, 20:] += 0.5  # a step of 0.5 and no other edge
    assert canny(ramp, 1.0, 0.9, 1.0).sum() > 10  # the blurred step has about 0.5 * 8 / (2 * 1.25)
    assert canny(ramp, 1.0, 2.4, 2.5).sum() == 0
    assert canny(np.zeros((9, 9))).sum() == 0
    with pytest.raises(ValueError, match="got the shape"):
        canny(np.zeros((9, 9, 3)))
    with pytest.raises(ValueError, match="0 <= low <= high, got 2.0, 0.3 and 0.2"):
        canny(np.zeros((9, 9)), 2.0, 0.3, 0.2)


def test_hysteresis_keeps_whole_regions_with_a_strong_pixel():
    image = np.array([list(row) for row in (
        "w...ww..",
        ".w....w.",
        "..S....w",
        "........",
        "wwwwwww.",
        "......w.",
        ".S.wwww.",
        "...w....",
    )])
    weak, strong = image != ".", image == "S"
    kept = np.array([list(row) for row in (
        "1.......",
        ".1......",
        "..1.....",
        "........",
        "........",
        "........",
        ".1......",
        "........",
    )]) == "1"
    assert np.array_equal(_hysteresis(weak, strong), kept)
    strong[7, 3] = True  # the far end of a long winding line
    kept |= (image == "w") & (np.arange(8) >= 4)[:, None]
    assert np.array_equal(_hysteresis(weak, strong), kept)
    assert not _hysteresis(np.zeros((3, 3), bool), np.zeros((3, 3), bool)).any()


def test_gray_weighs_green_most():
    image = np.zeros((1, 3, 3), np.float32)
    image[0, [0, 1, 2], [0, 1, 2]] = 1
    assert np.allclose(gray(image), [[0.2125, 0.7154, 0.0721]])
