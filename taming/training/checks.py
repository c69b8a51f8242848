"""Checks before the first batch: the files of the loss are there, and model and data agree."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from taming.config import get_obj_from_str
from taming.data.datamodule import DataModuleFromConfig
from taming.data.items import ItemSpec
from taming.models.autoencoder import build_loss
from taming.models.base import ImageModel
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import ImageSizes, SizeMismatch
from taming.modules.frozen import Frozen
from taming.modules.losses.lpips import MissingWeights
from taming.parameters import did_you_mean

LOSS = "model.params.lossconfig.params"


def check_loss_files(model_config: DictConfig, download: bool) -> None:
    """Make sure that the weights of frozen networks in the loss are on disk, before anything large is built.

    With `download` they are fetched if they are missing, else only the server is asked for those of LPIPS.

    Raises:
        FileNotFoundError: weights are missing; the message says what to add to the command.
    """
    loss_config = model_config.params.get("lossconfig")
    if not loss_config or not get_obj_from_str(loss_config.target).__module__.startswith("taming."):
        return
    with torch.device("meta"):  # no memory, no random numbers
        loss: Any = build_loss(loss_config)
    without = ("perceptual_loss",) if getattr(loss, "perceptual_weight", 1.0) <= 0 else ()
    for name, part in loss.named_modules():
        if not isinstance(part, Frozen) or name.startswith(without):
            continue
        try:
            part.ensure_weights(download)
        except MissingWeights as error:
            by_path = f"give its path: {LOSS}.perceptual_path=FILE"
            remedy = error.remedy.replace("give its path as trunk_path", by_path)
            raise FileNotFoundError(
                f"{error.reason}: {remedy}, or train without LPIPS: {LOSS}.perceptual_weight=0"
            ) from None
        except FileNotFoundError as error:
            remedy = "perceptual_path=FILE, or train without it: perceptual_weight=0"
            if not name.startswith("perceptual_loss"):
                remedy = "disc_config.params.weights=FILE"
            raise FileNotFoundError(f"{error}; here that is {LOSS}.{remedy}") from None


def check_agreement(
    config: DictConfig, model: pl.LightningModule, data: pl.LightningDataModule, *, has_weights: bool = True
) -> None:
    """Check the first item of each split against the model, and that the items fill a batch.

    `config` is the whole configuration. Data modules and models of other packages are not checked. A code
    cache is compared with the weights of the stages if the model has them: those of a resumed run come later.

    Raises:
        ValueError: keys, sizes, channels or numbers of classes do not agree; the message says what to set.
    """
    if not isinstance(data, DataModuleFromConfig):
        return
    data.train_dataloader()  # says so when the images do not fill a batch
    for split in ("train", "validation"):
        if split not in data.datasets or not isinstance(model, ImageModel):
            continue
        spec, header = data.item_spec(split), getattr(data.datasets[split], "code_header", None)
        if header is not None and isinstance(model, Net2NetTransformer):
            if has_weights:
                check_code_cache(split, header, model)
        else:
            check_keys(spec, model)
        check_classes(spec, model)
        try:
            model.check_batch(model.on_before_batch_transfer(data.first_batch(split), 0))
        except SizeMismatch as error:
            raise ValueError(f"the {split} data has {error}: {size_remedy(error, config, model)}") from None


def check_code_cache(split: str, header: Any, model: Net2NetTransformer) -> None:
    """Raise ValueError if a split is a code cache of other stages than those of the model."""
    try:
        model.check_cache(header)
    except ValueError as error:
        raise ValueError(f"the {split} data: {error}") from None


def check_keys(spec: ItemSpec, model: Any) -> None:
    """Raise ValueError for an entry of the batch that the model reads and the data lack."""
    for name in ("image_key", "first_stage_key", "cond_stage_key"):
        keys = getattr(model, name, None) or []
        for key in [keys] if isinstance(keys, str) else keys:
            if key not in spec.shapes:
                has = ", ".join(map(repr, sorted(spec.shapes)))
                near = did_you_mean(key, spec.shapes)
                raise ValueError(
                    f"the training data has no {key!r}{near}, only {has}: change model.params.{name}, or the "
                    "data set"
                )


def check_classes(spec: ItemSpec, model: Any) -> None:
    """Raise ValueError if the data have more classes or labels than a condition stage."""
    counts = {"class": ("n_classes", spec.n_classes), "label_map": ("n_labels", spec.n_labels)}
    stages = getattr(model, "cond_stages", [])
    for number, stage in enumerate(stages):
        name, count = counts.get(stage.kind, ("", None))
        known = getattr(stage, name, None)
        if count is not None and known is not None and count > known:
            place = f"model.params.cond_stage_config{f'.{number}' if len(stages) > 1 else ''}.params.{name}"
            raise ValueError(f"{name} is {known}, but the data have {count}: set {place}={count}")


def size_remedy(error: SizeMismatch, config: DictConfig, model: Any) -> str:
    """Phrase what to set where the images have another size than the model."""
    found, wanted = (str(h) if h == w else f"[{h},{w}]" for h, w in (error.found, error.wanted))
    is_first_stage = isinstance(model, ImageSizes)
    size = found if is_first_stage else wanted
    if "size" in config:
        return f"set size={size}"
    if is_first_stage:
        settings = " and ".join(f"model.params.{name}={found}" for name in model.size_settings)
        return f"set {settings}, or the size of the data to {wanted}"
    return f"set the size of the data to {wanted}, or train a first stage for {found}"


def check_monitors(callbacks: Sequence[Callback], model: pl.LightningModule) -> None:
    """Raise ValueError if a callback waits for a metric that validation does not log.

    Nothing is said of models and callbacks of other packages, which may log what they like.
    """
    known = getattr(model, "validation_metrics", None)
    homes = [part.__module__ for part in (type(model).validation_step, *map(type, callbacks))]
    if known is None or not all(home.startswith(("taming.", "pytorch_lightning.")) for home in homes):
        return
    names = [f"val/{name}" for name in known]
    for callback in callbacks:
        names += getattr(callback, "logged_metrics", lambda _: ())(model)
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in names and not monitor.startswith("train/"):
            near = did_you_mean(monitor, names)
            raise ValueError(
                f"monitor: {monitor} is not a metric of {type(model).__name__}{near}; validation logs "
                f"{', '.join(names)}"
            )
