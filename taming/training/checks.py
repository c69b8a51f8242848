"""Checks before the first batch: the files of the loss are there, and model and data agree."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from taming.config import get_obj_from_str, instantiate_from_config
from taming.modules.losses.lpips import LPIPS, MissingWeights

LOSS = "model.params.lossconfig.params"


def check_loss_files(model_config: DictConfig, download: bool) -> None:
    """Make sure that the weights of the perceptual loss are on disk, before anything large is built.

    With `download` they are fetched if they are missing, else only the server is asked for them.

    Raises:
        FileNotFoundError: the weights are missing; the message says what to add to the command.
    """
    loss_config = model_config.params.get("lossconfig")
    if not loss_config or not get_obj_from_str(loss_config.target).__module__.startswith("taming."):
        return
    with torch.device("meta"):  # no memory, no random numbers
        loss: Any = instantiate_from_config(loss_config)
    if getattr(loss, "perceptual_weight", 1.0) <= 0:
        return
    try:
        for part in loss.modules():
            if isinstance(part, LPIPS):
                part.ensure_weights(download)
    except MissingWeights as error:
        by_path = f"give its path: {LOSS}.perceptual_path=FILE"
        remedy = error.remedy.replace("give its path as trunk_path", by_path)
        raise FileNotFoundError(
            f"{error.reason}: {remedy}, or train without LPIPS: {LOSS}.perceptual_weight=0"
        ) from None


def check_first_item(model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Raise unless there is a batch to train on, and images are there and of a size that the model takes."""
    items = getattr(data, "datasets", {}).get("train")
    if not hasattr(items, "__getitem__"):
        return
    if hasattr(data, "drop_last") and len(items):
        data.train_dataloader()  # says so when the images do not fill a batch
    item = items[0]
    wanted = [getattr(model, name, None) for name in ("image_key", "first_stage_key")]
    wanted += getattr(model, "cond_keys", [])
    for key in filter(None, wanted):
        if isinstance(item, dict) and key not in item:
            raise ValueError(
                f"the training data has no {key!r}, only {', '.join(map(repr, sorted(item)))}: change the "
                "model's image_key, first_stage_key or cond_stage_key, or the data set"
            )
    image, stage = wanted[0] or wanted[1], getattr(model, "first_stage_model", model)
    if image and hasattr(stage, "check_size") and np.ndim(item[image]) == 3:
        stage.check_size(*np.shape(item[image])[:2])
