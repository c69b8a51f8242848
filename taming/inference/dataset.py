"""The data set that a command draws for: that of the run, or another one that its options name."""

import argparse
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import default_collate

from taming.config import instantiate_from_config, load_config
from taming.data.sampler import SeededDataset
from taming.models.cond_transformer import Condition, Net2NetTransformer


def data_section(config: DictConfig, options: argparse.Namespace) -> DictConfig:
    """The section `data` of a run's config, as the options (see `add_data_source`) change it."""
    if options.ignore_base_data:
        config.pop("data", None)
    config = OmegaConf.merge(config, load_config(options.base, options.overrides))
    if not OmegaConf.is_dict(config.get("data")):
        raise ValueError("there is no section `data`: name a YAML with -b, or give data='{target: ..., ...}'")
    return config.data


def build_dataset(section: DictConfig, options: argparse.Namespace) -> SeededDataset:
    """The split of the data of such a section, with random numbers of its own for each item."""
    module = instantiate_from_config(section)
    module.setup()
    if options.split not in module.datasets:
        raise ValueError(f"--split {options.split}: the data has {', '.join(module.datasets) or 'no split'}")
    return SeededDataset(module.datasets[options.split], options.seed)


def unwrapped(dataset: SeededDataset) -> Any:
    """The data set itself, which `build_dataset` and the configuration's `wrap` put into others."""
    return getattr(dataset.dataset, "data", dataset.dataset)


def batch_of(dataset: SeededDataset, numbers: Sequence[int]) -> dict[str, Any]:
    """A batch of the items with these numbers."""
    collate = getattr(dataset.dataset, "collate_fn", None) or default_collate
    return collate([dataset[i] for i in numbers])


def condition_pictures(
    model: Net2NetTransformer, dataset: SeededDataset, c: Condition, x: Tensor
) -> dict[str, list[Tensor]]:
    """Those conditions that can be drawn, by their keys: (1 or 3, H, W) each, in [-1, 1].

    Layouts are drawn as large as x. Each item is drawn by itself, so that colours do not depend on the batch.
    """
    values = [c] if isinstance(c, Tensor) else list(c)
    drawn: dict[str, list[Tensor]] = {}
    for i in range(len(x)):
        own = [value[i : i + 1] for value in values]
        for key, picture in model.show_conditions(own, x[i : i + 1], [unwrapped(dataset)]).items():
            drawn.setdefault(key, []).append(picture[0].clamp(-1.0, 1.0).cpu())
    return drawn


def layout_builders(dataset: SeededDataset) -> dict[str, Any]:
    """What makes tokens of layouts for a data set, by the keys of its items; none where it has no layouts."""
    return getattr(unwrapped(dataset), "conditional_builders", {})
