"""The order of the data: a function of a seed and a position, whatever the workers and earlier runs.

N batches an epoch on each process, W processes.
"""

import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from taming.data.items import NamedItems, make_batch

Pair = tuple[int, int]  # (epoch, index)


class SeededDataset(Dataset):
    """A data set whose random numbers are a function of (seed, epoch, index), in whichever process.

    Wraps anything with `__len__` and `__getitem__`. Indices are (epoch, index) pairs; a bare index means
    epoch 0. `collate_fn` makes batches: that of the data set, or else `make_batch`. A data set without random
    numbers may have `get_batch`, which takes the pairs themselves and returns a batch.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.collate_fn: Callable[[list], Any] = getattr(dataset, "collate_fn", None) or make_batch
        self.get_batch: Callable[[list[Pair]], Any] | None = getattr(dataset, "get_batch", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Pair | int) -> Any:
        epoch, index = _pair(key)
        if self.get_batch:
            return self.dataset[epoch, index]
        with seeded(self.seed, epoch, index):
            return self.dataset[index]

    def __getitems__(self, keys: Sequence[Pair | int]) -> Any:
        """Return the items of a batch, for `collate_fn`; torch's loaders call it."""
        if self.get_batch:
            return self.get_batch([_pair(key) for key in keys])
        return NamedItems((self[key] for key in keys), (f"item {_pair(key)[1]} of the data" for key in keys))


def _pair(key: Pair | int) -> Pair:
    return key if isinstance(key, tuple) else (0, key)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global CPU generators of python, numpy and torch from integers >= 0; restore them afterwards.

    Restoring matters without loader processes, where the model uses the same generators.
    """
    words = np.random.SeedSequence(key).generate_state(4)  # 4 x 32 independent bits
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed, which would also reseed the GPUs.
    torch.default_generator.manual_seed(int(words[2]) << 32 | int(words[3]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class ResumableBatchSampler(Sampler[list[Pair]]):
    """Shuffled batches without end: batch number q is batch q % N of epoch q // N.

    Each epoch is a permutation that depends on (seed, epoch) and is dealt to the processes in turn, so that
    the W batches with number b together are a slice of it. With `drop_last` (the default) the images that do
    not fill a batch on every process are left out of that epoch; otherwise the last batch is smaller, and
    where W does not divide the images, a few from the permutation's start are repeated, since processes must
    run equally many batches. A data set may make the permutation itself, `permutation(rng)`, to be read in an
    order that suits its files.

    Iterating yields the batches from `start` to before `stop`, as lists of (epoch, index) pairs; `len` is N.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples, self.batch_size, self.seed, self.drop_last = len(dataset), batch_size, seed, drop_last
        self._permutation = getattr(dataset, "permutation", None)
        self.rank, self.world_size = rank, world_size
        self.start = self.stop = 0  # numbers of batches

    def __len__(self) -> int:
        if self.drop_last:
            return self.samples // (self.batch_size * self.world_size)
        return -(-self.samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Pair]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for number in range(self.start, self.stop):
            if number // len(self) != epoch:
                epoch = number // len(self)
                order = self._order(epoch)
            first = number % len(self) * self.batch_size
            yield [(epoch, int(index)) for index in order[first:first + self.batch_size]]

    def _order(self, epoch: int) -> np.ndarray:
        """Return this process's share of the epoch's permutation."""
        rng = np.random.default_rng((self.seed, epoch))
        order = self._permutation(rng) if self._permutation else rng.permutation(self.samples)
        return order[_share(self.samples, self.rank, self.world_size, pad=not self.drop_last)]


class ShardedSampler(Sampler[int]):
    """The images of an evaluation, always in the same order, dealt to the processes in turn.

    Where the number of processes does not divide that of the images, the first few images are repeated, since
    processes must run equally many batches. `shuffle` puts them into one fixed random order, which depends on
    the seed.
    """

    def __init__(
        self, dataset: Sized, *, shuffle: bool = False, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        samples = len(dataset)
        order = np.random.default_rng((seed, 0)).permutation(samples) if shuffle else np.arange(samples)
        self.indices = order[_share(samples, rank, world_size, pad=True)].tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class ResumableDataLoader(DataLoader):
    """A DataLoader over a ResumableBatchSampler that asks for its start when its first batch is requested.

    Lightning makes the iterator before it has settled where a resumed run continues, and a DataLoader with
    worker processes reads ahead at once. Waiting for the first batch makes the answer right, and the skipped
    batches free.
    """

    plan: Callable[[], tuple[int, int]] | None = None  # returns (start, stop); None: epoch after epoch

    def __iter__(self) -> Any:
        sampler: Any = self.batch_sampler
        next_epoch = sampler.stop, sampler.stop + len(sampler)
        sampler.start, sampler.stop = self.plan() if self.plan else next_epoch
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the trainer's counters hold the position. Lightning requires the method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing; see state_dict."""


def _share(samples: int, rank: int, world_size: int, *, pad: bool) -> np.ndarray:
    """Return the positions in an order of `samples` that fall to one process: equally many for each."""
    total = -(-samples // world_size) * world_size if pad else samples // world_size * world_size
    return np.arange(rank, total, world_size) % samples
