"""How many threads torch uses on a CPU: as many as make it fastest now, beside whatever else runs."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch

RUNS, LONGEST = 7, 2.0  # of the probe with each number of threads; seconds, after three runs of each
GAIN = 1.1  # more threads must be faster than fewer by this factor
VARIABLES = "OMP_NUM_THREADS", "MKL_NUM_THREADS"

_at_import = torch.get_num_threads()
_chosen: int | None = None  # by this module


def measured_threads(most: int, probe: Callable[[], object] | None = None) -> int:
    """Return the number of threads, up to `most`, with which torch is fastest at present.

    A thread that shares its core with other work keeps all others waiting at every layer: on two cores with
    two busy processes, two threads can be twenty times slower than one. So 1, 2, 4, ..., most are tried
    alternately. The slower half of the runs of each number decides, since other work comes and goes.

    Args:
        most: torch's own choice, as a rule.
        probe: what is timed; small layers, some milliseconds, when None.
    """
    counts = sorted({most, *(2**i for i in range(most.bit_length()) if 2**i < most)})
    if len(counts) < 2:
        return most
    probe = probe or _Layers()
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    before, began = torch.get_num_threads(), time.perf_counter()
    try:
        for run in range(RUNS + 1):
            for count in counts:
                torch.set_num_threads(count)
                start = time.perf_counter()
                probe()
                if run:  # the first starts the threads
                    seconds[count].append(time.perf_counter() - start)
            if run >= 3 and time.perf_counter() - began > LONGEST:
                break
    finally:
        torch.set_num_threads(before)
    best = counts[0]
    for count in counts[1:]:
        if GAIN * _slower_half(seconds[count]) < _slower_half(seconds[best]):
            best = count
    return best


def choose_threads(stored: int | None = None) -> int | None:
    """Set torch's threads to `stored`, or to the number that is fastest now; return it.

    None if the user has chosen, by OMP_NUM_THREADS, MKL_NUM_THREADS or `torch.set_num_threads`: it stays.

    Args:
        stored: the number of a run that is resumed. Another would round sums differently.
    """
    global _chosen
    by_hand = torch.get_num_threads() not in (_at_import, _chosen)
    if by_hand or any(name in os.environ for name in VARIABLES):
        return None
    _chosen = stored or measured_threads(_at_import)
    torch.set_num_threads(_chosen)
    return _chosen


class _Layers:
    """Small matrix products, each followed by an elementwise function, as layers are."""

    def __init__(self) -> None:
        self.x, self.weight = torch.ones(256, 384), torch.full((384, 384), 1e-3)

    @torch.no_grad()
    def __call__(self) -> Any:
        x = self.x
        for _ in range(24):
            x = torch.tanh(x @ self.weight)
        return x


def _slower_half(seconds: list[float]) -> float:
    """Return the mean of the slower half."""
    slow = sorted(seconds)[len(seconds) // 2 :]
    return sum(slow) / len(slow)
