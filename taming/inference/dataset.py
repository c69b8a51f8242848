"""The data set that a command works with: that of the run, or another one."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from taming.config import find_config, instantiate_from_config, load_config
from taming.data.datamodule import WrappedDataset
from taming.data.sampler import SeededDataset
from taming.models.cond_transformer import Condition, Net2NetTransformer


def data_section(
    config: DictConfig, files: Iterable[str | Path] = (), overrides: Sequence[str] = (), *,
    ignore_base_data: bool = False,
) -> DictConfig:
    """Return the section `data` of a run's config, with other configurations merged over it.

    Args:
        config: of the run.
        files: YAML files, or names that `taming.config.find_config` finds.
        overrides: `data.sub=value` items, on top of the files.
        ignore_base_data: leave out the section of the run.

    Raises:
        ValueError: there is no such section.
        FileNotFoundError: there is no such file.
    """
    if ignore_base_data:
        config.pop("data", None)
    merged = OmegaConf.merge(config, load_config(map(find_config, files), overrides))
    section = merged.get("data") if isinstance(merged, DictConfig) else None
    if not isinstance(section, DictConfig):
        raise ValueError("there is no section `data`: name a YAML with -b, or give data='{target: ..., ...}'")
    return section


def build_dataset(section: DictConfig, split: str, seed: int) -> SeededDataset:
    """Build one split of the data of such a section; each item has random numbers of its own.

    Raises:
        ValueError: there is no such split.
    """
    module = instantiate_from_config(section)
    module.setup()
    if split not in module.datasets:
        raise ValueError(f"--split {split}: the data has {', '.join(module.datasets) or 'no split'}")
    return SeededDataset(module.datasets[split], seed)


def unwrapped(dataset: SeededDataset) -> Any:
    """Return the data set itself, which `build_dataset` and the configuration's `wrap` put into others."""
    return dataset.dataset.data if isinstance(dataset.dataset, WrappedDataset) else dataset.dataset


def batch_of(dataset: SeededDataset, numbers: Sequence[int]) -> dict[str, Any]:
    """Return a batch of the items with these numbers."""
    return dataset.collate_fn(dataset.__getitems__(numbers))


def condition_images(
    model: Net2NetTransformer, dataset: SeededDataset, c: Condition, x: Tensor
) -> dict[str, list[Tensor]]:
    """Return those conditions that have an appearance, by their keys: (1 or 3, H, W) each, in [-1, 1].

    Layouts are as large as x. Each item is rendered by itself, so that colors do not depend on the batch.
    """
    values = [c] if isinstance(c, Tensor) else [value for value in c if value is not None]
    images: dict[str, list[Tensor]] = {}
    for i in range(len(x)):
        own = [value[i : i + 1] for value in values]
        for key, image in model.show_conditions(own, x[i : i + 1], [unwrapped(dataset)]).items():
            images.setdefault(key, []).append(image[0].clamp(-1.0, 1.0).cpu())
    return images


def layout_builders(dataset: SeededDataset) -> dict[str, Any]:
    """Return what makes the tokens of layouts for a data set, by the keys of its items."""
    return getattr(unwrapped(dataset), "conditional_builders", {})
