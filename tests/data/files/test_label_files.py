"""Label maps from files: ids, and the colours of two palettes."""

import numpy as np
import pytest
import torch
from PIL import Image

from taming.colormap import label_colors
from taming.config import instantiate_from_config
from taming.data.files.label_files import read_labels, resized_labels, stage_colors
from taming.modules.conditioners.label_grid import LabelGrid
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
