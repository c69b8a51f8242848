"""Label maps from files: ids, and the colours of two palettes."""

import numpy as np
import pytest
import torch
from PIL import Image

from taming.colormap import label_colors
from taming.config import instantiate_from_config
from taming.data.files.label_files import read_labels, read_mask, resized_labels, stage_colors
from taming.modules.conditioners.label_grid import LabelGrid
from tests.data.files.hostile import png
from tests.scripts.test_make_panorama import STAGE_OF_LABELS

IDS = np.arange(100).reshape(10, 10) // 10


@pytest.fixture(params=("grid", "network"))
def stage(request):
    return LabelGrid(10, 8) if request.param == "grid" else instantiate_from_config(STAGE_OF_LABELS)


def save(folder, pixels, name="map.png", **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels.astype(np.uint8))
    picture.save(folder / name, **options)
    return folder / name


def test_ids_and_the_colours_of_both_palettes(stage, tmp_path):
    for pixels in (IDS, label_colors(10)[IDS], stage_colors(stage)[IDS]):
        ids = read_labels(save(tmp_path, pixels), stage)
        assert ids.dtype == torch.int64 and (ids.numpy() == IDS).all()


def test_colours_survive_compression(stage, tmp_path):
    painted = Image.fromarray(label_colors(10)[IDS]).resize((200, 200), Image.Resampling.NEAREST)
    file = save(tmp_path, painted, "map.jpg", quality=90)
    ids = read_labels(file, stage, exact=False)
    assert (resized_labels(ids, (10, 10)).numpy() == IDS).all()
    with pytest.raises(ValueError, match="which is none of the palette of 10 labels"):
        read_labels(file, stage)  # the rims are of other colours


def test_a_single_foreign_pixel_is_named(stage, tmp_path):
    pixels = label_colors(10)[IDS]
    pixels[3, 4] = 255, 0, 255
    file = save(tmp_path, pixels)
    with pytest.raises(ValueError, match=r"the colour \(255, 0, 255\), which is none of the palette"):
        read_labels(file, stage)
    negative = save(tmp_path, 255 - stage_colors(stage)[np.where(IDS < 5, 3, 8)], "negative.png")
    with pytest.raises(ValueError, match="which is none of the palette of 10 labels"):
        read_labels(negative, stage)


def test_a_palette_file_may_hold_ids_or_colours(stage, tmp_path):
    indexed = Image.fromarray(IDS.astype(np.uint8), mode="P")
    indexed.putpalette(np.zeros(768, np.uint8).tobytes())  # a palette that says nothing: the indices are ids
    assert (read_labels(save(tmp_path, indexed), stage).numpy() == IDS).all()
    indexed = Image.fromarray((IDS + 100).astype(np.uint8), mode="P")
    colors = np.zeros((256, 3), np.uint8)
    colors[100:110] = label_colors(10)
    indexed.putpalette(colors.tobytes())
    assert (read_labels(save(tmp_path, indexed), stage).numpy() == IDS).all()


def test_what_is_no_label_map(stage, tmp_path):
    with pytest.raises(ValueError, match=r"map.png has the label 200, the model's are 0\.\.9"):
        read_labels(save(tmp_path, np.full((8, 8), 200)), stage)
    with pytest.raises(ValueError, match="none of the palette of 10 labels: give a map"):
        read_labels(save(tmp_path, np.full((8, 8, 3), (255, 0, 255))), LabelGrid(10, 8))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png"):
        read_labels(tmp_path / "text.png", stage)


# ---- files that could be read in two ways


def indexed(indices, palette):
    """An image of indexed colours; `palette` is (K, 3)."""
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    return image


def test_indexed_colours_of_the_model_are_read_by_colour(stage, tmp_path):
    """A painted map that was saved with a palette: its indices are labels as well, but other ones."""
    rng = np.random.default_rng(0)
    for palette in (label_colors(10), stage_colors(stage)):
        order = rng.permutation(10)
        file = save(tmp_path, indexed(np.argsort(order)[IDS], palette[order]))
        assert (read_labels(file, stage).numpy() == IDS).all()
        assert (read_labels(file, stage, exact=False).numpy() == IDS).all()
    painted = Image.fromarray(label_colors(10)[IDS % 4 + 3]).quantize(16)
    assert (read_labels(save(tmp_path, painted), stage).numpy() == IDS % 4 + 3).all()
    sea = Image.fromarray(np.broadcast_to(label_colors(10)[5], (8, 8, 3)).copy()).quantize(4)
    assert (read_labels(save(tmp_path, sea), stage).numpy() == 5).all()


@pytest.mark.parametrize("palette", [
    np.zeros((256, 3)), np.arange(256).repeat(3).reshape(256, 3),  # palettes that nobody chose
    np.random.default_rng(3).integers(1, 255, (256, 3)),  # of other programs, to tell ids apart
], ids=["black", "gray", "foreign"])
def test_indices_count_where_no_colour_is_the_models(stage, tmp_path, palette):
    assert (read_labels(save(tmp_path, indexed(IDS, palette)), stage).numpy() == IDS).all()


def test_indexed_colours_of_which_some_are_the_models_are_ambiguous(stage, tmp_path):
    palette = np.roll(label_colors(10), 1, axis=0)
    palette[7] = 1, 2, 3
    both = r"map.png can be read in two ways: by its indices, .* or by its colours, \d of 10 are"
    with pytest.raises(ValueError, match=both):
        read_labels(save(tmp_path, indexed(IDS, palette)), stage)
    indices_alone = np.zeros((256, 3), np.uint8)
    indices_alone[100:110] = palette
    with pytest.raises(ValueError, match="none of the palette"):  # indices that are not labels
        read_labels(save(tmp_path, indexed(IDS + 100, indices_alone)), stage)


