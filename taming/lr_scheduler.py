"""Schedules: callables from a step number to a factor, for torch's LambdaLR and for the Gumbel temperature.

LambdaLR multiplies the optimizer's learning rate by the factor; with a base rate of 1, the factor is the
rate. It saves the attributes of a schedule in checkpoints: they are plain numbers and lists with fixed names.
"""

import logging
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from taming.parameters import NonNegativeFloat, NonNegativeInt, PositiveFloat

logger = logging.getLogger(__name__)


class Factor(np.float64):
    """A numpy scalar, as in 2021, whose product with a learning rate is a plain number.

    LambdaLR stores the product in the optimizer's state, and safely read checkpoints hold no numpy numbers.
    """

    def __mul__(self, other: float) -> float:  # type: ignore[override]  # plain on purpose
        return float(self) * float(other)

    __rmul__ = __mul__  # type: ignore[assignment]


class LambdaWarmUpCosineScheduler:
    """Rise linearly from `lr_start` to `lr_max`, then fall along half a cosine to `lr_min`, and stay there.

    Source of the cosine: Loshchilov and Hutter 2017, "SGDR", equation 5.

    Args:
        warm_up_steps: steps of the rise; 0 starts at `lr_max`.
        lr_min, lr_max, lr_start: factors at the end, at the top and at step 0.
        max_decay_steps: step, counted from 0, at which `lr_min` is reached.
        verbosity_interval: steps between two log messages with the factor; 0 for none.

    Raises:
        ValueError: `max_decay_steps` is not above `warm_up_steps`.
    """

    def __init__(
        self,
        warm_up_steps: NonNegativeFloat,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: PositiveFloat,
        verbosity_interval: NonNegativeInt = 0,
    ):
        if max_decay_steps <= warm_up_steps:
            raise ValueError(
                f"max_decay_steps ({max_decay_steps}) counts from step 0 and must be larger than "
                f"warm_up_steps ({warm_up_steps})"
            )
        self.lr_warm_up_steps = warm_up_steps
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_start = lr_start
        self.lr_max_decay_steps = max_decay_steps
        self.last_lr = 0.0
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int, **kwargs: Any) -> float:
        """Return the factor of step `n`, which depends on `n` alone."""
        if n < self.lr_warm_up_steps:
            self.last_lr = self.lr_start + (self.lr_max - self.lr_start) * n / self.lr_warm_up_steps
        else:
            t = min((n - self.lr_warm_up_steps) / (self.lr_max_decay_steps - self.lr_warm_up_steps), 1.0)
            self.last_lr = _cosine(self.lr_max, self.lr_min, t)
        _report(n, self.last_lr, self.verbosity_interval)
        return self.last_lr

    def __call__(self, n: int, **kwargs: Any) -> Factor:
        """Return the factor of step `n`."""
        return Factor(self.schedule(n, **kwargs))


class LambdaWarmUpCosineScheduler2:
    """Cycles of `LambdaWarmUpCosineScheduler`, each with its own numbers; the end of the last one stays.

    Args:
        warm_up_steps, f_min, f_max, f_start: as there, one entry per cycle.
        cycle_lengths: steps of each cycle, its warm-up included.
        verbosity_interval: steps between two log messages with the factor; 0 for none.

    Raises:
        ValueError: lists of different lengths, or a cycle that is not longer than its warm-up.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        lists = {
            "warm_up_steps": warm_up_steps, "f_min": f_min, "f_max": f_max, "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        lengths = {name: len(values) for name, values in lists.items()}
        if len(set(lengths.values())) != 1 or not cycle_lengths:
            raise ValueError(f"every list needs one entry per cycle, got these lengths: {lengths}")
        for warm_up, length in zip(warm_up_steps, cycle_lengths, strict=True):
            if length <= warm_up:
                raise ValueError(f"a cycle of {length} steps must be longer than its {warm_up} warm-up steps")
        self.lr_warm_up_steps = list(warm_up_steps)
        self.f_min = list(f_min)
        self.f_max = list(f_max)
        self.f_start = list(f_start)
        self.cycle_lengths = list(cycle_lengths)
        self.cum_cycles = [0, *accumulate(self.cycle_lengths)]
        self.last_f = 0.0
        self.verbosity_interval = verbosity_interval

    def find_in_interval(self, n: int) -> int:
        """Return the number of the cycle of step `n`; a border belongs to the cycle that ends there."""
        for cycle, end in enumerate(self.cum_cycles[1:]):
            if n <= end:
                return cycle
        return len(self.cycle_lengths) - 1

    def schedule(self, n: int, **kwargs: Any) -> float:
        """Return the factor of step `n`, which depends on `n` alone."""
        cycle = self.find_in_interval(n)
        local = min(n - self.cum_cycles[cycle], self.cycle_lengths[cycle])
        warm_up = self.lr_warm_up_steps[cycle]
        if local < warm_up:
            self.last_f = self.f_start[cycle] + (self.f_max[cycle] - self.f_start[cycle]) * local / warm_up
        else:
            self.last_f = self._decay(cycle, local)
        _report(n, self.last_f, self.verbosity_interval)
        return self.last_f

    def _decay(self, cycle: int, local: int) -> float:
        warm_up = self.lr_warm_up_steps[cycle]
        t = (local - warm_up) / (self.cycle_lengths[cycle] - warm_up)
        return _cosine(self.f_max[cycle], self.f_min[cycle], t)

    def __call__(self, n: int, **kwargs: Any) -> float:
        """Return the factor of step `n`."""
        return self.schedule(n, **kwargs)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Cycles that fall along a straight line.

    The line runs from `f_max` at the start of the cycle, not of its decay, to `f_min` at its end: after a
    warm-up the factor jumps down to it. Published models were trained with this.
    """

    def _decay(self, cycle: int, local: int) -> float:
        left = (self.cycle_lengths[cycle] - local) / self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * left


def _cosine(start: float, end: float, t: float) -> float:
    """Return the value at t, 0..1, of half a cosine from `start` to `end`."""
    return end + 0.5 * (start - end) * (1 + math.cos(t * math.pi))


def _report(n: int, factor: float, interval: int) -> None:
    if interval > 0 and n % interval == 0:
        logger.info("step %d: factor %g", n, factor)
