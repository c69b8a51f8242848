"""A long evaluation in parts: resumable, shared by processes, with the same result as one process.

A part is a file with what was measured for a fixed range of images. Which images it holds depends on nothing
else, so that an interrupted evaluation goes on where it stopped, and any number of processes (torchrun) give
the same numbers. N images.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming.eval.npz import NpzFile, write_npz
from taming.inference.distributed import POLL_INTERVAL, rank_and_world_size
from taming.inference.provenance import digest
from taming.util import ProgressBar, atomic_write

PART = 256  # images
Measured = dict[str, Tensor]  # (n, ...) each, of the n images of a batch or a part


class Parts:
    """The parts of one evaluation, in a folder whose name says what is evaluated.

    Args:
        root: folder of all evaluations of a run.
        identity: all that the numbers depend on; another identity has another folder.
        count: images N.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], count: int):
        text = json.dumps(identity, sort_keys=True, default=str)
        self.folder = root / f"parts-{digest(text)}"
        self.count = count

    def __len__(self) -> int:
        return -(-self.count // PART)

    def numbers(self, part: int) -> list[int]:
        """Return the numbers of the images of a part."""
        return list(range(part * PART, min((part + 1) * PART, self.count)))

    def path(self, part: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"{part:06d}.npz"

    def measure(self, compute: Callable[[list[int]], Measured], what: str) -> None:
        """Compute the parts of this process that are missing; show progress in the first process.

        Args:
            compute: measures the images with these numbers.
            what: of which images, for the progress bar.
        """
        rank, world_size = rank_and_world_size()
        own = range(rank, len(self), world_size)
        self.folder.mkdir(parents=True, exist_ok=True)
        with ProgressBar(
            total=sum(len(self.numbers(part)) for part in own), unit="image", desc=what, disable=rank != 0
        ) as bar:
            for part in own:
                numbers = self.numbers(part)
                if not self.path(part).exists():
                    measured = compute(numbers)
                    with atomic_write(self.path(part)) as partial:
                        write_npz(partial, {name: np.asarray(x.cpu()) for name, x in measured.items()})
                bar.update(len(numbers))

    def __iter__(self) -> Iterator[NpzFile]:
        """Open each part in order; wait for those of other processes."""
        for part in range(len(self)):
            while not self.path(part).exists():  # torchrun ends this process if another one fails
                time.sleep(POLL_INTERVAL)
            with NpzFile(self.path(part)) as file:
                yield file

    def collect(self, *names: str) -> Measured:
        """Return what was measured for all images, in their order: (N, ...) of each name, by default of all.

        Names that no part holds are left out.
        """
        gathered: dict[str, list[Tensor]] = {}
        for file in self:
            for name in names or file.names:
                if name in file.names:
                    gathered.setdefault(name, []).append(torch.from_numpy(file.array(name)))
        return {name: torch.cat(parts) for name, parts in gathered.items()}

    def remove(self) -> None:
        """Remove the folder: what it holds is in the result."""
        shutil.rmtree(self.folder, ignore_errors=True)


def batches(numbers: list[int], size: int) -> Iterator[list[int]]:
    """Split numbers into batches of `size`."""
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def joined(measured: list[Measured]) -> Measured:
    """Concatenate what was measured for several batches, each name over those that have it."""
    names = dict.fromkeys(name for each in measured for name in each)
    return {name: torch.cat([each[name].cpu() for each in measured if name in each]) for name in names}
