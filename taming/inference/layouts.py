"""Layouts of objects or joints on images larger than in training: each window is given the part it shows.

A transformer was trained on the layouts of crops. Therefore the layout is built again for each window, as the
sampler of 2021 did (`make_scene_samples.py`, `get_crop_coordinates`).

B batch, M tokens of a layout, H W pixels, h w latent grid. A box is (x0, y0, width, height) as shares of the
sides of the image, 0..1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taming.data.helper_types import BoundingBox
from taming.data.sampler import seeded
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import SamplingOptions

Position = tuple[int, int]  # row, column, in codes
POINT = 1e-4  # width of the box that stands for a point
FINE = 1 << 16  # pixels, the side of the image in which joints are moved


def crop_layout(builder: Any, layout: Tensor, window: BoundingBox) -> Tensor:
    """Return the layout (M,) of a window of the image, from the layout (M,) of the whole.

    Objects and joints outside of it are left out; boxes are cut at its edge. If a layout encodes its crop,
    boxes stay, and the crop becomes the window.
    """
    if builder.kind == "pose":
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
    """Return a box with its corners in order, from a box or a point."""
    if len(where) == 2:
        return where[0] - POINT / 2, where[1] - POINT / 2, POINT, POINT
    x, y, width, height = where
    return min(x, x + width), min(y, y + height), abs(width), abs(height)


def sample_layouts(
    model: Net2NetTransformer, builder: Any, layouts: Tensor, size: tuple[int, int],
    options: SamplingOptions | None = None, **arguments: Any,
) -> Tensor:
    """Sample codes (B, h, w) of images of `size` (H, W) pixels with layouts (B, M), each window its part.

    `builder` made the layouts; `options` and `arguments` are those of `taming.sampling.sample_window`.
    """
    shape, window = model.latent_shape(*size), model.latent_shape()
    rows = layouts.cpu()

    def layouts_at(origin: Position) -> Tensor:
        (row, column), (height, width) = origin, shape
        box = (column / width, row / height, window[1] / width, window[0] / height)
        return torch.stack([crop_layout(builder, layout, box) for layout in rows]).to(layouts.device)

    null = None if model.null_token is None else torch.full_like(layouts, model.null_token)
    return model.transformer.sample_window(
        layouts_at, options, shape=shape, window=window, null_condition=null,
        codebook_size=model.codebook_size, **arguments,
    )
