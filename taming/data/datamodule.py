"""The data sets of a run, and loaders that yield the same batches however the run is interrupted."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from taming.config import instantiate_from_config
from taming.data.items import ItemSpec, item_spec, make_batch, standard_item
from taming.data.sampler import ResumableBatchSampler, ResumableDataLoader, SeededDataset, ShardedSampler
from taming.parameters import NonNegativeInt, PositiveInt

logger = logging.getLogger(__name__)

MAX_DEFAULT_WORKERS = 8  # loader processes per training process
SPLITS_OF_STAGE = {  # what Lightning's stages read
    None: ("train", "validation", "test", "predict"),
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class WrappedDataset(Dataset):
    """Anything with `__len__` and `__getitem__` as a torch data set; other attributes are those of `data`."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name.startswith("__"):  # not set yet, as while it is unpickled
            raise AttributeError(name)
        return getattr(self.data, name)


class DataModuleFromConfig(pl.LightningDataModule):
    """Data sets named by a configuration, loaded in an order that is a function of the seed.

    Every training item is a function of (seed, epoch, index) whatever the number of loader processes, and a
    run that is resumed from a checkpoint, also in the middle of an epoch, sees the batches that the
    uninterrupted run would have seen. Evaluation reads its images in the same order with the same random
    numbers each time. Items of data sets without a `collate_fn` may have any form that `standard_item` takes.

    Sharding over processes is done here: build the Trainer with `use_distributed_sampler=False`. An
    IterableDataset is loaded in its own order, without these guarantees.

    Args:
        batch_size: images per process.
        train: `{target, params}` of the data set to train on; likewise `validation`, `test` and `predict`.
        wrap: put each data set into a WrappedDataset, for code that expects a torch Dataset in `datasets`;
            loading needs no more than `__len__` and `__getitem__` either way.
        num_workers: loader processes; by default one less than this process's share of the machine's cores,
            at most 8.
        seed: of orders, crops and flips.
        shuffle_validation: read validation images in one fixed random order, so that the first batches, which
            are logged as images, are a mixture.
        drop_last: leave training images that do not fill a batch out of the epoch (different ones each time),
            instead of running a smaller batch.

    Attributes:
        datasets: the data sets by split, once `setup` has run; `dataset_configs` holds their configurations.
    """

    def __init__(
        self,
        batch_size: PositiveInt,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: NonNegativeInt | None = None,
        *,
        predict: Mapping[str, Any] | None = None,
        seed: NonNegativeInt = 0,
        shuffle_validation: bool = False,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"the seed of the data must not be negative, got {seed}")
        splits = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {split: config for split, config in splits.items() if config is not None}
        _check_split_folders(self.dataset_configs)
        self.datasets: dict[str, Any] = {}
        self.batch_size, self.num_workers, self.wrap = batch_size, num_workers, wrap
        self.seed, self.shuffle_validation, self.drop_last = seed, shuffle_validation, drop_last
        self._sampler: ResumableBatchSampler | None = None  # of the training loader in use
        self._offset = 0  # number of the next batch minus the batches that the trainer has counted
        self._restored: dict[str, int] = {}  # state of the run that is being resumed

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets that a stage needs (None: all), once each."""
        for split in SPLITS_OF_STAGE[stage]:
            if split in self.dataset_configs and split not in self.datasets:
                dataset = instantiate_from_config(self.dataset_configs[split])
                self.datasets[split] = WrappedDataset(dataset) if self.wrap else dataset

    def item_spec(self, split: str = "train") -> ItemSpec:
        """Describe the items of a split by its first one, which is read: shapes, and numbers of classes.

        Raises:
            ValueError: the item has a form that models do not take.
        """
        dataset = self._dataset(split)
        name = f"item 0 of the {split} data"
        is_stream = isinstance(dataset, IterableDataset)
        item = next(iter(dataset)) if is_stream else SeededDataset(dataset, self.seed)[0]
        return item_spec(dataset, standard_item(item, name), name)

    def first_batch(self, split: str = "train") -> dict[str, Any]:
        """Return a batch of the first item of a split alone."""
        dataset = self._dataset(split)
        seeded = SeededDataset(dataset, self.seed)
        is_stream = isinstance(dataset, IterableDataset)
        return seeded.collate_fn([next(iter(dataset))] if is_stream else seeded.__getitems__([0]))

    def train_dataloader(self) -> DataLoader:
        """Return the training loader: shuffled, sharded, continuing where the trainer's counters stand."""
        dataset = self._dataset("train")
        if isinstance(dataset, IterableDataset):
            return DataLoader(dataset, self.batch_size, **self._loader_options(dataset))
        rank, world_size = self._shard()
        sampler = ResumableBatchSampler(
            dataset, self.batch_size,
            seed=self.seed, drop_last=self.drop_last, rank=rank, world_size=world_size,
        )
        if not len(sampler):
            raise ValueError(
                f"batch_size={self.batch_size} on {world_size} process(es) needs "
                f"{self.batch_size * world_size} images, but the training set holds {len(dataset)}: "
                f"lower batch_size to at most {max(1, len(dataset) // world_size)}, add images, "
                f"or set drop_last: false"
            )
        self._sampler = sampler
        self._match_restored_order(sampler)
        seeded = SeededDataset(dataset, self.seed)
        loader = ResumableDataLoader(seeded, batch_sampler=sampler, **self._loader_options(dataset))
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            loader.plan = self._plan
        return loader

    def val_dataloader(self) -> DataLoader | list:
        """Return the validation loader, or an empty list if no validation split is configured."""
        return self._evaluation_loader("validation", shuffle=self.shuffle_validation)

    def test_dataloader(self) -> DataLoader | list:
        """Return the test loader, or an empty list if no test split is configured."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader | list:
        """Return the prediction loader, or an empty list if no predict split is configured."""
        return self._evaluation_loader("predict")

    def state_dict(self) -> dict[str, int]:
        """Describe the training order and the position in it, for the checkpoint."""
        if self._sampler is None or self.trainer is None:
            return {}
        counted = self._batches_counted()
        identity = _order_identity(self._sampler)
        return {"position": counted + self._offset, "counted": counted, **identity}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep the state of the run that is resumed until the training loader is made."""
        self._restored = dict(state_dict)

    def _plan(self) -> tuple[int, int]:
        """Return the numbers of the first batch that the trainer will ask for, and of that after the last.

        The position is the number of batches whose training step has finished. That number, unlike the epoch
        counters, is right in a checkpoint of any moment: in the middle of an epoch, after an exception, and
        where a run was stopped in the middle of an epoch, which Lightning then counts as finished.
        """
        trainer: Any = self.trainer
        done_in_epoch = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # With overfit_batches every epoch is the first few batches of the first.
        start = done_in_epoch if trainer.overfit_batches else self._batches_counted() + self._offset
        return start, start + max(0, int(trainer.num_training_batches) - done_in_epoch)

    def _batches_counted(self) -> int:
        trainer: Any = self.trainer
        return trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _match_restored_order(self, sampler: ResumableBatchSampler) -> None:
        """Continue the restored order, or, where that is impossible, begin the next epoch of the new one."""
        restored, self._restored = self._restored, {}
        if not restored:
            if self.trainer is None or not self._batches_counted():
                self._offset = 0
            return
        changed = [
            f"{key} was {restored.get(key)} and is {value}"
            for key, value in _order_identity(sampler).items() if restored.get(key) != value
        ]
        position = restored["position"]
        if changed:
            epoch, batch = divmod(position, restored["batches_per_epoch"])
            position = (epoch + (batch > 0)) * len(sampler)
            lost = f", {restored['batches_per_epoch'] - batch} batches early" if batch else ""
            logger.warning(
                "the data order of the checkpoint cannot be continued (%s): a new epoch begins%s",
                "; ".join(changed), lost,
            )
        self._offset = position - restored["counted"]

    def _evaluation_loader(self, split: str, shuffle: bool = False) -> DataLoader | list:
        if split not in self.dataset_configs:
            return []
        dataset = self._dataset(split)
        if isinstance(dataset, IterableDataset):
            return DataLoader(dataset, self.batch_size, **self._loader_options(dataset))
        rank, world_size = self._shard()
        sampler = ShardedSampler(dataset, shuffle=shuffle, seed=self.seed, rank=rank, world_size=world_size)
        seeded = SeededDataset(dataset, self.seed)
        return DataLoader(seeded, self.batch_size, sampler=sampler, **self._loader_options(dataset))

    def _dataset(self, split: str) -> Any:
        if split not in self.dataset_configs:
            raise ValueError(f"no {split} data is configured: add data.params.{split} with target and params")
        if split not in self.datasets:
            raise ValueError(f"the {split} data set has not been built yet: call setup() first")
        dataset = self.datasets[split]
        if not isinstance(dataset, IterableDataset) and not len(dataset):
            raise ValueError(f"the {split} data set {self.dataset_configs[split]['target']} is empty")
        return dataset

    def _shard(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""
        trainer = self.trainer
        if trainer is None:
            return 0, 1
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "DataModuleFromConfig shards data itself: build Trainer(use_distributed_sampler=False)"
            )
        return trainer.global_rank, trainer.world_size

    def _loader_options(self, dataset: Any) -> dict[str, Any]:
        workers = self.num_workers
        if workers is None:
            workers = default_num_workers(self.trainer.num_devices if self.trainer is not None else 1)
        return {
            "collate_fn": getattr(dataset, "collate_fn", None) or make_batch,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # Its own generator: making an iterator must not advance the one that the model uses.
            "generator": torch.Generator().manual_seed(self.seed),
        }


