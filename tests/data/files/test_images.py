"""Image files of every kind become the right pixels, within a budget; others are one line that names them."""

import os
import re
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from taming.data.base import ImagePaths, NumpyPaths
from taming.data.files import images
from taming.data.files.errors import BadImage, file_errors
from taming.data.files.images import read_image, read_npy
from taming.data.files.lists import find_images
from tests.data.files.hostile import LONG, encoded, hostile_images, png, png_chunk, read_within_budget

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind, extension, feature, options", [
    ("AVIF", ".avif", "avif", {"quality": 100, "subsampling": "4:4:4"}),
    ("WEBP", ".webp", "webp", {"lossless": True}), ("PPM", ".ppm", "zlib", {}), ("BMP", ".bmp", "zlib", {}),
    ("JPEG2000", ".jp2", "jpg_2000", {}), ("JPEG2000", ".j2k", "jpg_2000", {"no_jp2": True}),
    ("TIFF", ".tif", "zlib", {"compression": "tiff_deflate"}),
])
def test_kinds_of_files_are_found_and_read(tmp_path, kind, extension, feature, options):
    if not features.check(feature):
        pytest.skip(f"this Pillow has no {feature}")
    write(tmp_path / f"x{extension}", encoded(Image.fromarray(PIXELS), kind, **options))
    data = ImagePaths(find_images(tmp_path))
    pixels = np.rint((data[0]["image"] + 1) * 127.5)
    assert np.abs(pixels - PIXELS).max() <= (8 if kind == "AVIF" else 0)


# ---- what a PNG carries beside its pixels


def test_a_png_is_read_whatever_texts_and_profile_it_carries(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_text("prompt", "y" * 70_000_000)
    info.add_itxt("caption", "z" * 3_000_000, zip=True)
    for after in (False, True):
        data = encoded(Image.fromarray(PIXELS), "PNG", pnginfo=info, icc_profile=bytes(2_000_000))
        if after:  # texts behind the pixels
            texts = data[33:data.index(b"IDAT") - 4]
            data = data[:33] + data[data.index(b"IDAT") - 4:-12] + texts + data[-12:]
        assert (read_image(write(tmp_path / "x.png", data)) == PIXELS).all()
    broken = b"".join(png_chunk(kind, b"a\0\0no zlib") for kind in (b"iCCP", b"zTXt", b"tEXt", b"iTXt"))
    path = write(tmp_path / "y.png", png(8, 4, chunks=broken))
    assert (read_image(path) == 255).all()  # transparent


@pytest.mark.parametrize("where", ["exif", "text", "compressed text", "xmp"])
def test_orientation_is_kept_when_texts_are_left_out(tmp_path, where):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    raw = f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}".encode("latin-1")
    chunk = {
        "exif": png_chunk(b"eXIf", exif.tobytes()[6:]),
        "text": png_chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        "compressed text": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        "xmp": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation=\"6\"/>"),
    }[where]
    data = encoded(Image.fromarray(PIXELS), "PNG")
    data = data[:33] + chunk + png_chunk(b"tEXt", b"prompt\0" + b"x" * 2_000_000) + data[33:]
    assert (read_image(write(tmp_path / "x.png", data)) == np.rot90(PIXELS, -1)).all()


# ---- conversion in bands


@pytest.mark.parametrize("mode", [
    "RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "P+transparency", "L+transparency",
])
def test_bands_are_converted_like_the_whole(tmp_path, monkeypatch, mode):
    mode, _, transparent = mode.partition("+")
    values = np.random.default_rng(1).integers(0, 256, (37, 11, 4), dtype=np.uint8)
    if mode in ("I;16", "I"):
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    else:
        image = Image.fromarray(values if mode in ("RGBA", "LA") else values[..., :3]).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I") else "x.png")
    image.save(path, **({"transparency": 7} if transparent else {}))
    whole = read_image(path)
    monkeypatch.setattr(images, "_BAND", 30)  # two rows
    assert (read_image(path) == whole).all() and whole.std() > 10


# ---- budgets


def test_hostile_images_are_refused_within_the_budget(tmp_path):
    paths = [write(tmp_path / name, data) for name, data in hostile_images().items()]
    said = read_within_budget("taming.data.files.images:read_image", paths)
    assert {name: text for name, text in said.items() if not text.startswith("cannot read image")} == {}
    for name, reason in {
        "too_large.png": "12000x12000 pixels .* is too large; PNG may have 100 million",
        "chunks.png": "more than 131072 chunks",
        "claims.png": "exceeds limit", "claims.bmp": "1x80000000", "scans.jpg": "more than 100 scans",
        "exif.jpg": "EXIF", "exif.png": "tags with 0 numbers and 4194304000 bytes", "tags.tif": "tags with",
        "comment.gif": "blocks", "directories.tif": "directories", "program.png": "cannot identify",
    }.items():
        assert re.search(reason, said[name]), (name, said[name])


