"""Damaged files of every kind that data sets read, and properties of boxes, crops and indices.

A damaged file is read, or is one line that names it: no other error, no long wait. A few hundred files are
damaged; with `TAMING_FUZZ=20000` in the environment, so many more.
"""

import gzip
import io
import json
import os
import random
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features

from taming.colormap import label_colors
from taming.data.base import ImagePaths
from taming.data.codes import CodeDataset, CodeHeader, Field
from taming.data.codes.format import PREFIX, pack
from taming.data.conditional_builder.utils import (
    filter_annotations,
    horizontally_flip_bbox,
    intersection_area,
    rescale_annotations,
)
from taming.data.custom import CustomTest
from taming.data.files.depth import depth_to_rgba, read_depth
from taming.data.files.errors import BadSample
from taming.data.files.images import read_image, read_npy
from taming.data.files.label_files import read_labels, read_mask
from taming.data.files.label_maps import read_ids
from taming.data.files.lists import read_class_names
from taming.data.helper_types import Annotation
from taming.data.image_transforms import (
    CenterCropReturnCoordinates,
    Random2dCropReturnCoordinates,
    RandomCrop1dReturnCoordinates,
)
from taming.data.lsun import LmdbImages
from taming.data.shards import TarShards
from taming.data.transforms.joint import JointTransform
from taming.modules.conditioners.label_grid import LabelGrid
from taming.modules.vqvae.quantize import VectorQuantizer2
from tests.data.files.hostile import encoded, png_chunk

FEW = 15  # damaged files of each kind
MANY = int(os.environ.get("TAMING_FUZZ", 0))  # of all kinds
SECONDS = 20.0  # of one core, for each

# ---- files

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)  # (20, 24, 3)
IMAGE, IDS = Image.fromarray(PIXELS), PIXELS[..., 0] % 10


def image_files() -> dict[str, bytes]:
    """A file of each kind, by its name."""
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010E] = 6, "a description"
    info.add_text("prompt", "a text " * 50, zip=True)
    kinds: dict[str, tuple[Image.Image, str, dict]] = {
        "rgb.png": (IMAGE, "PNG", {"pnginfo": info}),
        "palette.png": (IMAGE.quantize(20), "PNG", {"transparency": 3}),
        "gray.png": (Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG", {}),
        "baseline.jpg": (IMAGE, "JPEG", {"exif": exif}),
        "progressive.jpg": (IMAGE, "JPEG", {"progressive": True}),
        "lossy.webp": (IMAGE, "WEBP", {"exif": exif}), "lossless.webp": (IMAGE, "WEBP", {"lossless": True}),
        "x.gif": (IMAGE.quantize(20), "GIF", {"comment": b"a comment"}), "x.bmp": (IMAGE, "BMP", {}),
        "x.tif": (IMAGE, "TIFF", {"compression": "tiff_lzw"}), "raw.tif": (IMAGE, "TIFF", {}),
        "x.ppm": (IMAGE, "PPM", {}), "x.avif": (IMAGE, "AVIF", {"exif": exif}),
        "x.jp2": (IMAGE, "JPEG2000", {}),
    }
    available = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}
    return {
        name: encoded(image, kind, **options) for name, (image, kind, options) in kinds.items()
        if kind not in available or features.check(available[kind])
    }


def npy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, PIXELS)
    return file.getvalue()


def shard_file() -> bytes:
    members = {
        "a/0.jpg": encoded(IMAGE, "JPEG"), "a/0.cls": b"1", "a/0.txt": b"a caption",
        "a/0.seg.png": encoded(Image.fromarray(IDS), "PNG"),
        "b/" + "long" * 40 + ".png": encoded(IMAGE, "PNG"), "b/" + "long" * 40 + ".cls": b"0",
    }
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def parquet_file() -> bytes:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    cells = [{"bytes": encoded(IMAGE, "PNG"), "path": None}] * 3
    file = io.BytesIO()
    datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0]}, features=features).to_parquet(file)
    return file.getvalue()


