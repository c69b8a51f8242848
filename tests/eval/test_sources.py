"""Sources of images: folders, files, data sets; what cannot be read is counted and named."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from taming.eval.npz import write_npz
from taming.eval.sources import (
    DatasetImages,
    FolderImages,
    NpzImages,
    content_hash,
    hash_of_set,
    open_source,
    pixels_of,
)

PIXELS = np.random.default_rng(0).integers(256, size=(5, 8, 12, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_folder_and_a_file_give_the_same_pixels(folder, tmp_path):
    write_npz(tmp_path / "x.npz", {"arr_0": PIXELS})
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    for source in (open_source(folder), open_source(tmp_path / "x.npz")):
        assert len(source) == 5
        numbers, images = source.read([3, 0])
        assert numbers == [3, 0] and torch.equal(images, expected[[3, 0]])
    assert len(open_source(folder, limit=2)) == len(open_source(tmp_path / "x.npz", limit=2)) == 2


def test_unreadable_files_are_left_out_and_named(folder):
    (folder / "2.png").write_bytes(b"not an image")
    source = FolderImages(folder)
    numbers, images = source.read(range(5))
    assert numbers == [0, 1, 3, 4] and len(images) == 4
    assert "2.png" in source.why_bad(2)
    assert source.read([2])[0] == []


def test_mixed_sizes_need_a_size(folder):
    Image.fromarray(PIXELS[0][:4]).save(folder / "3.png")
    with pytest.raises(
        ValueError, match=r"3\.png has 4x12 pixels and .*0\.png has 8x12: give a size.*--size"
    ):
        FolderImages(folder).read(range(5))
    assert FolderImages(folder, 6).read(range(5))[1].shape == (5, 3, 6, 6)


def test_identity_changes_with_the_files(folder):
    before = FolderImages(folder).identity()
    assert FolderImages(folder).identity() == before
    Image.fromarray(PIXELS[0]).resize((12, 9)).save(folder / "1.png")
    assert FolderImages(folder).identity() != before
    assert str(folder) not in str(FolderImages(folder).describe())


@pytest.mark.parametrize("array", [
    PIXELS.astype(np.float32), PIXELS[0], PIXELS[..., :1], PIXELS[:0], PIXELS.transpose(0, 3, 1, 2),
])
def test_other_arrays_are_not_images(tmp_path, array):
    write_npz(tmp_path / "x.npz", {"arr_0": array})
    with pytest.raises(ValueError, match=r"arr_0 is .*, not uint8 \(N, H, W, 3\)"):
        NpzImages(tmp_path / "x.npz")


def test_a_file_keeps_its_size(tmp_path):
    write_npz(tmp_path / "x.npz", {"arr_0": PIXELS})
    with pytest.raises(ValueError, match="leave --size out"):
        open_source(tmp_path / "x.npz", 64)


SECTION = OmegaConf.create(
    {
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 1,
                "validation": {
                    "target": "taming.data.landscapes.Landscapes",
                    "params": {"size": 32, "length": 3, "keys": ["image", "depth"]},
                },
            },
        }
    }
).data


def test_images_of_a_data_set():
    source = DatasetImages(SECTION, "validation", limit=2)
    assert len(source) == 2
    numbers, images = source.read([1])
    assert numbers == [1] and images.shape == (1, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, DatasetImages(SECTION, "validation").read([1])[1])
    depth = DatasetImages(SECTION, "validation", "depth")
    assert depth.channels == 1 and depth.read([0])[1].shape == (1, 3, 32, 32)


def test_keys_that_hold_no_image_are_named():
    with pytest.raises(ValueError, match="have no photo, but image, depth"):
        DatasetImages(SECTION, "validation", "photo")


def test_one_changed_pixel_changes_the_hash():
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    other = images.clone()
    other[1, 2, 3, 4] += 1
    hashes = [content_hash(x) for x in (images, other)]
    assert (hashes[0] != hashes[1]).any(1).tolist() == [False, True, False, False, False]
    assert hash_of_set(hashes[0]) != hash_of_set(hashes[1])
    assert hash_of_set(hashes[0]) == hash_of_set(
        torch.cat([content_hash(images[:2]), content_hash(images[2:])])
    )


def test_gray_and_rounding():
    assert pixels_of(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5))[0, 2, 0].tolist() == [
        0, 0, 128, 255, 255
    ]