@LONG
@pytest.mark.slow
def test_the_largest_images_that_are_read_stay_within_the_budget(tmp_path):
    paths = [write(tmp_path / "x.png", png(10_000, 10_000))]
    for kind, extension, side, feature in (
        ("WEBP", "webp", 7000, "webp"), ("AVIF", "avif", 8100, "avif"), ("JPEG2000", "jp2", 5700, "jpg_2000"),
        ("JPEG", "jpg", 10_000, "jpg"),
    ):
        if features.check(feature):
            paths.append(tmp_path / f"x.{extension}")
            options = {"AVIF": {"speed": 10}, "JPEG": {"progressive": True}}
            options["WEBP"] = {"lossless": True, "method": 0}
            Image.new("RGB", (side, side)).save(paths[-1], **options.get(kind, {}))
    said = read_within_budget("taming.data.files.images:read_image", paths)
    assert all(text.startswith("read (") for text in said.values()), said


def test_a_jpeg_that_is_too_large_is_read_at_a_reduced_size(tmp_path, monkeypatch):
    path = tmp_path / "x.jpg"
    Image.fromarray(PIXELS).resize((800, 480), Image.Resampling.BICUBIC).save(path, quality=95)
    monkeypatch.setattr(images, "MAX_MEMORY", 100_000 * 8)
    with pytest.raises(BadImage, match="480x800 pixels .* is too large"):
        read_image(path)
    assert ImagePaths([path], 24)[0]["image"].shape == (24, 24, 3)


def test_of_a_jpeg_with_several_images_the_first_is_read(tmp_path, monkeypatch):
    first = Image.fromarray(PIXELS).resize((800, 480), Image.Resampling.BICUBIC)
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[first.rotate(180)], quality=95)
    assert Image.open(tmp_path / "x.jpg").format == "MPO"
    assert np.abs(read_image(tmp_path / "x.jpg") - np.asarray(first, np.int64)).mean() < 3
    monkeypatch.setattr(images, "MAX_MEMORY", 100_000 * 8)  # the whole image is too large
    assert ImagePaths([tmp_path / "x.jpg"], 24)[0]["image"].shape == (24, 24, 3)


# ---- what is not a file


@pytest.fixture
def no_files(tmp_path):
    """Places that are not regular files, by what messages call them."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    return {"pipe": tmp_path / "pipe.png", "folder": tmp_path / "folder.png", "device": "/dev/zero"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("read", [read_image, read_npy])
def test_pipes_folders_and_devices_are_named_at_once(no_files, read):
    for kind, path in no_files.items():
        with pytest.raises(BadImage, match=f"{path}.* is a {kind}, but must be a file"):
            read(path)


def test_a_sparse_file_is_not_read(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(1 << 40)
    start = time.monotonic()
    with pytest.raises(BadImage, match="has 1099511627776 bytes, more than 268435456 are not read"):
        read_image(tmp_path / "x.png")
    assert time.monotonic() - start < 1


def test_an_error_of_the_memory_is_one_of_the_file():
    with pytest.raises(BadImage, match="^cannot read image x.png: MemoryError: no reason given$"):
        with file_errors("x.png"):
            raise MemoryError


def test_a_bad_file_is_skipped_and_counted_whatever_is_wrong(tmp_path, no_files, caplog):
    hostile = hostile_images()
    paths = [write(tmp_path / name, hostile[name]) for name in ("tags.tif", "scans.jpg", "claims.bmp")]
    paths += [*no_files.values()]
    good = write(tmp_path / "good.png", encoded(Image.fromarray(PIXELS), "PNG"))
    data = ImagePaths([*paths, good], max_bad_fraction=0.9)
    assert data[0]["file_path_"] == str(good)
    assert all(str(path) in caplog.text for path in paths) and "6 of 7 are bad so far" in caplog.text


# ---- arrays


def npy(shape, data=b"", descr="|u1", order="False", version=b"\x01\x00"):
    head = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(head)) + head + data


@pytest.mark.parametrize("header", [
    npy("(100000000000, 8, 3)", b"x" * 100), npy(f"(3, {10**21}, 8)"), npy("(-1, 8, 3)", b"x" * 24),
    npy("(8, 8, 3)", b"x" * 191), npy("(8, 8, 3)", b"x" * 193), npy("()", b"x"), npy("(8, 8, 3)", b"x", "|O"),
    npy("(2, 2, 3)", b"x" * 96, "<f8"), npy("(True, 2, 3)", b"x" * 6) + b"x", npy("-" * 9000 + "1"),
    npy("(" * 3000), npy("(8, 8, 3)", version=b"\x07\x00"), b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    b"\x93NUMPY",
])
def test_an_array_that_lies_is_a_bad_sample(tmp_path, header):
    bad = write(tmp_path / "bad.npy", header)
    np.save(tmp_path / "good.npy", PIXELS)
    with pytest.raises(BadImage, match="bad.npy"):
        read_npy(bad)
    data = NumpyPaths([bad, tmp_path / "good.npy"], max_bad_fraction=0.5)
    assert data[0]["file_path_"].endswith("good.npy")


def test_arrays_are_read_in_every_order(tmp_path):
    planes = PIXELS.transpose(2, 0, 1)
    for array in (PIXELS, planes, planes[None], np.asfortranarray(PIXELS)):
        for version in ((1, 0), (2, 0)):
            with (tmp_path / "x.npy").open("wb") as file:
                np.lib.format.write_array(file, array, version)
            assert (read_npy(tmp_path / "x.npy") == PIXELS).all()
