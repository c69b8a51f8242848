"""Label maps and masks: colours, sizes, files."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from taming.colormap import label_colors
from taming.web.painting import (
    brushed,
    canvas_size,
    check_shape,
    fitted,
    labels_of,
    paint_labels,
)


def test_painted_labels_come_back():
    ids = np.random.default_rng(0).integers(0, 183, (16, 24))
    painted = paint_labels(ids, 183)
    assert (labels_of(painted, 183, (16, 24)).numpy() == ids).all()
    enlarged = painted.resize((240, 160), Image.Resampling.NEAREST)
    assert (labels_of(enlarged, 183, (16, 24)).numpy() == ids).all()


def test_blended_rims_are_no_labels_of_their_own():
    canvas = paint_labels(np.zeros((256, 256), int), 10)  # sky
    ImageDraw.Draw(canvas).rectangle((0, 128, 255, 255), fill=tuple(label_colors(10)[9]))  # rock
    blurred = canvas.filter(ImageFilter.GaussianBlur(2))
    ids = labels_of(blurred, 10, (32, 32))
    assert ids[:16].eq(0).all() and ids[16:].eq(9).all()
    assert set(labels_of(blurred, 10, (256, 256)).unique().tolist()) - {0, 9}  # what it guards against


def test_a_code_is_brushed_if_one_pixel_is():
    layer = Image.new("RGBA", (64, 64))
    layer.putpixel((63, 0), (255, 0, 0, 255))
    touched = brushed([None, layer], (8, 8))
    assert touched[0, 7] and touched.sum() == 1
    assert not brushed([Image.new("RGBA", (64, 64))], (8, 8)).any() and not brushed([], (8, 8)).any()


def test_images_are_cropped_around_their_center():
    picture = Image.new("RGB", (40, 10), "black")
    ImageDraw.Draw(picture).rectangle((15, 0, 24, 9), fill="white")
    middle = np.asarray(fitted(picture, (20, 20)))
    assert middle.shape == (20, 20, 3) and middle[:, 2:-2].min() > 250 and middle.mean() > 240


def test_canvas_keeps_the_proportions():
    assert canvas_size((64, 256)) == (128, 512) and canvas_size((64, 64)) == (512, 512)
    check_shape("the depth", Image.new("RGB", (512, 128)), (64, 256))
    with pytest.raises(ValueError, match=r"the depth is 128x512 .* proportions of 64x64"):
        check_shape("the depth", Image.new("RGB", (512, 128)), (64, 64))


def test_reading_is_quick_at_the_size_of_a_canvas():
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    ids = labels_of(Image.fromarray(noise), 20, (64, 64))
    assert ids.shape == (64, 64) and 0 <= ids.min() and ids.max() < 20
