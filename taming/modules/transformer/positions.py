"""Initial values of position embeddings: where in its image each token of a sequence lies.

A sequence has parts: single tokens, such as a class, and grids in raster order, such as the codes of a label
map and those of the image. T tokens, D channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Part = int | Sequence[int]  # a number of tokens, or (h, w)
SCALE = 0.1  # token embeddings start with a deviation of 0.02: at first, places count most
OCTAVES = 4  # from half a wave over the image to 8 waves


def part_length(part: Part) -> int:
    """Return the number of tokens of a part."""
    return part if isinstance(part, int) else math.prod(part)


def layout_positions(layout: Sequence[Part], channels: int) -> Tensor:
    """Return sines and cosines of the place of each token, plus an offset for each part: (T, D), float32.

    A cell of a grid gets those of its center in the image, rows in one half of the channels and columns in
    the other. So cells of two grids that show the same place start alike, and the transformer need not learn
    first which of them belong together. In a part without a grid, places are the numbers of its tokens.
    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5, in two dimensions.

    Args:
        layout: the parts, in the order of the sequence.
        channels: D, a multiple of 4.

    Raises:
        ValueError: `channels` is not a multiple of 4, or a part is neither a number nor two of them.
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
        centers = [(torch.arange(side, device="cpu") + 0.5) / side for side in sides]
        places = torch.meshgrid(*centers, indexing="ij")
        angles = [place.flatten()[:, None] * waves for place in places]  # (h*w, D/4) each
        features = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
        which = torch.randn(channels, generator=generator, device="cpu")
        parts.append(features + 0.3 * which)
    return SCALE * torch.cat(parts)
