"""How many threads torch uses on a CPU: as many as make it fastest now, since other work may keep cores busy."""

import os
import time
from collections.abc import Callable

import torch

SIDE = 96  # of the matrices of the probe: small, so that waiting for other threads shows, as it does in layers
PRODUCTS = 24  # of a run of the probe
RUNS = 7
GAIN = 1.1  # more threads must be faster than fewer by this factor


def measured_threads(most: int | None = None, probe: Callable[[], object] | None = None) -> int:
    """Return the number of threads, up to `most`, with which torch is fastest at present.

    Threads that share a core with other work keep all others waiting at every layer: on two cores with two
    busy processes, two threads can be twenty times slower than one. So the numbers most, most / 2, ..., 1 are
    tried alternately. The slower half of the runs of each number decides, since other work comes and goes.

    Args:
        most: torch's own number when None.
        probe: what is timed; a few small matrix products and sums, some milliseconds, when None.
    """
    before = torch.get_num_threads()
    most = before if most is None else most
    if most <= 1:
        return 1
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    if counts[-1] != most:
        counts.append(most)
    probe = probe or _Probe()
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    try:
        for run in range(RUNS + 1):
            for count in counts:
                torch.set_num_threads(count)
                start = time.perf_counter()
                probe()
                if run:  # the first starts the threads
                    seconds[count].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    best = 1
    for count in counts[1:]:
        if GAIN * _slower_half(seconds[count]) < _slower_half(seconds[best]):
            best = count
    return best


def set_measured_threads() -> int:
    """Set torch's threads to `measured_threads`, unless the user or another start has set them; return them.

    `OMP_NUM_THREADS`, `MKL_NUM_THREADS` and `TAMING_THREADS` in the environment win.
    """
    if given := os.environ.get("TAMING_THREADS"):
        torch.set_num_threads(max(1, int(given)))
    elif not threads_are_given():
        torch.set_num_threads(measured_threads())
    return torch.get_num_threads()


def threads_are_given() -> bool:
    """Say whether the number of threads was chosen by the environment or by `torch.set_num_threads`."""
    if any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return True
    return torch.get_num_threads() != _at_import


class _Probe:
    """Small matrix products, each followed by an elementwise function, as layers are."""

    def __init__(self) -> None:
        self.x = torch.ones(8 * SIDE, 4 * SIDE)
        self.y = torch.full((4 * SIDE, 4 * SIDE), 1e-3)

    @torch.no_grad()
    def __call__(self) -> None:
        x = self.x
        for _ in range(PRODUCTS):
            x = torch.tanh(x @ self.y)


def _slower_half(seconds: list[float]) -> float:
    """Return the mean of the slower half."""
    slow = sorted(seconds)[len(seconds) // 2 :]
    return sum(slow) / len(slow)


_at_import = torch.get_num_threads()
