"""Images of a run: one sheet per look, with inputs, reconstructions and samples side by side."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from taming.images import image_grid, save_png, to_pil
from taming.modules.distributed import whole_weights
from taming.parameters import NonNegativeInt, PositiveInt

logger = logging.getLogger(__name__)


class ImageLogger(Callback):
    """Write what `model.log_images(batch)` returns as one sheet, a PNG, and show it in TensorBoard.

    A sheet holds one strip per item: its input, its reconstruction and, where there are any, its conditions
    and samples, side by side, in the order of `log_images` (which the PNG's text `strips` repeats). It is
    written at batches 1, 2, 4, 8, ... (unless `increase_log_steps` is False), every `batch_frequency`
    batches, and for the first batch of every validation: `images/train/sheet_000128.png`.

    Args:
        batch_frequency: batches between sheets; 0 for none in training.
        max_images: items per sheet.
        clamp: clamp values to [-1, 1]; if False, divide the images of a kind by their largest magnitude.
        increase_log_steps: log at powers of two as well.
        log_images_kwargs: passed on to `model.log_images`.
    """

    def __init__(
        self, batch_frequency: NonNegativeInt = 750, max_images: PositiveInt = 4, clamp: bool = True,
        increase_log_steps: bool = True, log_images_kwargs: dict[str, Any] | None = None,
    ):
        self.batch_frequency, self.max_images, self.clamp = batch_frequency, max_images, clamp
        self.increase_log_steps, self.log_images_kwargs = increase_log_steps, log_images_kwargs or {}
        self._last_logged = -1

    def is_due(self, batches: int) -> bool:
        """Return whether a sheet is due after so many batches."""
        if batches < 1 or self.batch_frequency < 1:
            return False
        power_of_two = batches & (batches - 1) == 0 and batches < self.batch_frequency
        return batches % self.batch_frequency == 0 or (self.increase_log_steps and power_of_two)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.is_due(pl_module.batches_seen) and pl_module.batches_seen != self._last_logged:
            self._last_logged = pl_module.batches_seen  # once, however many batches are accumulated
            with whole_weights(pl_module):
                self.log_images(trainer, pl_module, batch, "train")

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            with whole_weights(pl_module):
                self.log_images(trainer, pl_module, batch, "val")

    @rank_zero_only
    def log_images(
        self, trainer: pl.Trainer, pl_module: Any, batch: Mapping[str, Any], split: str
    ) -> None:
        """Make and save the sheet of one batch; training goes on as if this had not been called.

        Random numbers are the same each time, so that only the model changes the images. Without enough
        memory on the GPU, or space on the disk, there is no sheet, and a warning.
        """
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        few = {key: value[: self.max_images] for key, value in batch.items() if hasattr(value, "__getitem__")}
        was_training = pl_module.training
        pl_module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
                torch.manual_seed(0)
                logged = pl_module.log_images(few, **self.log_images_kwargs)
                kinds = {name: self._in_range(images.float().cpu()) for name, images in logged.items()}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            logger.warning("no images: the GPU's memory is full; lower image_logger.params.max_images")
            return
        finally:
            pl_module.train(was_training)
        name, batches = f"{split}/sheet", pl_module.batches_seen
        path = Path(trainer.default_root_dir, "images", f"{name}_{batches:06d}.png")
        image = sheet(list(kinds.values()))
        try:
            save_png(image, path, {"strips": ", ".join(kinds)})
        except OSError as error:
            logger.warning("no images: %s: %s", path, error.strerror or error)
        for target in trainer.loggers:
            experiment: Any = getattr(target, "experiment", None)
            if hasattr(experiment, "add_image"):  # TensorBoard
                experiment.add_image(name, (image + 1.0) / 2.0, batches)
            elif hasattr(target, "log_image"):  # W&B
                target.log_image(key=name, images=[to_pil(image)])

    def _in_range(self, images: Tensor) -> Tensor:
        images = images[: self.max_images]
        if not self.clamp:
            images = images / images.abs().max().clamp_min(1e-8)
        return images.clamp(-1.0, 1.0)


def sheet(kinds: list[Tensor]) -> Tensor:
    """Lay out K kinds of B images each, (B, 1 or 3, H, W) in [-1, 1], as one image (3, H', W').

    Item by item its K images stand side by side; as many such strips share a row as make the sheet about
    square. Smaller images are enlarged to the size of the largest by nearest neighbour.
    """
    count = min(map(len, kinds))
    height, width = (max(images.shape[side] for images in kinds) for side in (2, 3))
    resized = [F.interpolate(images[:count], (height, width), mode="nearest-exact") for images in kinds]
    tiles = torch.stack([images.expand(-1, 3, -1, -1) for images in resized], dim=1)  # (B, K, 3, H, W)
    strips_per_row = math.ceil(math.sqrt(count * height / (len(kinds) * width)))
    return image_grid(tiles.flatten(0, 1), strips_per_row * len(kinds))  # (3, H', W')
