"""Label maps as a condition: what every stage of segmentations has in common.

B batch, L labels, H W pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taming.colormap import colorize, label_colors
from taming.modules.conditioners.base import Conditioner, Size, check_condition_size, check_range


class LabelMapConditioner(Conditioner):
    """Encodes one-hot label maps (B, L, H, W).

    Attributes:
        n_labels: L.
    """

    kind = "label_map"
    remedy = "give a label map, `taming panorama --segmentation FILE` (scripts/make_panorama.py)"
    n_labels: int

    def one_hot(self, ids: Tensor) -> Tensor:
        """Turn label ids (B, H, W) into maps (B, L, H, W), float32, in channels-last memory.

        Raises:
            ValueError: an id that is not a label; on an accelerator it is not looked for.
        """
        self._check(ids)
        return F.one_hot(ids.long(), self.n_labels).permute(0, 3, 1, 2).float()

    def from_batch(self, value: Tensor) -> Tensor:
        """Turn ids (B, H, W) into one-hot maps; maps pass."""
        return self.one_hot(value) if value.ndim == 3 else value

    def validate(self, value: Tensor) -> None:
        """Raise ValueError for an id that is not a label."""
        if value.ndim == 3:
            self._check(value)

    def _check(self, ids: Tensor) -> None:
        most = self.n_labels - 1
        check_range(ids, most, f"label id {{}} is outside 0..{most}: correct the labels, or set n_labels")

    @property
    def palettes(self) -> list[np.ndarray]:
        """Colours by label, uint8 (L, 3), in which a label map may be painted; the first one is shown."""
        return [label_colors(self.n_labels)]

    def to_rgb(
        self, x: Tensor, size: Size | None = None, *, names: Sequence[str] = (),
        plot: Callable[[Tensor, Size], Tensor] | None = None,
    ) -> Tensor:
        """Show label maps (B, L, H, W) in the colours of `label_colors`: (B, 3, H, W) in [-1, 1]."""
        return colorize(x)

    def from_user(self, value: Any, size: Size) -> Tensor:
        """Take label ids (H, W) of that size."""
        if value is None:
            raise ValueError(self.remedy)
        check_condition_size(value.shape, size, "the label map")
        return self.one_hot(torch.as_tensor(value)[None])

    def resize(self, c: Tensor, size: Size) -> Tensor:
        """Resize maps (B, L, H, W) to the nearest pixel."""
        return F.interpolate(c, size, mode="nearest-exact")
