"""Images in and out: the round trip of all pixels, the grid, PNG files."""

import numpy as np
import pytest
import torch
from PIL import Image

from taming.images import (
    from_pil,
    from_uint8,
    image_grid,
    is_complete_png,
    is_own_png,
    load_png,
    save_png,
    text_pictures,
    to_pil,
    to_uint8,
)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_every_pixel_survives_the_round_trip(kind):
    pixels = kind(list(range(256)))
    pixels = pixels.astype(np.uint8) if kind is np.array else pixels.to(torch.uint8)
    images = from_uint8(pixels)
    assert (float(images[0]), float(images[255])) == (-1.0, 1.0)
    assert str(images.dtype).endswith("float32")
    assert to_uint8(images).tolist() == list(range(256))


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_values_outside_are_clamped_and_others_rounded(kind):
    half = 0.5 / 127.5 - 1.0
    assert to_uint8(kind([-3.0, 3.0, half + 1e-4, half - 1e-4])).tolist() == [0, 255, 1, 0]


def test_grid_puts_images_in_rows_on_white():
    images = torch.stack([torch.full((3, 2, 4), value) for value in (-1.0, -0.5, 0.0)])
    grid = image_grid(images, columns=2, padding=1)
    assert grid.shape == (3, 2 * 3 + 1, 2 * 5 + 1)
    assert (grid[:, 1:3, 1:5] == -1.0).all() and (grid[:, 1:3, 6:10] == -0.5).all()
    assert (grid[:, 4:6, 1:5] == 0.0).all()
    assert (grid[:, 4:6, 6:10] == 1.0).all() and (grid[:, 0] == 1.0).all()  # the empty place, the border
    assert image_grid(images).shape == (3, 2 * 4 + 2, 2 * 6 + 2)  # two columns by default
    assert image_grid(images, columns=9).shape[2] == 3 * 6 + 2  # no more columns than images


def test_grid_needs_an_image():
    with pytest.raises(ValueError, match="at least one image"):
        image_grid(torch.zeros(0, 3, 4, 4))


def test_pil_modes_and_shapes():
    color = torch.tensor([-1.0, 0.0, 1.0])[:, None, None].expand(3, 4, 6).requires_grad_()
    picture = to_pil(color)
    assert (picture.mode, picture.size, picture.getpixel((5, 3))) == ("RGB", (6, 4), (0, 128, 255))
    assert to_pil(torch.ones(1, 4, 6)).mode == "L"
    with pytest.raises(ValueError, match=r"C = 1 or 3.*\(2, 4, 6\)"):
        to_pil(torch.ones(2, 4, 6))


def test_png_holds_pixels_and_text_and_leaves_nothing_beside_it(tmp_path):
    image = torch.rand(3, 5, 7) * 2 - 1
    path = save_png(image, tmp_path / "a" / "b.png", {"seed": "7"})
    assert [file.name for file in path.parent.iterdir()] == ["b.png"]
    with Image.open(path) as picture:
        assert picture.text == {"Software": "taming", "seed": "7"}
        assert torch.equal(torch.tensor(np.array(picture)), to_uint8(image).permute(1, 2, 0))


def test_text_is_broken_where_words_end():
    one, two = text_pictures(["forest", "forest, morning, mist"], (64, 64))
    rows = [(picture[0] < 0).any(1).nonzero().flatten() for picture in (one, two)]  # those with ink
    assert len(rows[0]) < 14 and rows[0][-1] < 16
    assert rows[1][-1] > 20 and (two[0, :, -2:] == 1).all()  # further lines, and none beyond the edge


def test_pillow_images_and_png_files_come_back(tmp_path):
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    image = from_uint8(pixels)
    assert torch.equal(from_pil(to_pil(image)), image)
    assert torch.equal(load_png(save_png(image, tmp_path / "a.png")), image)
    assert from_pil(Image.new("L", (4, 2), 255)).shape == (3, 2, 4)


def test_own_files_and_whole_ones_are_known(tmp_path):
    own = save_png(torch.zeros(3, 64, 64), tmp_path / "own.png")
    broken, empty, other, text = (tmp_path / name for name in ("b.png", "empty.png", "other.png", "a.txt"))
    broken.write_bytes(own.read_bytes()[:-20])
    empty.touch()
    Image.new("RGB", (2, 2)).save(other)
    text.write_text("no image")
    assert [path for path in (own, broken, empty, other, text) if is_own_png(path)] == [own, broken, empty]
    assert [path for path in (own, broken, empty, other) if is_complete_png(path)] == [own, other]
    assert not is_complete_png(tmp_path / "none.png") and not is_complete_png(tmp_path)
