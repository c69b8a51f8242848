"""Schedules: values of temperature and guidance that change from step to step, and shares of masked codes.

A `Schedule` is a number, a tensor (B,) of one per image, or any callable from the step (an int, from 0) to
one of these; the common ones are here. `sample_tokens` counts the codes that it samples, `sample_window` the
positions of the grid in raster order, whether they are known or not.

S steps, B batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = float | Tensor | Callable[[int], float | Tensor]
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine", "power-cosine")


@dataclass(frozen=True)
class Linear:
    """Linear from `start` at the first step to `end` at the last of `steps`, and `end` from there on.

    Used for guidance by Chang et al. 2023 ("Muse", section 2.7) and, over its scales, Tian et al. 2024
    ("VAR").
    """

    start: float
    end: float | Tensor
    steps: int

    def __call__(self, step: int) -> float | Tensor:
        return self.start + (self.end - self.start) * _progress(step, self.steps)


@dataclass(frozen=True)
class PowerCosine:
    """Half a cosine from `start` to `end` over progress ** `power`; a power above 1 rises late.

    Used for guidance, with `start` 1, by Gao et al. 2023 ("MDT", power 4) and Yu et al. 2024 ("RAR"). Their
    progress is step / steps, which does not reach `end`; here the last step does. `guidance_schedule` counts
    one step more, and so has theirs.
    """

    start: float
    end: float | Tensor
    steps: int
    power: float = 4.0

    def __call__(self, step: int) -> float | Tensor:
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


def guidance_schedule(
    scale: Schedule, name: str, steps: int, power: float = 4.0,
    interval: Sequence[int | None] | None = None,
) -> Schedule:
    """Return the guidance scale w_t at step t of N, by the name of a schedule.

    constant: w_t = g. linear: from 1 at the first step to g at the last. power-cosine: w_t = 1 + (g - 1)
    (1 - cos(pi (t / N)^p)) / 2, as of RAR; cosine: the same with p = 1.

    Args:
        scale: g, a number or one per image (B,); or a schedule of its own, with the name "constant" only.
        name: one of `GUIDANCE_SCHEDULES`.
        steps: N.
        power: p.
        interval: first and last step with guidance, both included, or None for no end; the scale is 1 in all
            others.

    Raises:
        ValueError: an unknown name, a schedule of a schedule, a power that is not above 0, an interval
            without steps.
    """
    if name not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance_schedule is {name!r}: give one of {', '.join(GUIDANCE_SCHEDULES)}")
    if not power > 0:
        raise ValueError(f"guidance_power is {power:g}: give a number above 0; above 1, guidance rises late")
    if name == "constant":
        schedule = scale
    elif callable(scale):
        raise ValueError(
            f"guidance_schedule is {name!r}, but guidance is a schedule already: give a number, or leave out "
            "one of them"
        )
    elif name == "linear":
        schedule = Linear(1.0, scale, steps)
    else:
        schedule = PowerCosine(1.0, scale, steps + 1, 1.0 if name == "cosine" else power)
    if interval is None:
        return schedule
    first, last = (*interval, None)[:2]
    first, last = first or 0, steps - 1 if last is None else last
    if not 0 <= first <= last:
        raise ValueError(f"guidance_interval is {first},{last}: give the first and the last step, from 0")
    return Interval(schedule, first, last)


# Share of the codes that is masked at a progress in [0, 1], float64: from 1 to 0: figure 8 of Chang et al.
# 2022 ("MaskGIT"); "arccos" by Yu et al. 2024 ("TiTok") and Weber et al. 2024 ("MaskBit").
MASK_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda r: torch.cos(r * (math.pi / 2)),
    "arccos": lambda r: torch.acos(r) / (math.pi / 2),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "root": lambda r: 1 - r**0.5,
}


def num_masked(schedule: str, steps: Tensor, step: int, units: Tensor, left: Tensor) -> Tensor:
    """Return how many of `units` codes (B,) stay masked after a step, from 0, of `steps` (B,): int64 (B,).

    Each step decides at least one of the `left` codes that are still masked, and leaves at least one for each
    later step; the last one decides all. There must be as many codes as steps.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in MASK_SCHEDULES:
        raise ValueError(f"mask_schedule is {schedule!r}: give one of {', '.join(MASK_SCHEDULES)}")
    progress = (step + 1) / steps.double()
    share = MASK_SCHEDULES[schedule](progress.clamp(max=1.0))
    count = (units * share + 1e-9).floor().long()  # without the rounding errors of whole numbers
    count = torch.minimum(torch.maximum(count, steps - 1 - step), left - 1)
    return torch.where(progress < 1, count, 0)


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
