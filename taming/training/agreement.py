"""Whether model and data agree: keys, sizes, channels."""

import numpy as np
import pytorch_lightning as pl


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
