"""Locality-aware initialization: early in training, a query of the last stage sees near pixels only.

H W grid of tokens, N = H * W of them in raster order. Source: Jiang, Chang and Wang 2021, "TransGAN", section
3.4, first version; its published code has the 1-d kind.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from taming.parameters import NonNegativeInt

Kind = Literal["1d", "2d"]
Schedule = Sequence[tuple[NonNegativeInt, NonNegativeInt]]


def locality_mask(
    height: int, width: int, radius: int, kind: Kind = "2d", device: torch.device | None = None
) -> Tensor:
    """Return which tokens a token sees, (N, N), bool: those at most `radius` away, itself among them.

    "2d" measures the larger of the distances in rows and columns. "1d" measures along the raster, so that it
    includes no pixel above or below while `radius` is less than `width`, and passes over ends of rows.
    """
    index = torch.arange(height * width, device=device)
    if kind == "1d":
        return (index[:, None] - index).abs() <= radius
    rows, columns = index // width, index % width
    vertical, horizontal = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    return torch.maximum(vertical, horizontal) <= radius


def check_schedule(schedule: Schedule) -> None:
    """Raise ValueError unless epochs and radii of a schedule rise."""
    for (epoch, radius), (next_epoch, next_radius) in zip(schedule, schedule[1:], strict=False):
        if next_epoch <= epoch or next_radius < radius:
            raise ValueError(
                f"locality: {[list(step) for step in schedule]} is not a list of [epoch, radius] in which "
                f"epochs rise and windows grow: [{epoch}, {radius}] is before [{next_epoch}, {next_radius}]"
            )


def radius_at(schedule: Schedule, epoch: int) -> int | None:
    """Return the radius of a schedule of [epoch, radius], each valid before its epoch; None: all is seen."""
    return next((radius for until, radius in schedule if epoch < until), None)
