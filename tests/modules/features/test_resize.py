"""Resizing: equal to TensorFlow 1's formula, and to Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from taming.modules.features.resize import resize_bicubic, resize_bilinear_tf1

SIZES = [(256, 256), (64, 64), (299, 299), (300, 121), (1, 7)]


def pixels(height, width, batch=2):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def tf1_bilinear(image, side):
    """TensorFlow 1's kernel, pixel by pixel, without align_corners: image (H, W, C) uint8."""
    height, width, _ = image.shape
    image = image.astype(np.float32)
    out = np.empty((side, side, image.shape[2]), np.float32)
    scale_y, scale_x = np.float32(height) / np.float32(side), np.float32(width) / np.float32(side)
    for i in range(side):
        y = np.float32(i) * scale_y
        top = int(y)
        bottom, fy = min(top + 1, height - 1), y - np.float32(top)
        for j in range(side):
            x = np.float32(j) * scale_x
            left = int(x)
            right, fx = min(left + 1, width - 1), x - np.float32(left)
            above = image[top, left] + (image[top, right] - image[top, left]) * fx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * fx
            out[i, j] = above + (below - above) * fy
    return out


@pytest.mark.parametrize(("height", "width"), [(64, 64), (29, 29), (30, 121), (1, 7)])
@pytest.mark.parametrize("side", [43, 29])
def test_bilinear_is_tensorflow_1s(height, width, side):
    images = pixels(height, width, batch=1)
    got = resize_bilinear_tf1(images, side)
    want = tf1_bilinear(images[0].permute(1, 2, 0).numpy(), side)
    assert got.shape == (1, 3, side, side) and got.dtype == torch.float32
    np.testing.assert_array_equal(got[0].permute(1, 2, 0).numpy(), want)


def test_bilinear_has_no_half_pixel_offset_and_no_antialias():
    line = torch.tensor([0, 100, 200, 44], dtype=torch.uint8).expand(1, 3, 4, 4)
    assert resize_bilinear_tf1(line, 2)[0, 0, 0].tolist() == [0, 200]
    assert resize_bilinear_tf1(line, 8)[0, 0, 0].tolist() == [0, 50, 100, 150, 200, 122, 44, 44]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bicubic_is_pillows(height, width, layout):
    images = pixels(height, width).contiguous(memory_format=layout)
    got = resize_bicubic(images, 224)
    assert got.shape == (2, 3, 224, 224) and got.dtype == torch.uint8
    for image, mine in zip(images, got, strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        difference = mine.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs)
        # torch's fixed-point weights have fewer bits: 1 value in 50 differs by 1, in 100,000 by 2
        assert np.abs(difference).max() <= 2
        assert (difference != 0).mean() < 0.02


def test_the_right_size_is_left_alone():
    images = pixels(224, 224)
    assert resize_bicubic(images, 224) is images
    assert torch.equal(resize_bilinear_tf1(images, 224), images.float())


def test_without_the_8_bit_kernel_values_are_the_same():
    """The way of other devices, on this one."""
    images = pixels(64, 256)
    want = resize_bicubic(images, 224)
    device = type("Device", (), {"type": "other"})()
    other = images.as_subclass(type("OnOtherDevice", (torch.Tensor,), {"device": device}))
    difference = torch.Tensor(resize_bicubic(other, 224).int()) - want.int()
    assert 0 < (difference != 0).float().mean() < 0.02
    assert difference.abs().max() <= 2


@pytest.mark.gpu
def test_a_gpu_gives_the_same_within_two_levels():
    images = pixels(256, 256)
    difference = resize_bicubic(images.cuda(), 224).cpu().int() - resize_bicubic(images, 224).int()
    assert difference.abs().max() <= 2
    on_gpu = resize_bilinear_tf1(images.cuda(), 299).cpu()
    torch.testing.assert_close(on_gpu, resize_bilinear_tf1(images, 299), rtol=0, atol=1e-4)