def _order_identity(sampler: ResumableBatchSampler) -> dict[str, int]:
    """Return what the content of a batch depends on besides its number."""
    return {
        "batches_per_epoch": len(sampler), "samples": sampler.samples, "batch_size": sampler.batch_size,
        "world_size": sampler.world_size, "seed": sampler.seed,
    }


def _check_split_folders(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if two data sets take shares, `split: 0.1`, of different images: a mistake."""
    sources = {}
    for name, config in configs.items():
        params = config.get("params") or {}
        if isinstance(params.get("split"), float | int):
            keys = ("folder", "training_images_list_file", "test_images_list_file")
            sources[name] = next((str(params[key]) for key in keys if params.get(key)), "")
    if len(set(sources.values())) > 1:
        listed = " and ".join(f"{source} ({name})" for name, source in sources.items())
        remedy = " ".join(f"data.params.{name}.params.split=null" for name in sources)
        raise ValueError(
            f"split shares one folder between training and validation, but these are {listed}: set {remedy} "
            "to use each whole"
        )


def default_num_workers(processes: int = 1) -> int:
    """Return the number of loader processes for each of `processes` training processes here: 0 to 8."""
    affinity = getattr(os, "sched_getaffinity", None)  # the cores of this process, if known
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(0, min(cores // max(1, processes) - 1, MAX_DEFAULT_WORKERS))
