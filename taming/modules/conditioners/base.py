"""The contract of a condition stage: from a condition to the tokens that a prior reads before the codes.

B batch, C channels, H W pixels, h w grid of tokens, M tokens, L labels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int]  # height, width

# What a first stage's `encode` returns as well: the quantized tensor, its loss, and (_, _, indices).
Encoded = tuple[Tensor, Tensor | None, Any]


class Conditioner:
    """Encodes one condition of an image. A new condition is a subclass of this and `nn.Module`, in one file.

    Nothing asks a condition stage for its class: what commands, page and training need to know is here. The
    defaults describe tokens of an unknown kind, which the data set makes.

    Attributes:
        kind: what users give: "class", "label_map", "image", "coordinates", "tokens" or "none".
        factor: pixels per token along each side where the tokens are a grid of the image, else None.
        remedy: what a user does to give the condition, for error messages.
    """

    kind: str = "tokens"
    factor: Any = None  # int or None
    remedy: str = "`taming sample --data` (scripts/make_samples.py) takes conditions from a data set"

    @property
    def vocab_size(self) -> int | None:
        """Highest token + 1, the vocabulary that the prior must have at least; None if the data decide."""
        return None

    def token_shape(self, height: int, width: int) -> tuple[int, ...] | None:
        """Shape of the tokens of one image of `height` x `width` pixels: (h, w), (M,), or None if unknown."""
        return None if self.factor is None else (height // self.factor, width // self.factor)

    def num_tokens(self, height: int, width: int) -> int | None:
        """Number of tokens of one image of `height` x `width` pixels; None if the data decide."""
        shape = self.token_shape(height, width)
        return None if shape is None else math.prod(shape)

    def encode(self, c: Tensor) -> Encoded:
        """Turn a batch of conditions into (quant, None, (None, None, tokens)).

        The tokens have B times `token_shape` elements, int64.
        """
        raise NotImplementedError

    def tokens(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `encode` quantizes, and the tokens: (B, h, w) where they are a grid, else (B, M)."""
        quant, _, info = self.encode(c)
        return quant, info[2].view(len(c), *(quant.shape[2:] if quant.ndim == 4 else (-1,)))

    def from_tokens(self, tokens: Tensor) -> Tensor | None:
        """Turn tokens back into about what `encode` takes, to show them; None if that is not possible."""
        return None

    def from_batch(self, value: Tensor) -> Tensor:
        """Turn an entry of a batch, on its device, into what `encode` takes."""
        return value

    def validate(self, value: Tensor) -> None:
        """Raise ValueError if an entry of a batch, on the CPU, holds what cannot be encoded.

        Called before the batch goes to the device, where a look at values would make it wait.
        """

    def to_rgb(
        self, x: Tensor, size: Size | None = None, *, names: Sequence[str] = (),
        plot: Callable[[Tensor, Size], Tensor] | None = None,
    ) -> Tensor | None:
        """Show conditions as images (B, 1 or 3, H, W) in [-1, 1]; None if that is not possible.

        Args:
            x: what `encode` takes.
            size: (H, W) of images that have no size of their own.
            names: of classes, by number, if the data set has them.
            plot: draws tokens (B, M) on images of a size, if the data set can.
        """
        return None if plot is None or size is None else plot(x, size)

    def from_user(self, value: Any, size: Size) -> Tensor:
        """Turn what a user gives for one image into what `encode` takes, for a batch of one.

        Args:
            value: by `kind`: a class number; label ids (H, W); an image (C, H, W) in [-1, 1]; tokens (M,).
            size: (H, W) in pixels that the condition must have beside the image.

        Raises:
            ValueError: nothing, or what does not fit; the message says what to give.
        """
        if value is None:
            raise ValueError(self.remedy)
        return torch.as_tensor(value)[None]

    def default(self, size: Size) -> Tensor | None:
        """What an image of that size has without being asked, (1, ...); None where a user must say."""
        return None

    def resize(self, c: Tensor, size: Size) -> Tensor:
        """Bring a batch of conditions to another size (H, W), where they have a size."""
        return c


class AbstractEncoder(Conditioner, nn.Module):
    """A condition stage that is a network of its own; the base class of 2021."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Turn a batch of conditions into (quant, None, (None, None, indices))."""
        raise NotImplementedError


def check_range(values: Tensor, most: int, message: str) -> None:
    """Raise ValueError unless values on the CPU lie in 0..most; `message` has a place for the wrong value.

    Values on an accelerator are not looked at, which would make it wait: batches are checked before they are
    transferred.
    """
    if values.device.type != "cpu" or not values.numel():
        return
    lowest, highest = (bound.item() for bound in values.aminmax())
    if not (lowest >= 0 and highest <= most):
        raise ValueError(message.format(lowest if not lowest >= 0 else highest))


def check_condition_size(found: Sequence[int], wanted: Size, what: str) -> None:
    """Raise ValueError unless a condition (..., H, W) has the size that it must have beside the image."""
    if tuple(found[-2:]) != tuple(wanted):
        raise ValueError(
            f"{what} has {found[-2]}x{found[-1]} pixels (height x width), but must have "
            f"{wanted[0]}x{wanted[1]} beside the image: resize it"
        )
