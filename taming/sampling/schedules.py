"""Settings of a sampler that change from step to step: temperature and the scale of guidance.

Wherever a sampler takes such a setting, it may be a number, a tensor (B,) of one per image, or any callable
from the step (an int, from 0) to one of these; those that are used most are here. A step is a code's place in
the order of drawing: `sample_tokens` counts the codes that it draws, `sample_window` the positions of the
grid in raster order, whether they are known or not.

S steps, B batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Setting = float | Tensor | Callable[[int], float | Tensor]


@dataclass(frozen=True)
class Linear:
    """From `start` at the first step to `end` at the last of `steps`, and `end` from there on.

    As guidance: Chang et al. 2023 ("Muse", section 2.7), and Tian et al. 2024 ("VAR") over its scales.
    """

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * _progress(step, self.steps)


@dataclass(frozen=True)
class PowerCosine:
    """From `start` to `end` along half a cosine over progress ** `power`: late for a power above 1.

    As guidance, with `start` 1: Gao et al. 2023 ("MDT"), whose power is 4, for diffusion; Yu et al. 2024
    ("RAR") for codes drawn one by one. There progress is step / steps, which just misses `end`; here the
    last step reaches it.
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
    """`inside` in the steps first..last, both of them, and `outside` in all others.

    As guidance: Kynkaanniemi et al. 2024, for diffusion. Outside of it no second half is computed.
    """

    inside: Setting
    first: int
    last: int
    outside: float = 1.0

    def __call__(self, step: int) -> float | Tensor:
        if not self.first <= step <= self.last:
            return self.outside
        return self.inside(step) if callable(self.inside) else self.inside


def _progress(step: int, steps: int) -> float:
    return min(step / max(steps - 1, 1), 1.0)


def per_step(name: str, setting: Setting, steps: int, batch_size: int) -> Tensor:
    """All values of a setting, (S, B), float32, on the CPU, where they can be looked at without waiting.

    Raises:
        ValueError: a tensor that does not hold one value per image, or a value that is not finite.
    """
    values = [setting(step) for step in range(steps)] if callable(setting) else [setting]
    rows = [torch.as_tensor(value, dtype=torch.float32, device="cpu") for value in values]
    for row in rows:
        if row.shape not in ((), (batch_size,)):
            raise ValueError(f"{name} {tuple(row.shape)}: give a number, or {batch_size}, one for each image")
        if not row.isfinite().all():
            raise ValueError(f"{name} must be finite, not {row[~row.isfinite()][0].item()}")
    return torch.stack([row.expand(batch_size) for row in rows]).expand(steps, batch_size)
