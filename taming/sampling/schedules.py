"""Schedules of temperature and guidance: values that change from step to step.

A `Schedule` is a number, a tensor (B,) of one per image, or any callable from the step (an int, from 0) to
one of these; the common ones are here. `sample_tokens` counts the codes that it samples, `sample_window` the
positions of the grid in raster order, whether they are known or not.

S steps, B batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = float | Tensor | Callable[[int], float | Tensor]


@dataclass(frozen=True)
class Linear:
    """Linear from `start` at the first step to `end` at the last of `steps`, and `end` from there on.

    Used for guidance by Chang et al. 2023 ("Muse", section 2.7) and, over its scales, Tian et al. 2024
    ("VAR").
    """

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _progress(step, self.steps)


@dataclass(frozen=True)
class PowerCosine:
    """Half a cosine from `start` to `end` over progress ** `power`; a power above 1 rises late.

    Used for guidance, with `start` 1, by Gao et al. 2023 ("MDT", power 4) and Yu et al. 2024 ("RAR"). Their
    progress is step / steps, which does not reach `end`; here the last step does.
    """

    start: float
    end: float
    steps: int
    power: float = 4.0

    def __call__(self, step: int) -> float:
        wave = (1 - math.cos(math.pi * _progress(step, self.steps) ** self.power)) / 2
        return self.start + (self.end - self.start) * wave


@dataclass(frozen=True)
class Interval:
    """`inside` in the steps first..last, both included, and `outside` in all others.

    Used for guidance by Kynkaanniemi et al. 2024; where it is 1, no second half is computed.
    """

    inside: Schedule
    first: int
    last: int
    outside: float = 1.0

    def __call__(self, step: int) -> float | Tensor:
        if not self.first <= step <= self.last:
            return self.outside
        return self.inside(step) if callable(self.inside) else self.inside


def _progress(step: int, steps: int) -> float:
    return min(step / max(steps - 1, 1), 1.0)


def per_step(name: str, schedule: Schedule, steps: int, batch_size: int) -> Tensor:
    """Return all values of a schedule, (S, B), float32, on the CPU, where checking them waits for no device.

    Raises:
        ValueError: a tensor that does not hold one value per image, or a value that is not finite.
    """
    values = [schedule(step) for step in range(steps)] if callable(schedule) else [schedule]
    rows = [torch.as_tensor(value, dtype=torch.float32, device="cpu") for value in values]
    for row in rows:
        if row.shape not in ((), (batch_size,)):
            raise ValueError(f"{name} {tuple(row.shape)}: give a number, or {batch_size}, one for each image")
        if not row.isfinite().all():
            raise ValueError(f"{name} must be finite, not {row[~row.isfinite()][0].item()}")
    return torch.stack([row.expand(batch_size) for row in rows]).expand(steps, batch_size)