def code_file() -> bytes:
    """A code cache of one block, whose checksum is the last four bytes."""
    depth, label = Field.of("tokens/depth", (2, 3), 16), Field.of("class_label", (), 3)
    fields = Field.of("codes", (4, 6), 1000), depth, label
    header = CodeHeader(fields, 5, 2, "0" * 64, {"class_names": ["cat", "dog", "fox"]})
    values = {field.name: RNG.integers(0, field.values, (10, *field.shape)) for field in fields}
    records = pack(fields, values).tobytes()
    return header.to_bytes() + records + zlib.crc32(records).to_bytes(4, "little")


# ---- readers: each takes the path of a damaged file


def read_all(dataset) -> None:
    """Load every sample; a bad one must be a BadSample."""
    for index in range(len(dataset)):
        try:
            dataset.load_sample(index)
        except BadSample as error:
            assert "\n" not in str(error)


def read_shard(path: Path) -> None:
    read_all(TarShards(path, 8, max_bad_fraction=1.0))


def read_index(path: Path) -> None:
    """The index of a shard that is whole; it lies beside it."""
    shard = path.with_name("shard.tar")
    if not shard.exists():
        shard.write_bytes(shard_file())
    read_shard(path.replace(path.with_name("shard.tar.json")).with_suffix(""))


def read_list(path: Path) -> None:
    (path.parent / "0.png").write_bytes(encoded(IMAGE, "PNG"))
    read_all(CustomTest(8, path).data)


def read_lmdb(path: Path) -> None:
    folder = path.parent / "lmdb"
    folder.mkdir(exist_ok=True)
    path.replace(folder / "data.mdb")
    read_all(LmdbImages(folder, 8, max_bad_fraction=1.0))


def read_parquet(path: Path) -> None:
    from taming.data.huggingface import HuggingFaceImages

    cache = path.parent / f"cache{time.monotonic_ns()}"
    read_all(HuggingFaceImages(path, label_column="label", cache_dir=cache, max_bad_fraction=1.0))


def read_codes(path: Path) -> None:
    dataset = CodeDataset(path)
    codes = dataset.read(np.arange(dataset.code_header.records))
    for field in dataset.code_header.fields:
        assert 0 <= codes[field.name].min() and codes[field.name].max() < field.values
    dataset.check_all()


def index_file() -> bytes:
    shard = io.BytesIO(shard_file())
    with tarfile.open(fileobj=shard) as tar:
        members = [(member.name, member.offset_data, member.size) for member in tar]
    return json.dumps({"size": len(shard.getvalue()), "members": members}).encode()


LIST = "".join(f"{name}\n" for name in ("0.png", "./0.png", "0.png", "././0.png")).encode()
KINDS: dict[str, tuple[Callable[[], bytes], Callable]] = {
    **{name: (lambda name=name: image_files()[name], read_image) for name in image_files()},
    "x.tcc": (code_file, read_codes),
    "x.npy": (npy_file, read_npy), "x.tar": (shard_file, read_shard), "x.json": (index_file, read_index),
    "list.txt": (lambda: LIST, read_list), "classes.txt": (lambda: b"cat\ndog\nred fox\n", read_class_names),
    "ids.png": (lambda: encoded(Image.fromarray(IDS), "PNG"), read_ids),
    "labels.png": (
        lambda: encoded(Image.fromarray(label_colors(10)[IDS]).quantize(10), "PNG"),
        lambda path: read_labels(path, LabelGrid(10, 4)),
    ),
    "mask.png": (
        lambda: encoded(Image.fromarray(np.dstack([PIXELS * 0 + 255, PIXELS[..., 0]])), "PNG"), read_mask,
    ),
    "depth.png": (
        lambda: encoded(Image.fromarray(depth_to_rgba(PIXELS[..., 0].astype(np.float32))), "PNG"), read_depth,
    ),
    "x.mdb": (lambda: gzip.decompress((Path(__file__).parent / "data/lsun.mdb.gz").read_bytes()), read_lmdb),
    "x.parquet": (parquet_file, read_parquet),
}