def test_grays_of_the_models_palette_are_ambiguous(tmp_path):
    class Gray(LabelGrid):
        def to_rgb(self, c):
            return c.argmax(1, keepdim=True).expand(-1, 3, -1, -1) * -2 / 255 + 1  # label 0 is white

    ramp = np.arange(256).repeat(3).reshape(256, 3)
    assert (stage_colors(Gray(10, 8)) == 255 - np.arange(10)[:, None]).all()
    with pytest.raises(ValueError, match="can be read in two ways: by its indices"):
        read_labels(save(tmp_path, indexed(IDS % 3, 255 - ramp)), Gray(10, 8))


def test_colours_of_two_palettes_are_ambiguous(tmp_path):
    class Rolled(LabelGrid):
        def to_rgb(self, c):
            return super().to_rgb(c.roll(1, dims=1))

    file = save(tmp_path, label_colors(10)[IDS])
    with pytest.raises(ValueError, match="those that the model shows, for different labels"):
        read_labels(file, Rolled(10, 8))


def test_transparent_pixels_have_no_label(stage, tmp_path):
    rgba = np.dstack([label_colors(10)[IDS], np.full(IDS.shape, 255)])
    assert (read_labels(save(tmp_path, rgba), stage).numpy() == IDS).all()
    rgba[0, 0, 3] = 0
    with pytest.raises(ValueError, match="map.png has transparent pixels, which have no label"):
        read_labels(save(tmp_path, rgba), stage)
    la = Image.merge("LA", [Image.fromarray(IDS.astype(np.uint8)), Image.new("L", (10, 10), 255)])
    assert (read_labels(save(tmp_path, la), stage).numpy() == IDS).all()
    la.putpixel((3, 3), (1, 128))
    with pytest.raises(ValueError, match="transparent"):
        read_labels(save(tmp_path, la), stage)


def test_a_map_that_is_too_large_is_refused_before_it_is_decoded(stage, tmp_path):
    (tmp_path / "x.png").write_bytes(png(9000, 9000, 1, rows=1))
    with pytest.raises(ValueError, match="9000x9000 pixels .* are more than 33554432"):
        read_labels(tmp_path / "x.png", stage)
    with pytest.raises(ValueError, match="9000x9000 pixels"):
        read_mask(tmp_path / "x.png")


# ---- masks

HALF = np.arange(64).reshape(8, 8) >= 32  # the lower half


def rgba(color, alpha):
    return np.dstack([np.broadcast_to(np.uint8(color), (8, 8, 3)), np.uint8(alpha)])


def as_mask(mode):
    if mode == "I;16":
        return Image.fromarray(np.uint16(HALF * 65535))
    if mode == "P":
        return indexed(np.where(HALF, 3, 2), [[9, 9, 9], [9, 9, 9], [0, 0, 0], [255, 255, 255]])
    return Image.fromarray(np.uint8(HALF * 255)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "P", "I;16", "LA", "RGBA"])
def test_masks_of_every_mode(tmp_path, mode):
    assert (read_mask(save(tmp_path, as_mask(mode))).numpy() == HALF).all()


@pytest.mark.parametrize("pixels", [
    rgba([255, 255, 255], HALF * 255), rgba([250, 255, 240], np.where(HALF, 200, 40)),
    np.where(HALF[..., None], np.uint8([255, 255, 255, 255]), np.uint8([255, 255, 255, 0])),
    np.where(HALF[..., None], np.uint8([255, 255, 255, 255]), np.uint8([0, 0, 0, 255])),
    np.where(HALF[..., None], np.uint8([255, 255, 255, 255]), np.uint8([9, 80, 200, 0])),
], ids=["white strokes", "soft strokes", "white below", "opaque", "colours below"])
def test_a_transparent_mask_is_alpha_times_white(tmp_path, pixels):
    assert (read_mask(save(tmp_path, pixels)).numpy() == HALF).all()


def test_a_palette_or_gray_mask_with_a_transparent_colour(tmp_path):
    white = indexed(~HALF, [[255, 255, 255], [255, 255, 255]])
    assert (read_mask(save(tmp_path, white, transparency=1)).numpy() == HALF).all()
    gray = Image.fromarray(np.where(HALF, 255, 200).astype(np.uint8))
    assert (read_mask(save(tmp_path, gray, transparency=200)).numpy() == HALF).all()


photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3))


@pytest.mark.parametrize("pixels, message", [
    (np.dstack([photo, ~HALF * 255]), "two ways: what is white is to be generated, or what is transparent"),
    (rgba([255, 0, 0], HALF * 255), "two ways: what is white is to be generated, or what is transparent"),
    (rgba([0, 0, 0], HALF * 255), "two ways: what is white is to be generated, and nothing is white, or"),
    (photo, "two ways: what is white is to be generated, or all that is painted, and it has other colours"),
    (np.where(HALF[..., None], [0, 255, 0], [0, 0, 0]), "or all that is painted"),
    (HALF * 1, "leaves nothing to generate, values are 0 to 1 of 255"),
    (rgba([255, 255, 255], HALF * 0), "leaves nothing to generate, it is transparent"),
    (HALF * 0, "leaves nothing to generate, values are 0 to 0"),
], ids=["erased photo", "red strokes", "black strokes", "photo", "green", "ids", "transparent", "black"])
def test_masks_that_can_be_read_in_two_ways_are_errors(tmp_path, pixels, message):
    with pytest.raises(ValueError, match=f"^mask .*map.png .*{message}") as caught:
        read_mask(save(tmp_path, np.asarray(pixels)))
    assert "Give a black image, with white where" in str(caught.value)
