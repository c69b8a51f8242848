"""What all first stages share: images of a batch, the loss, optimizers, images for the log.

B batch, C channels, H W pixels. Images are in [-1, 1].
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taming.colormap import colorize
from taming.config import get_obj_from_str, instantiate_from_config
from taming.models.base import ImageModel
from taming.models.tokenizer import ImageSizes
from taming.parameters import Probability, accepted_parameters

Betas = tuple[Probability, Probability]


def build_loss(lossconfig: Mapping[str, Any]) -> Any:
    """Build the loss of `{target, params}`; in its params other networks may be named likewise.

    `perceptual_config: {target, params}` is a distance, `disc_config: {target, params}` a discriminator,
    which gets the channels of the images as `input_nc` if it takes them.
    """
    params = lossconfig.get("params") or {}
    named = [key for key in ("perceptual_config", "disc_config") if params.get(key)]
    makers = {key: partial(_build, params[key]) for key in named}
    if not makers:
        return instantiate_from_config(lossconfig)
    rest = {key: value for key, value in params.items() if key not in makers}
    return instantiate_from_config({**lossconfig, "params": rest}, **makers)


def _build(config: Mapping[str, Any], **defaults: Any) -> Any:
    """Build `{target, params}`, with those of the defaults that it accepts and that are not given."""
    accepted = accepted_parameters(get_obj_from_str(config["target"]))[0] if "target" in config else {}
    known = {key: value for key, value in defaults.items() if key in accepted}
    return instantiate_from_config({**config, "params": known | {**(config.get("params") or {})}})


class Autoencoder(ImageSizes, ImageModel):
    """A model that encodes and decodes images; subclasses write out their networks and the training step.

    Attributes:
        image_key: entry of the batch that holds the images.
        betas: Adam's.
        channels: C of the images.
        loss: what the networks are trained against, with its own networks.
    """

    # the convolutions around the codebook belong to what is on their other side
    PARTNERS: ClassVar[dict[str, str]] = {"encoder": "quant_conv", "decoder": "post_quant_conv"}

    channels: int
    loss: Any

    def __init__(
        self, image_key: str, betas: Betas, monitor: str | None = None, scheduler_config: dict | None = None
    ):
        super().__init__(monitor, scheduler_config)
        self.image_key, self.betas = image_key, (betas[0], betas[1])

    def use_loss(self, lossconfig: dict) -> None:
        """Build the loss of `{target, params}`.

        Raises:
            ValueError: a `disc_conditional` loss: there is no condition here.
        """
        self.loss = build_loss(lossconfig)
        if getattr(self.loss, "disc_conditional", False):
            name = type(self).__name__
            raise ValueError(f"lossconfig.params.disc_conditional must be False: {name} has no condition")

    def freeze_parts(self, names: str | Sequence[str]) -> None:
        """Leave parts as they are; see `ImageModel.freeze_parts`. `quant_conv` goes with `encoder`.

        With encoder and codebook frozen, images keep their codes, and only the decoder is tuned.

        Raises:
            ValueError: see `ImageModel.freeze_parts`; or the adaptive weight needs a gradient of a frozen
                layer.
        """
        super().freeze_parts(names)
        last_layer = self.get_last_layer()
        if getattr(self.loss, "disc_adaptive", False) and last_layer is not None \
                and not last_layer.requires_grad:
            raise ValueError(
                "freeze: the adaptive weight of the loss compares gradients at the decoder's last layer, "
                "which is frozen: set model.params.lossconfig.params.disc_adaptive=false"
            )

    def get_last_layer(self) -> Tensor | None:
        """Return the weight at which the adaptive weight compares gradients; None where there is none."""
        return None

    # ---- images

    def get_images(self, batch: dict) -> Tensor:
        """Return the images of a batch, (B, C, H, W).

        Raises:
            ValueError: a size that f does not divide, or another number of channels.
        """
        x = self.get_input(batch, self.image_key)
        self.check_size(*x.shape[2:])
        return x

    def channel_settings(self) -> dict[str, int]:
        """Return the settings that are the number of channels of an image."""
        return {"ddconfig.in_channels": self.channels}

    def check_channels(self, x: Tensor) -> None:
        """Raise ValueError unless images (B, C, H, W) have the channels of the model."""
        if x.shape[1] != self.channels:
            raise ValueError(
                f"{x.shape[1]} channels a pixel (colours, or labels), but the model takes {self.channels}, "
                "its ddconfig.in_channels: give it what it was trained on"
            )

    def check_batch(self, batch: dict) -> None:
        """Raise ValueError if sizes or channels of images, networks and loss do not agree."""
        x = self.get_images(batch)
        self.check_training_size(*x.shape[2:])
        of_loss = {"lossconfig.params.disc_in_channels": getattr(self.loss, "channels", x.shape[1])}
        for key, found in (self.channel_settings() | of_loss).items():
            if found != x.shape[1]:
                raise ValueError(
                    f"the images have {x.shape[1]} channels, but {key} is {found}: set "
                    f"model.params.{key}={x.shape[1]}"
                )
        if (check := getattr(self.loss, "check_discriminator", None)) is not None:
            check(x[:1])

    def own_precision(self, x: Tensor) -> AbstractContextManager:
        """Return a context for encoding: that of autocast in training of the encoder, else float32.

        An image then keeps its codes: bfloat16 would change some percent of them.
        """
        device, trained = x.device.type, self.training and "encoder" not in self.frozen
        return torch.autocast(device, enabled=trained and torch.is_autocast_enabled(device))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode images (B, C, H, W)."""
        return self(x)[0]

    def to_rgb(self, x: Tensor) -> Tensor:
        """Show images of one or three channels as they are, and maps of more in fixed colours."""
        return x if x.shape[1] in (1, 3) else colorize(x)

    @torch.no_grad()
    def log_images(self, batch: dict, **kwargs) -> dict[str, Tensor]:
        """Return what is worth looking at: inputs and their reconstructions, (B, 1 or 3, H, W) in [-1, 1]."""
        x = self.get_images(batch).to(self.device)
        return {"inputs": self.to_rgb(x), "reconstructions": self.to_rgb(self.reconstruct(x))}

    # ---- optimizers

    def configure_optimizers(self) -> Any:
        """Make Adam for the autoencoder and for the discriminator: ([both], []), as in 2021."""
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is None:
            raise ValueError(
                f"the model was built with {type(self.loss).__name__}, which has nothing to train: name a "
                "loss in lossconfig, for instance taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
            )
        networks = [self.generator_parameters(), discriminator.parameters()]
        return [self.adam(parameters) for parameters in networks], []

    def adam(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
        """Make Adam for those of some parameters that are not frozen."""
        trained = [p for p in parameters if p.requires_grad]
        return torch.optim.Adam(
            trained, lr=self.base_learning_rate(), betas=self.betas, fused=self.has_fused_step
        )

    def generator_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of all but the loss."""
        for name, parameter in self.named_parameters():
            if not name.startswith("loss."):
                yield parameter
