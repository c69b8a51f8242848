"""Judge reconstructions or samples in every validation, by the features of a network, and log the numbers."""

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from taming.eval.networks import default_networks, load_feature_network
from taming.eval.reconstruction import FirstStage, reconstruct
from taming.eval.sources import pixels_of
from taming.images import from_uint8
from taming.metrics import FeatureStatistics, frechet_distance
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.distributed import whole_weights
from taming.parameters import NonNegativeInt, PositiveInt
from taming.sampling import image_generators

logger = logging.getLogger(__name__)


class Evaluation(Callback):
    """Log the Frechet distance between validation images and what the model makes of them.

    Of tokenizers and autoencoders these are reconstructions, `val/rfd`; of a transformer samples for the
    conditions of the images, and of a GAN samples, `val/gfd`. Name the metric as `monitor` to keep the
    checkpoints that are best by it:

        lightning:
          callbacks:
            evaluation: {target: taming.training.callbacks.Evaluation, params: {num_images: 256}}
          modelcheckpoint: {params: {monitor: val/rfd}}

    Few images give a distance that is far too large, though one that orders the checkpoints of a run; compare
    models by `taming evaluate`. Sample i is made with the random numbers of image i, the same every time.

    Args:
        num_images: of the first validation images, over all processes together.
        network: whose features are compared: "inception", "dinov2" or "efflite0"; None takes inception if its
            weights are found, else efflite0.
        weights: file of the network's weights; None looks in the usual places.
        every_n_validations: leave out the others.
        seed: of the samples.
    """

    def __init__(
        self, num_images: PositiveInt = 256, network: str | None = None, weights: str | None = None,
        every_n_validations: PositiveInt = 1, seed: NonNegativeInt = 0,
    ):
        self.num_images, self.every, self.seed = num_images, every_n_validations, seed
        self.network = load_feature_network(network or default_networks()[0], weights)
        self._validations = 0
        self._sets: list[FeatureStatistics] = []  # of images and of what is made of them; empty: not now

    @staticmethod
    def logged_metrics(model: Any) -> tuple[str, ...]:
        """Return the names of what is logged, for the check of `monitor`."""
        return ("val/rfd" if isinstance(model, FirstStage) else "val/gfd",)

    def state_dict(self) -> dict[str, int]:
        """Return how many validations there were."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self._validations = int(state_dict.get("validations", 0))

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Begin new sets."""
        self._sets = []
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every == 0:
            self.network.to(pl_module.device)
            self._sets = [FeatureStatistics(self.network.num_features) for _ in range(2)]

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the images of the batch, as long as there are not enough."""
        wanted = -(-self.num_images // trainer.world_size)
        if not self._sets or dataloader_idx or self._sets[0].count >= wanted:
            return
        few = {
            key: v[: wanted - self._sets[0].count] for key, v in batch.items() if hasattr(v, "__getitem__")
        }
        with torch.no_grad():
            made = self._reconstructions(pl_module, few) if isinstance(pl_module, FirstStage) \
                else self._samples(trainer, pl_module, few)
            for statistics, images in zip(self._sets, made, strict=True):
                statistics.update(self.network(pixels_of(images)).features.cpu())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the distance."""
        if not self._sets:
            return
        real, made = (self._over_processes(each) for each in self._sets)
        if min(real.count, made.count) < 2:
            logger.warning("no distance: validation has %d images", real.count)
            return
        with warnings.catch_warnings():  # that there are few images is said above
            warnings.simplefilter("ignore", UserWarning)
            distance = frechet_distance(real, made)
        (name,) = self.logged_metrics(pl_module)
        pl_module.log(name, torch.tensor(distance, dtype=torch.float32))
        self._sets = []

    def _reconstructions(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        x = model.get_input(batch, model.image_key)
        return x, from_uint8(reconstruct(model, pixels_of(x), x.shape[1])[0])

    def _samples(
        self, trainer: pl.Trainer, model: Any, batch: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        first, size = self._sets[0].count, len(next(iter(batch.values())))
        numbers = [(first + i) * trainer.world_size + trainer.global_rank for i in range(size)]
        generators = image_generators(self.seed, numbers)
        if not isinstance(model, Net2NetTransformer):  # a LatentGenerator
            x = model.get_input(batch, model.image_key)
            return x, torch.cat([model.sample(1, each) for each in generators])
        x, c = model.get_xc(batch)
        with whole_weights(model):
            return x, model.generate(model.encode_conditions(c), generator=generators)

    @staticmethod
    def _over_processes(own: FeatureStatistics) -> FeatureStatistics:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return own
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        total = FeatureStatistics(len(own.mean))
        for each in gathered:
            total.merge(each)
        return total
