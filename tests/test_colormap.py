"""Colors of labels."""

import numpy as np
import pytest

from taming.colormap import label_colors


@pytest.mark.parametrize("count", [1, 10, 22, 183])
def test_every_label_has_a_color_of_its_own(count):
    colors = label_colors(count).astype(int)
    assert colors.shape == (count, 3)
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1000 * np.eye(count)
    assert distances.min() > 30 and (label_colors(count) == label_colors(count)).all()
    assert count < 22 or (label_colors(count)[:22] == label_colors(22)).all()


def test_too_many_labels_are_rejected():
    with pytest.raises(ValueError, match="2000 labels are too many"):
        label_colors(2000)
