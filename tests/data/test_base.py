"""Every kind of image file becomes the right RGB pixels; bad ones are skipped, counted, and then refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data.base import ImagePaths, image_batches
from taming.data.files.errors import BadImage
from taming.data.files.images import read_image
from taming.images import from_uint8, to_uint8

RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, path, **options) -> str:
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    color = (200, 200, 200) if mode in ("L", "LA") else WHITE if mode == "1" else RED
    kind = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    path = save(Image.new("RGB", (8, 6), color).convert(mode), tmp_path / f"x.{kind}")
    pixels = read_image(path)
    assert pixels.shape == (6, 8, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - color).max() <= (0 if kind == "png" else 2)


def test_transparency_shows_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, :2] = (*RED, 255)  # right half: transparent black
    half = np.zeros((1, 1, 4), np.uint8)
    half[..., 3] = 51  # a fifth of black over white
    row = read_image(save(Image.fromarray(rgba), tmp_path / "a.png"))[0]
    assert row.tolist() == [[*RED]] * 2 + [[*WHITE]] * 2
    assert read_image(save(Image.fromarray(half), tmp_path / "half.png"))[0, 0].tolist() == [204] * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert read_image(save(palette, tmp_path / "p.png", transparency=1))[0].tolist() == [[*RED], [*WHITE]]
    assert read_image(save(palette, tmp_path / "opaque.png"))[0].tolist() == [[*RED], [0, 255, 0]]


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    if name == "x.pgm":  # which Pillow writes from version 11 on
        (tmp_path / name).write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    else:
        save(Image.fromarray(values), tmp_path / name)
    assert read_image(tmp_path / name)[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), WHITE)
    image.paste(RED, (0, 0, 20, 20))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: red on top
    pixels = read_image(save(image, tmp_path / "x.jpg", exif=exif, quality=95))
    assert pixels.shape == (40, 20, 3)
    assert np.abs(pixels[:16].astype(int) - RED).max() < 20
    assert np.abs(pixels[-16:].astype(int) - WHITE).max() < 20


def test_bad_files_are_named_with_the_reason(tmp_path):
    truncated, text = tmp_path / "cut.jpg", tmp_path / "text.png"
    noise(64, 64).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-100])
    text.write_text("not an image")
    with pytest.raises(BadImage, match=r"cut\.jpg.*truncated"):
        read_image(truncated)
    with pytest.raises(BadImage, match=r"text\.png.*cannot identify"):
        read_image(text)
    with pytest.raises(BadImage, match=r"gone\.png.*No such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(BadImage, match="float pixels"):
        read_image(save(Image.new("F", (2, 2)), tmp_path / "x.tif"))


def test_size_resizes_the_smallest_side_and_crops_the_centre(tmp_path):
    image = noise(60, 90)
    item = ImagePaths([save(image, tmp_path / "x.png")], 30)[0]
    expected = np.asarray(image.resize((45, 30), Image.Resampling.BICUBIC))[:, 7:37]
    assert item["image"].shape == (30, 30, 3) and item["image"].dtype == np.float32
    assert np.array_equal(to_uint8(item["image"]), expected)
    assert item["file_path_"].endswith("x.png")


@pytest.mark.parametrize("options, shape", [
    ({"size": None}, (60, 90, 3)),
    ({"size": 0}, (60, 90, 3)),  # 0 meant "as it is" in 2021
    ({"size": [24, 64]}, (24, 64, 3)),
    ({"size": 48, "crop_size": 32}, (32, 32, 3)),
    ({"size": None, "crop_size": [16, 80]}, (16, 80, 3)),
    ({"size": 120}, (120, 120, 3)),
])
def test_sizes(tmp_path, options, shape):
    assert ImagePaths([save(noise(60, 90), tmp_path / "x.png")], **options)[0]["image"].shape == shape


def test_random_crops_and_flips_are_parts_of_the_image_and_follow_torch(tmp_path):
    image = noise(16, 40)
    data = ImagePaths([save(image, tmp_path / "x.png")], 16, True, flip=True)
    whole = np.asarray(image)
    crops = {whole[:, x:x + 16].tobytes(): (x, False) for x in range(25)}
    crops |= {whole[:, x:x + 16][:, ::-1].tobytes(): (x, True) for x in range(25)}
    torch.manual_seed(1)
    seen = [crops[to_uint8(data[0]["image"]).tobytes()] for _ in range(60)]  # a KeyError if it is not a crop
    torch.manual_seed(1)
    assert seen == [crops[to_uint8(data[0]["image"]).tobytes()] for _ in range(60)]
    assert 15 < sum(flipped for _, flipped in seen) < 45 and len({x for x, _ in seen}) > 10


def test_coord_is_the_place_in_the_whole_resized_image(tmp_path):
    path = save(noise(20, 30), tmp_path / "x.png")
    whole = (np.arange(20 * 30) / (20 * 30)).reshape(20, 30, 1)
    item = ImagePaths([path], 20, crop_size=10, coord=True)[0]
    assert item["coord"].dtype == np.float32 and np.allclose(item["coord"], whole[5:15, 10:20])
    for _ in range(5):
        coord = ImagePaths([path], 20, True, crop_size=10, coord=True, flip=True)[0]["coord"]
        top, left = divmod(round(float(coord[0, 0, 0]) * 600), 30)
        assert np.allclose(coord, whole[top:top + 10, left:left + 10])


def test_constructor_errors(tmp_path):
    with pytest.raises(ValueError, match="crop_size 64x64.*larger than size 32x32"):
        ImagePaths(["a.png"], 32, crop_size=64)
    with pytest.raises(ValueError, match=r"labels\['y'\] has 2 values for 1 images"):
        ImagePaths(["a.png"], labels={"y": [1, 2]})
    with pytest.raises(ValueError, match="list of image paths is empty"):
        ImagePaths([])
    with pytest.raises(ValueError, match="size must be a positive number of pixels.*'256'"):
        ImagePaths(["a.png"], "256")


def test_an_image_smaller_than_the_crop(tmp_path, caplog):
    paths = [save(noise(20, 24), tmp_path / f"{i}.png") for i in range(3)]
    with pytest.raises(ValueError, match=r"0\.png is 20x24 pixels.*than crop_size 32x32.*give size as well"):
        ImagePaths(paths, crop_size=32)[0]
    large = save(noise(40, 40), tmp_path / "large.png")
    some = ImagePaths([paths[0], large], crop_size=32, max_bad_fraction=0.5)
    assert some[0]["file_path_"] == large  # one that is too small ends no run
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert [item["image"].shape for item in ImagePaths(paths, 32)] == [(32, 32, 3)] * 3
    assert [record.getMessage()[-11:] for record in caplog.records] == ["(said once)"]


def test_a_bad_file_is_replaced_by_the_next_with_its_label(tmp_path, caplog):
    paths = [save(noise(8, 8, seed), tmp_path / f"{seed}.png") for seed in range(4)]
    (tmp_path / "1.png").write_text("broken")
    data = ImagePaths(paths, 8, labels={"y": [10, 11, 12, 13]}, max_bad_fraction=0.25)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [data[i]["y"] for i in range(4)] == [10, 12, 12, 13]
    assert np.array_equal(data[1]["image"], data[2]["image"]) and data[1]["file_path_"] == paths[2]
    assert len(caplog.records) == 1 and "1 of 4 are bad" in caplog.records[0].getMessage()


def test_too_many_bad_files_stop_the_run(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(20)]
    for path in paths:
        noise(8, 8).save(path)
    for path in paths[3:10]:
        open(path, "w").close()
    strict = ImagePaths(paths, 8)
    assert strict[0]["file_path_"] == paths[0]
    with pytest.raises(ValueError, match="2 of 20 images cannot be read.*max_bad_fraction=0.01"):
        strict[3]
    lenient = ImagePaths(paths, 8, max_bad_fraction=0.3)
    with pytest.raises(ValueError, match="7 of 20 images") as caught:
        list(lenient)
    assert [f"{i}.png" in str(caught.value) for i in range(3, 10)] == [True] * 5 + [False] * 2
    with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
        ImagePaths(paths[3:4], 8)[0]


def test_batches_hold_neighbours_of_one_size_cropped_around_the_centre(tmp_path):
    paths = []
    for name, (width, height) in (("a", (9, 8)), ("b", (8, 8)), ("c", (12, 8)), ("d", (8, 9)), ("e", (3, 8))):
        pixels = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        paths.append(tmp_path / f"{name}.png")
    (tmp_path / "bad.png").write_bytes(b"")
    bad: list[str] = []
    found = list(image_batches([*paths, tmp_path / "bad.png"], None, 4, 2, bad))
    too_long = save(noise(1, 4000), tmp_path / "f.png")
    assert not list(image_batches([too_long], 2000, 4, 2, refused := [])) and "2000x8000000" in refused[0]
    assert [[Path(path).stem for path in names] for names, _ in found] == [["a", "b"], ["c"], ["d"]]
    assert [tuple(images.shape) for _, images in found] == [(2, 3, 8, 8), (1, 3, 8, 12), (1, 3, 8, 8)]
    assert np.array_equal(to_uint8(found[0][1][0]).permute(1, 2, 0), read_image(paths[0])[:, :8])
    assert len(bad) == 2 and "e.png is smaller than 4 pixels" in bad[0] and "bad.png" in bad[1]


@pytest.mark.parametrize("height, width, size", [
    (427, 640, 64), (480, 640, 32), (633, 421, 100), (431, 433, 53),
])
def test_jpegs_are_decoded_small_where_that_is_enough(tmp_path, height, width, size):
    coarse = noise(height // 6, width // 6).resize((width, height), Image.Resampling.BICUBIC)
    path = save(Image.blend(coarse, noise(height, width), 0.3), tmp_path / "x.jpg", quality=92)
    small = ImagePaths([path], size)[0]["image"]
    whole = Image.fromarray(read_image(path))
    scale = size / min(height, width)
    resized = whole.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    expected = from_uint8(np.asarray(resized.crop((left, top, left + size, top + size))))
    error = np.mean((small - expected) ** 2)
    assert 10 * np.log10(4 / error) > 38  # dB


def test_turned_jpegs_and_those_for_print(tmp_path):
    image = Image.new("RGB", (400, 200), WHITE)
    image.paste(RED, (0, 0, 200, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # red is to be on top
    turned = ImagePaths([save(image, tmp_path / "x.jpg", exif=exif, quality=95)], [20, 10])[0]["image"]
    assert np.abs(turned[:9] - np.array([1, -1, -1])).max() < 0.1 and turned[11:].min() > 0.9
    cmyk = ImagePaths([save(image.convert("CMYK"), tmp_path / "y.jpg", quality=95)], [10, 20])[0]["image"]
    assert np.abs(cmyk[:, :9] - np.array([1, -1, -1])).max() < 0.1 and cmyk[:, 11:].min() > 0.9
