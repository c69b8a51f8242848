"""Picture, mask, depth, boxes and joints stay together through every resize, crop and flip."""

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data.base import ImagePaths, NumpyPaths
from taming.data.files.errors import BadSample
from taming.data.transforms.joint import JointParams, JointTransform


def marked(height: int, width: int, row: int, column: int, side: int = 8) -> np.ndarray:
    """A black image with a white square, and so its mask and its depth."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[row:row + side, column:column + side] = 255
    return pixels


@pytest.mark.parametrize("size, crop, shape", [
    (32, None, (32, 32)), ([24, 48], None, (24, 48)), (64, 40, (40, 40)), (None, [30, 50], (30, 50)),
    (None, None, (60, 100)), (-1, None, (60, 100)),
])
@pytest.mark.parametrize("mirrored", [False, True])
def test_everything_moves_alike(size, crop, shape, mirrored):
    pixels = marked(60, 100, 24, 44)
    transform = JointTransform(size, crop, True, flip=mirrored)
    for _ in range(10):
        params = transform.get_params(60, 100)
        image = params.image(pixels)[..., 0] / 255
        mask = params.mask((pixels[..., 0] > 0).astype(np.uint8))
        depth = params.plane(pixels[..., 0].astype(np.float32) / 255)
        assert image.shape == mask.shape == depth.shape == shape
        assert set(np.unique(mask)) <= {0, 1} and depth.dtype == np.float32
        assert np.abs(image - mask).mean() < 0.02 and np.abs(depth - mask).mean() < 0.02
        corners = params.points(np.array([[44, 24, 2.0], [52, 32, 2.0]]))[:, :2]  # of the square
        left, top = corners.min(0).clip(0, shape[::-1])
        right, bottom = corners.max(0).clip(0, shape[::-1])
        width, height = right - left, bottom - top
        assert abs(width * height - mask.sum()) <= width + height + 1
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert abs(left - columns.min()) <= 1 and abs(bottom - 1 - rows.max()) <= 1
        x, y, seen = params.points(np.array([[48, 28, 2.0]]))[0]
        assert seen == (2 if 0 <= x <= shape[1] and 0 <= y <= shape[0] else 0)
        if seen and 1 < x < shape[1] - 1 and 1 < y < shape[0] - 1:
            assert mask[int(y), int(x)] == 1


def test_a_mirrored_placement_by_hand():
    params = JointParams((10, 20), (10, 20), (2, 3), (6, 8), mirrored=True)
    columns = np.broadcast_to(np.arange(20, dtype=np.uint8), (10, 20))
    assert params.mask(columns)[0].tolist() == [16, 15, 14, 13, 12, 11, 10, 9]
    joints = np.array([[16.5, 2.5, 2], [9.5, 7.5, 1], [1, 1, 2]])
    assert params.points(joints).tolist() == [[0.5, 0.5, 2], [7.5, 5.5, 1], [16, -1, 0]]
    assert params.points(joints, swap=[1, 0, 2])[0].tolist() == [7.5, 5.5, 1]


def test_coord_is_the_place_in_the_resized_image():
    whole = (np.arange(20 * 30) / 600).reshape(20, 30, 1).astype(np.float32)
    params = JointTransform(20, 10).get_params(40, 60)
    assert np.allclose(params.coord(), whole[5:15, 10:20])


@pytest.mark.parametrize("interpolation, method", [
    ("nearest", Image.Resampling.NEAREST), ("bilinear", Image.Resampling.BILINEAR),
    ("bicubic", Image.Resampling.BICUBIC), ("area", Image.Resampling.BOX),
    ("lanczos", Image.Resampling.LANCZOS),
])
def test_interpolations_agree_with_pillow(interpolation, method):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    params = JointTransform(20, interpolation=interpolation).get_params(40, 60)
    expected = np.asarray(Image.fromarray(pixels).resize((30, 20), method))[:, 5:25]
    assert np.abs(params.image(pixels).astype(int) - expected).max() <= 1


def test_masks_of_many_ids_keep_them():
    ids = np.arange(40 * 60, dtype=np.int32).reshape(40, 60)
    mask = JointTransform(20).get_params(40, 60).mask(ids)
    assert mask.dtype == np.int32 and np.array_equal(mask, ids[1::2, 1::2][:, 5:25])


def test_small_images_and_whole_ones():
    assert JointTransform(None, 32, enlarge=True).get_params(20, 40).resized == (32, 64)
    assert JointTransform(None, 32, enlarge=True).get_params(50, 40).resized == (50, 40)
    assert JointTransform(20, whole=True).get_params(40, 60).shape == (20, 30)
    with pytest.raises(BadSample, match=r"x\.png is 20x40 pixels.*smaller than crop_size 32x32"):
        JointTransform(None, 32).get_params(20, 40, "x.png")
    with pytest.raises(ValueError, match="interpolation is 'cubic'; choose one of nearest, bilinear"):
        JointTransform(32, interpolation="cubic")


@pytest.mark.parametrize("height, width, options, message", [
    (20, 40, {"crop_size": 32}, "is 20x40 pixels .* smaller than crop_size 32x32"),
    (0, 40, {"size": 32}, r"has no pixels, 0x40 \(height x width\): remove it"),
    (1, 4000, {"size": 256}, "is 1x4000 .* to cover 256x256 it would become 256x1024000, more than 89 m"),
    (4000, 1, {"crop_size": 256, "enlarge": True}, "is 4000x1 .* would become 1024000x256"),
])
def test_what_no_transform_can_use_is_a_bad_sample(height, width, options, message):
    with pytest.raises(BadSample, match=rf"x\.png {message}"):
        JointTransform(**options).get_params(height, width, "x.png")
    assert JointTransform(256).get_params(1, 1000).resized == (256, 256000)  # odd, but it can be done


def test_one_image_that_is_too_small_is_skipped_and_reported(tmp_path, caplog):
    for i, side in enumerate((40, 20, 40)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    data = ImagePaths(paths, crop_size=32, max_bad_fraction=0.4)
    assert [item["file_path_"] for item in data] == [paths[0], paths[2], paths[2]]
    assert "1.png is 20x20 pixels" in caplog.text and "1 of 3 are bad" in caplog.text
    with pytest.raises(ValueError, match="1 of 1 images cannot be read"):
        ImagePaths(paths[1:2], crop_size=32)[0]


def test_an_array_without_pixels_is_skipped(tmp_path, caplog):
    for i, height in enumerate((8, 0)):
        np.save(tmp_path / f"{i}.npy", np.zeros((1, 3, height, 40), np.uint8))
    data = NumpyPaths([tmp_path / "0.npy", tmp_path / "1.npy"], 8, max_bad_fraction=0.5)
    assert data[1]["file_path_"].endswith("0.npy") and "1.npy has no pixels, 0x40" in caplog.text


def test_placements_follow_torch_s_generator():
    transform = JointTransform(32, 16, True, flip=True)
    torch.manual_seed(3)
    first = [transform.get_params(50, 70) for _ in range(20)]
    torch.manual_seed(3)
    assert first == [transform.get_params(50, 70) for _ in range(20)]
    assert len(set(first)) > 15 and 3 < sum(params.mirrored for params in first) < 17
