"""Label maps: ids to one-hot maps, and maps to colours.

B batch, L labels, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot_maps(ids: Tensor, n_labels: int) -> Tensor:
    """Label ids (B, H, W) to maps (B, L, H, W), float32, in channels-last memory.

    Raises:
        ValueError: an id that is no label.
    """
    lowest, highest = (int(bound) for bound in ids.aminmax())
    if lowest < 0 or highest >= n_labels:
        raise ValueError(f"label ids go from {lowest} to {highest}, but n_labels is {n_labels}")
    return F.one_hot(ids.long(), n_labels).permute(0, 3, 1, 2).float()


def palette(n_labels: int) -> Tensor:
    """A colour for each label, (3, n_labels, 1, 1): arbitrary, and the same in every run."""
    return torch.randn(3, n_labels, 1, 1, generator=torch.Generator().manual_seed(0))


def colored(maps: Tensor, colors: Tensor) -> Tensor:
    """Label maps (B, L, H, W) in colours (3, L, 1, 1) of any range: (B, 3, H, W) in [-1, 1].

    A label has the same colour in every picture, whichever others stand beside it.
    """
    x = F.conv2d(maps.float(), colors.to(maps.device))
    lowest, highest = colors.aminmax()
    return (2.0 * (x - lowest) / (highest - lowest).clamp_min(1e-8) - 1.0).clamp(-1.0, 1.0)