# ---- damage


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut out, repeat or insert bytes, more often near the beginning."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        end = rng.choice((64, 512, len(changed) + 1))
        place = rng.randrange(max(1, min(end, len(changed))))
        size = rng.choice((1, 2, 4, 8, 100))
        change = rng.randrange(7)
        if change < 2 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif change == 2:
            changed[place:place + 1] = bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))])
        elif change == 3:  # a number that is too large
            number = rng.choice((1 << 31, (1 << 32) - 1, 1 << 24, 1 << 16, (1 << 15) - 1))
            changed[place:place + 4] = number.to_bytes(4, rng.choice(("little", "big")))
        elif change == 4:
            del changed[place:place + size]
        elif change == 5:
            changed[place:place] = changed[place:place + size] * rng.choice((1, 3, 50))
        elif rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def with_png_sums(data: bytes) -> bytes:
    """Right the checksums of a PNG, so that what was damaged is read."""
    start, parts = 8, [data[:8]]
    while start + 12 <= len(data):
        length = int.from_bytes(data[start:start + 4], "big")
        if start + 12 + length > len(data):
            break
        parts.append(png_chunk(data[start + 4:start + 8], data[start + 8:start + 8 + length]))
        start += 12 + length
    return b"".join([*parts, data[start:]])


def with_tar_sums(data: bytes) -> bytes:
    """Right the checksums of the headers of a tar file."""
    changed = bytearray(data)
    for start in range(0, len(changed) - 511, 512):
        if changed[start + 257:start + 262] == b"ustar":
            changed[start + 148:start + 156] = b" " * 8
            changed[start + 148:start + 156] = b"%06o\0 " % sum(changed[start:start + 512])
    return bytes(changed)


