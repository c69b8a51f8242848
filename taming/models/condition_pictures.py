"""Conditions as pictures, for the log and beside samples.

B batch, C channels, H W pixels, M tokens.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from taming.images import text_pictures
from taming.modules.util import Labelator


def draw_conditions(model: Any, c: Tensor | list[Tensor], x: Tensor, datasets: Iterable) -> dict[str, Tensor]:
    """The conditions of images x (B, C, H, W) by their keys: (B, 1 or 3, H, W) in [-1, 1].

    Args:
        model: the `Net2NetTransformer`.
        c: its condition, or conditions; those that are None are left out.
        x: the images.
        datasets: where names of classes (`class_names`), and pictures of tokens (`conditional_builders`,
            `plot_conditionals`) are looked for; tokens that none of them knows are left out.
    """
    values, drawn = [c] if torch.is_tensor(c) else c, {}
    datasets = [getattr(dataset, "data", dataset) for dataset in datasets]  # of a WrappedDataset
    height, width = x.shape[-2:]
    for key, stage, value in zip(model.cond_keys, model.cond_stages, values, strict=True):
        if value is None or key == model.first_stage_key:
            continue
        builder = next((d for d in datasets if key in getattr(d, "conditional_builders", {})), None)
        if value.ndim == 4:
            drawn[key] = value if value.shape[1] in (1, 3) else stage.to_rgb(value)
        elif isinstance(stage, Labelator):
            names = _class_names(datasets, stage.n_classes)
            lines = [names[number] for number in value.flatten().tolist()]
            drawn[key] = text_pictures(lines, (height, width)).to(x)
        elif builder is not None:
            drawn[key] = builder.plot_conditionals(key, value, (width, height)).to(x)
    return drawn


def _class_names(datasets: list, count: int) -> list[str]:
    """What the data call their classes, or the numbers."""
    for dataset in datasets:
        names = getattr(dataset, "class_names", ())
        if len(names) == count:
            return [f"{number} {name}" for number, name in enumerate(names)]
    return [str(number) for number in range(count)]
