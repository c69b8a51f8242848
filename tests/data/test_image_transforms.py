"""Crops and flips return what they say they did."""

import pytest
import torch
from PIL import Image

from taming.data.image_transforms import (
    CenterCropReturnCoordinates,
    Random2dCropReturnCoordinates,
    RandomCrop1dReturnCoordinates,
    RandomHorizontalFlipReturn,
    ResizeToCover,
    convert_pil_to_tensor,
)

IMAGE = torch.arange(3 * 20 * 30).reshape(3, 20, 30)  # (C, H, W)


def cut_by(box, image=IMAGE):
    """The part of an image that a box names."""
    height, width = image.shape[1:]
    x, y, w, h = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    return image[:, round(y):round(y + h), round(x):round(x + w)]


@pytest.mark.parametrize("transform, size", [
    (CenterCropReturnCoordinates(20), (20, 20)),
    (CenterCropReturnCoordinates((6, 9)), (6, 9)),
    (RandomCrop1dReturnCoordinates(20), (20, 20)),
    (RandomCrop1dReturnCoordinates(7), (7, 7)),
])
def test_the_box_is_what_was_cropped(transform, size):
    for seed in range(5):
        torch.manual_seed(seed)
        box, crop = transform(IMAGE)
        assert crop.shape == (3, *size) and torch.equal(crop, cut_by(box))


def test_the_box_of_the_largest_central_square():
    box_of = CenterCropReturnCoordinates.get_bbox_of_center_crop
    assert box_of(30, 20) == pytest.approx((5 / 30, 0, 20 / 30, 1))
    assert box_of(20, 30) == pytest.approx((0, 5 / 30, 1, 20 / 30))


def test_the_centre_is_the_centre():
    assert CenterCropReturnCoordinates(20)(IMAGE)[0] == pytest.approx((5 / 30, 0, 20 / 30, 1))


def test_random_crops_go_everywhere():
    torch.manual_seed(0)
    lefts = {RandomCrop1dReturnCoordinates(20)(IMAGE)[0][0] for _ in range(200)}
    assert len(lefts) == 11 and min(lefts) == 0 and max(lefts) == pytest.approx(10 / 30)
    sides = set()
    for _ in range(200):
        box, crop = Random2dCropReturnCoordinates(12)(IMAGE)
        assert torch.equal(crop, cut_by(box)) and crop.shape[1] == crop.shape[2]
        sides.add(crop.shape[1])
    assert sides == set(range(12, 21))


def test_of_a_small_image_the_largest_square_is_taken():
    assert Random2dCropReturnCoordinates(64)(IMAGE)[1].shape == (3, 20, 20)
    with pytest.raises(ValueError, match="20x30 pixels .* smaller than the crop of 21x21: resize it first"):
        RandomCrop1dReturnCoordinates(21)(IMAGE)


@pytest.mark.parametrize("size, covered", [
    (10, (10, 15)), (40, (40, 60)), ((10, 30), (20, 30)), ((40, 10), (40, 60)), ((7, 11), (7, 11)),
])
def test_resizing_covers_a_size(size, covered):
    assert ResizeToCover(size)(IMAGE.float()).shape == (3, *covered)


def test_random_crops_keep_the_proportions_of_a_rectangle():
    torch.manual_seed(0)
    seen = set()
    for _ in range(100):
        box, crop = Random2dCropReturnCoordinates((6, 12))(IMAGE)
        assert torch.equal(crop, cut_by(box)) and crop.shape[2] == 2 * crop.shape[1]
        seen.add(crop.shape[1])
    assert seen == set(range(6, 16))
    assert Random2dCropReturnCoordinates((64, 32))(IMAGE)[1].shape == (3, 20, 10)


def test_flips_say_so():
    torch.manual_seed(0)
    seen = [RandomHorizontalFlipReturn()(IMAGE) for _ in range(50)]
    assert 10 < sum(flipped for flipped, _ in seen) < 40
    assert all(torch.equal(image, IMAGE.flip(-1) if flipped else IMAGE) for flipped, image in seen)
    assert RandomHorizontalFlipReturn(p=0)(IMAGE)[0] is False


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_pillow_images_become_tensors(mode, channels):
    tensor = convert_pil_to_tensor(Image.new(mode, (5, 4), "white"))
    assert tensor.shape == (channels, 4, 5) and tensor.dtype == torch.uint8 and tensor.min() == 255
