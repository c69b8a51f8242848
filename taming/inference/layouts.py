"""Layouts of objects or joints on pictures larger than in training: each window reads what of it it shows.

A transformer was trained on layouts of the very crops it saw. The 2021 sampler therefore built the layout
anew for each window (`make_scene_samples.py`, `get_crop_coordinates`); so does this.

B batch, M tokens of a layout, N codes of a window, H W pixels, h w latent grid. A box is (x0, y0, width,
height) in shares of the picture's sides, 0..1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taming.data.helper_types import BoundingBox
from taming.data.pose import PoseTokens
from taming.data.sampler import seeded
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import CachedTransformer, sample_window

Position = tuple[int, int]  # row, column, in codes
POINT = 1e-4  # width of the box that stands for a point
FINE = 1 << 16  # pixels of the picture that joints are moved in


def seen_in(builder: Any, layout: Tensor, window: BoundingBox) -> Tensor:
    """The layout of a window of the picture, from the layout of the whole: tokens (M,) to tokens (M,).

    Objects and joints outside of it are left out; boxes are cut at its edge. Where a layout encodes its crop,
    boxes stay, and the crop becomes the window.
    """
    if isinstance(builder, PoseTokens):
        left, top, width, height = (share * FINE for share in window)
        joints = builder.inverse_build(layout, (FINE, FINE))
        joints[..., :2] -= (left, top)
        return builder.build(joints, (height, width))
    objects, crop = builder.inverse_build(layout)
    if crop is not None:  # the window is a part of the crop
        left, top, width, height = crop
        window = left + window[0] * width, top + window[1] * height, window[2] * width, window[3] * height
    annotations = [
        builder.representation_to_annotation(which)._replace(bbox=_box(where)) for which, where in objects
    ]
    with seeded(0):  # the builder shuffles
        return builder.build(annotations, window)


def _box(where: Sequence[float]) -> BoundingBox:
    """A box with its corners in order, from a box or a point."""
    if len(where) == 2:
        return where[0] - POINT / 2, where[1] - POINT / 2, POINT, POINT
    x, y, width, height = where
    return min(x, x + width), min(y, y + height), abs(width), abs(height)


def draw_layouts(
    model: Net2NetTransformer, builder: Any, layouts: Tensor, size: tuple[int, int], **settings: Any
) -> Tensor:
    """Codes (B, h, w) of pictures of `size` (H, W) pixels with layouts (B, M); each window sees its part.

    `builder` made the layouts; `settings` are those of `taming.sampling.sample_window`.
    """
    shape, window = model.latent_shape(*size), model.latent_shape()
    rows = layouts.cpu()
    found: dict[int, Tensor] = {}

    def layouts_at(place: int) -> Tensor:
        if place not in found:
            row, column = divmod(place, shape[1])
            box = (column / shape[1], row / shape[0], window[1] / shape[1], window[0] / shape[0])
            found[place] = torch.stack([seen_in(builder, row, box) for row in rows]).to(layouts.device)
        return found[place]

    reader = LayoutReader(model.transformer, layouts_at, layouts.shape, math.prod(window), model.null_token)
    places = torch.arange(math.prod(shape), device=layouts.device).view(1, *shape).expand(len(rows), -1, -1)
    return sample_window(
        reader, places, shape=shape, window=window, codebook_size=model.codebook_size,
        null_condition=None if model.null_token is None else places, **settings,
    )


class LayoutReader:
    """A transformer that reads the layout of a window in place of the window's place.

    For `sample_window`, whose condition is a grid of places then, numbered in raster order: of the N places
    of a window, the first says where it lies.

    Args:
        transformer: what reads layouts.
        layouts_at: from a place to the layouts (B, M) of the window that begins there.
        shape: (B, M).
        cells: N.
        null_token: in place of the layout, in a second half of the batch.
    """

    def __init__(
        self, transformer: CachedTransformer, layouts_at: Callable[[int], Tensor], shape: tuple[int, int],
        cells: int, null_token: int | None,
    ):
        self.transformer, self.layouts_at = transformer, layouts_at
        self.cells, self.null_token, self.batch_size = cells, null_token, shape[0]
        self.surplus = cells - shape[1]  # tokens that the transformer never sees
        self.block_size = transformer.block_size + self.surplus

    def new_cache(self, batch_size: int, length: int) -> "ShiftedCache":
        """Memory for `length` positions, of which a window's places take N."""
        return ShiftedCache(self.transformer.new_cache(batch_size, length - self.surplus), self.surplus)

    def extend(self, idx: Tensor, cache: "ShiftedCache") -> Tensor:
        """Append tokens (B or 2B, T) to the cache; the first call begins with the N places."""
        if cache.length == 0:
            layouts = self.layouts_at(int(idx[0, 0]))  # (B, M)
            if len(idx) > self.batch_size:
                layouts = torch.cat((layouts, torch.full_like(layouts, self.null_token)))
            idx = torch.cat((layouts, idx[:, self.cells :]), dim=1)
        return self.transformer.extend(idx, cache.inner)


@dataclass
class ShiftedCache:
    """A cache that counts more positions than it holds, once it holds any."""

    inner: Any
    surplus: int

    @property
    def length(self) -> int:
        """How many positions are filled, as `sample_window` counts them."""
        return self.inner.length and self.inner.length + self.surplus

    @length.setter
    def length(self, value: int) -> None:
        self.inner.length = value and value - self.surplus
