"""What position embeddings may begin with: where in its picture each token of a sequence lies.

A sequence is a row of parts: single tokens, such as a class, and grids in raster order, such as the codes of
a label map and those of the image. T tokens, D channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Part = int | Sequence[int]  # a number of tokens, or (h, w)
SCALE = 0.1  # beside token embeddings that begin with a deviation of 0.02: at first, places count most
OCTAVES = 4  # from half a wave over the picture to 8 waves


def layout_positions(layout: Sequence[Part], channels: int) -> Tensor:
    """Sines and cosines of the place of each token, and an offset for each part: (T, D), float32.

    A cell of a grid gets those of its centre in the picture, rows in one half of the channels and columns in
    the other, so that cells of two grids that show the same place begin alike, and the transformer need not
    find out first which belong together. In a part without a grid, places are the numbers of its tokens.
    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5, in two dimensions.

    Args:
        layout: the parts, in the order of the sequence.
        channels: D, a multiple of 4.

    Raises:
        ValueError: channels that are no multiple of 4, or a part that is neither a number nor two of them.
    """
    if channels % 4:
        raise ValueError(f"layout needs n_embd to be a multiple of 4, got {channels}")
    generator = torch.Generator().manual_seed(0)
    waves = math.pi * 2 ** torch.linspace(0, OCTAVES, channels // 4, device="cpu")  # numbers, on any device
    parts = []
    for part in layout:
        sides = (1, part) if isinstance(part, int) else tuple(part)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"layout: {part} is neither a number of tokens nor [height, width] of a grid")
        centres = [(torch.arange(side, device="cpu") + 0.5) / side for side in sides]
        places = torch.meshgrid(*centres, indexing="ij")
        angles = [place.flatten()[:, None] * waves for place in places]  # (h*w, D/4) each
        features = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
        which = torch.randn(channels, generator=generator, device="cpu")
        parts.append(features + 0.3 * which)
    return SCALE * torch.cat(parts)