def with_code_sums(data: bytes) -> bytes:
    """Right the checksums of a code cache, that of the header and that of the one block."""
    if len(data) < PREFIX.size + 4:
        return data
    magic, version, length, _ = PREFIX.unpack(data[:PREFIX.size])
    text = data[PREFIX.size:PREFIX.size + length]
    start = -(-(PREFIX.size + length) // 64) * 64
    head = PREFIX.pack(magic, version, length, zlib.crc32(text)) + data[PREFIX.size:start]
    return head + data[start:-4] + zlib.crc32(data[start:-4]).to_bytes(4, "little")


RIGHTED = {"png": with_png_sums, "tar": with_tar_sums, "tcc": with_code_sums}


@cache
def whole(name: str) -> bytes:
    return KINDS[name][0]()


@pytest.mark.parametrize("name", KINDS)
def test_the_undamaged_file_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(whole(name))
    KINDS[name][1](tmp_path / name)


def named(name: str, seeds: range, folder: Path) -> int:
    """Damage a file once for each seed, and read it; return how often an error named it."""
    data, read = whole(name), KINDS[name][1]
    path, errors = folder / name, 0
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        content = damaged(data, rng)
        if (right := RIGHTED.get(name.rpartition(".")[2])) and rng.random() < 0.7:
            content = right(content)
        path.write_bytes(content)
        start = time.process_time()
        try:
            read(path)
        except (ValueError, FileNotFoundError) as error:
            text = str(error).partition(". The first:\n")[0]  # of a list, the files that are missing
            assert "\n" not in text and "MemoryError" not in text, (seed, error)
            assert path.name in text or str(folder) in text, (seed, error)
            errors += 1
        except BaseException as error:
            raise AssertionError(f"damage {seed}: {type(error).__name__}: {error}") from error
        assert time.process_time() - start < SECONDS, seed
    return errors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_named(name, tmp_path):
    assert named(name, range(FEW), tmp_path) > 0


@pytest.mark.slow
@pytest.mark.skipif(not MANY, reason="set TAMING_FUZZ to a number of files")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_are_read_or_named(name, tmp_path):
    assert named(name, range(FEW, FEW + -(-MANY // len(KINDS))), tmp_path) > 0


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_of_a_data_set_is_skipped(tmp_path):
    """Each file of another kind of damage; the good one is what items hold."""
    rng = random.Random(0)
    paths = []
    for number, (name, data) in enumerate(image_files().items()):
        paths.append(tmp_path / f"{number}{name}")
        paths[-1].write_bytes(damaged(data, rng)[:rng.randrange(60)])
    (tmp_path / "good.png").write_bytes(encoded(IMAGE, "PNG"))
    items = list(ImagePaths([*paths, tmp_path / "good.png"], max_bad_fraction=1.0))
    assert all(item["file_path_"].endswith("good.png") for item in items) and len(items) == len(paths) + 1


# ---- boxes: (x0, y0, width, height) in fractions of the image

fractions = st.floats(0, 1, allow_subnormal=False)
some = settings(max_examples=100, deadline=None)


@st.composite
def boxes(draw, least=0.0):
    x0, x1 = sorted((draw(fractions), draw(fractions)))
    y0, y1 = sorted((draw(fractions), draw(fractions)))
    assume(x1 - x0 >= least and y1 - y0 >= least)
    return x0, y0, x1 - x0, y1 - y0


def annotation(box):
    return Annotation(area=box[2] * box[3], image_id="0", bbox=box, category_no=0, category_id="")


@some
@given(st.lists(boxes(), max_size=6), boxes(least=1e-3))
@example([(0.0, 0.0, 1.0, 1.0)], (0.25, 0.25, 0.5, 0.5))
def test_filtered_boxes_are_those_that_the_crop_shows(found, crop):
    kept = filter_annotations([annotation(box) for box in found], crop)
    assert [a.bbox for a in kept] == [box for box in found if intersection_area(box, crop) > 0]
    for box in found:
        shared = intersection_area(box, crop)
        assert shared == pytest.approx(intersection_area(crop, box))
        assert 0 <= shared <= min(box[2] * box[3], crop[2] * crop[3]) + 1e-9
    assert intersection_area(crop, (0.0, 0.0, 1.0, 1.0)) == pytest.approx(crop[2] * crop[3], abs=1e-9)


@some
@given(boxes(), boxes(least=1e-3), st.booleans())
@example((0.0, 0.2, 1.0, 0.3), (0.5, 0.0, 0.5, 1.0), True)
def test_boxes_of_a_crop_stay_inside_and_keep_their_share_of_the_area(box, crop, flip):
    x, y, width, height = rescale_annotations([annotation(box)], crop, flip)[0].bbox
    assert -1e-9 <= x <= x + width <= 1 + 1e-9 and -1e-9 <= y <= y + height <= 1 + 1e-9
    # What the crop shows of the box, as a part of the crop.
    assert width * height * crop[2] * crop[3] == pytest.approx(intersection_area(box, crop), abs=1e-9)
    mirrored = rescale_annotations([annotation(box)], crop, not flip)[0].bbox
    assert horizontally_flip_bbox(mirrored) == pytest.approx((x, y, width, height), abs=1e-9)


CROPS = (CenterCropReturnCoordinates, RandomCrop1dReturnCoordinates, Random2dCropReturnCoordinates)


@some
@given(
    st.sampled_from(CROPS),
    st.integers(8, 40), st.integers(8, 40), st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000),
)
def test_crops_are_where_they_say(kind, rows, columns, height, width, seed):
    torch.manual_seed(seed)
    image = torch.arange(rows * columns).view(1, rows, columns)
    (x, y, w, h), crop = kind((height, width))(image)
    left, top = round(x * columns), round(y * rows)
    assert (round(h * rows), round(w * columns)) == tuple(crop.shape[1:])
    assert torch.equal(crop, image[:, top:top + crop.shape[1], left:left + crop.shape[2]])
    if kind is not Random2dCropReturnCoordinates:
        assert crop.shape[1:] == (height, width)


# ---- joint transforms


@st.composite
def transforms(draw):
    """A transform, an image's height and width, and a seed."""
    sides = st.integers(1, 24)
    size = draw(st.one_of(st.none(), sides, st.tuples(sides, sides).map(list)))
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    low = min([height, width] if size is None else [size] if isinstance(size, int) else size)
    crop = draw(st.one_of(st.none(), st.integers(1, low)))
    options = {"random_crop": draw(st.booleans()), "flip": draw(st.booleans()), "whole": draw(st.booleans())}
    options["interpolation"] = draw(st.sampled_from(("nearest", "bilinear", "bicubic", "area", "lanczos")))
    return JointTransform(size, crop, **options), height, width, draw(st.integers(0, 1000))


@some
@given(transforms())
def test_image_mask_and_plane_agree(drawn):
    transform, height, width, seed = drawn
    torch.manual_seed(seed)
    params = transform.get_params(height, width)
    (h, w), (top, left), (rows, columns) = params.resized, params.corner, params.shape
    assert 0 <= top <= top + rows <= h and 0 <= left <= left + columns <= w
    ids = np.random.default_rng(seed).integers(0, 7, (height, width)).astype(np.uint8)
    mask = params.mask(ids)
    assert mask.shape == params.shape and set(mask.ravel().tolist()) <= set(ids.ravel().tolist())
    assert np.array_equal(params.mask(ids.astype(np.int32)), mask)
    colors = np.arange(21, dtype=np.uint8).reshape(7, 3) * 12
    image, plane = params.image(colors[ids]), params.plane(np.full((height, width), 0.25, np.float32))
    assert image.shape == (*params.shape, 3) and plane.shape == params.shape
    assert np.allclose(plane, 0.25) and params.coord().shape == (*params.shape, 1)
    if transform.interpolation == "nearest" or params.resized == (height, width):
        assert np.array_equal(image, colors[mask])


@some
@given(transforms(), st.lists(st.tuples(*[st.floats(0, 30, width=32)] * 2), min_size=1, max_size=5))
def test_points_follow_the_image(drawn, found):
    transform, height, width, seed = drawn
    torch.manual_seed(seed)
    params = transform.get_params(height, width)
    (rows, columns), (h, w), (top, left) = params.shape, params.resized, params.corner
    points = params.points(np.array([(*point, 1.0) for point in found]))
    for (x, y), (new_x, new_y, visible) in zip(found, points, strict=True):
        whole_x = w - x * w / width if params.mirrored else x * w / width
        assert (new_x + left, new_y + top) == pytest.approx((whole_x, y * h / height), abs=0.01, rel=1e-4)
        assert visible == (0 <= new_x <= columns and 0 <= new_y <= rows)


@some
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.data())
def test_a_box_covers_the_pixels_that_its_mask_does(factor, height, width, data):
    """With whole factors and places the corners can be compared with the mask exactly."""
    x0, x1 = sorted((data.draw(st.integers(0, width)), data.draw(st.integers(0, width))))
    y0, y1 = sorted((data.draw(st.integers(0, height)), data.draw(st.integers(0, height))))
    mask = np.zeros((height, width), np.uint8)
    mask[y0:y1, x0:x1] = 1
    crop = min(height, width, 2)
    transform = JointTransform([height * factor, width * factor], crop, True, flip=True)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    params = transform.get_params(height, width)
    corners = params.points(np.array([[x0, y0, 1], [x1, y1, 1]]))[:, :2].round().astype(int)
    (left, top), (right, bottom) = corners.min(0).clip(0), corners.max(0).clip(0)
    expected = np.zeros(params.shape, np.uint8)
    expected[top:bottom, left:right] = 1
    assert np.array_equal(params.mask(mask), expected)


# ---- remapped indices


@some
@given(st.integers(2, 40), st.data())
def test_remapped_indices_come_back(n_codes, data):
    used = data.draw(st.lists(st.integers(0, n_codes - 1), min_size=1, unique=True))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, n_codes - 1), min_size=1, max_size=30)))[None]
    unknown = data.draw(st.sampled_from(("random", "extra", 0)))
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/used.npy", np.array(used))
        quantizer = VectorQuantizer2(n_codes, 4, 0.25, remap=f"{folder}/used.npy", unknown_index=unknown)
    new = quantizer.remap_to_used(codes)
    assert new.shape == codes.shape and 0 <= new.min() and new.max() < quantizer.re_embed
    known = torch.isin(codes, torch.tensor(used))
    back = quantizer.unmap_to_all(new)
    assert torch.equal(back[known], codes[known]) and torch.isin(back, torch.tensor(used)).all()
    if unknown == "extra":
        assert (new[~known] == len(used)).all() and (back[~known] == used[0]).all()
