"""Small modules that other parts share: ActNorm, and the condition stages that need no network.

B batch, C channels, H W pixels, T tokens.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming.images import text_pictures
from taming.modules.conditioners.base import AbstractEncoder, Encoded, Size, check_range
from taming.modules.distributed import all_reduce_sum
from taming.parameters import PositiveInt

logger = logging.getLogger(__name__)


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Return the number of parameters of `model`, frozen ones included; `verbose` logs it in millions."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total


class ActNorm(nn.Module):
    """A learned scale and shift per channel, initialized so that the first batch gets mean 0 and deviation 1.

    Input (B, C, H, W) or (B, C); output of the same shape. Initialization takes place in training only. Where
    torch.distributed runs, the first batch is that of all ranks together, so that they start alike.
    Source: Kingma and Dhariwal 2018, "Glow", section 3.1.

    Args:
        num_features: channels C.
        logdet: also return log |det dy/dx| per sample (B,), the sum over channels and positions.
        affine: must be True; there for old configs.
        allow_reverse_init: let `reverse` initialize from its own first batch instead of raising.
    """

    initialized: Tensor

    def __init__(
        self, num_features: int, logdet: bool = False, affine: bool = True, allow_reverse_init: bool = False
    ):
        if not affine:
            raise ValueError("ActNorm has no version without scale and shift: affine must be True, got False")
        super().__init__()
        self.logdet = logdet
        self.allow_reverse_init = allow_reverse_init
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._may_start = True  # until the buffer was seen to be 1: reading it makes a GPU wait

    def _must_start(self) -> bool:
        """Whether this is the first training batch."""
        if not (self.training and self._may_start):
            return False
        self._may_start = self.initialized.item() == 0
        return self._may_start

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Set shift and scale from the statistics of `input` (B, C, H, W) or (B, C), over all ranks."""
        per_channel = input.detach().to(self.loc.dtype).transpose(0, 1).flatten(1)  # (C, B*H*W)
        count = all_reduce_sum(per_channel.new_tensor([per_channel.shape[1]], dtype=torch.float64))
        if count.item() < 2:
            raise ValueError(
                f"ActNorm needs two values per channel to start from, got one batch of shape "
                f"{tuple(input.shape)}: use a larger first batch"
            )
        count = count.to(per_channel.dtype)
        # Two passes: the mean of squares minus the squared mean would lose the digits that matter.
        mean = all_reduce_sum(per_channel.sum(1)) / count
        variance = all_reduce_sum((per_channel - mean[:, None]).square().sum(1)) / (count - 1)
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_(1 / (variance.sqrt() + 1e-6).view_as(self.scale))
        self.initialized.fill_(1)

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize `input`; with `logdet` return (output, log-determinant (B,)); with `reverse` undo it."""
        if reverse:
            return self.reverse(input)
        if self._must_start():
            self.initialize(input)
        loc, scale = self._shaped_for(input)
        output = scale * (input + loc)
        if not self.logdet:
            return output
        positions = input[0, 0].numel()  # H * W, or 1 for (B, C)
        logdet = positions * self.scale.abs().log().sum()
        return output, logdet.to(input).expand(input.shape[0])

    def reverse(self, output: Tensor) -> Tensor:
        """Undo `forward`.

        Raises:
            RuntimeError: in training, before the initialization, if `allow_reverse_init` is False.
        """
        if self._must_start():
            if not self.allow_reverse_init:
                raise RuntimeError(
                    "ActNorm is not initialized, and may not be by its reverse direction: run a forward pass "
                    "first, or build it with allow_reverse_init=True"
                )
            self.initialize(output)
        loc, scale = self._shaped_for(output)
        return output / scale - loc

    def _shaped_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim == 2:
            return self.loc[:, :, 0, 0], self.scale[:, :, 0, 0]
        return self.loc, self.scale


class Labelator(AbstractEncoder):
    """The condition of a class-conditional model: the class id is the one condition token."""

    kind = "class"

    def __init__(self, n_classes: PositiveInt, quantize_interface: bool = True):
        super().__init__()
        self.n_classes = n_classes
        self.quantize_interface = quantize_interface

    @property
    def vocab_size(self) -> int:
        """Highest token + 1."""
        return self.n_classes

    @property
    def remedy(self) -> str:  # type: ignore[override]
        """What a user does to give a class."""
        return f"give a class number, 0 to {self.n_classes - 1}"

    def token_shape(self, height: int, width: int) -> tuple[int, ...]:
        """One token, for any image."""
        return (1,)

    def validate(self, value: Tensor) -> None:
        """Raise ValueError for an id outside 0..n_classes-1."""
        check_range(
            value, self.n_classes - 1, f"class id {{}} is outside 0..{self.n_classes - 1}: correct the "
            "labels, or set n_classes in cond_stage_config",
        )

    def encode(self, c: Tensor) -> Encoded | Tensor:  # type: ignore[override]
        """Turn class ids (B,) or (B, 1) into tokens (B, 1), wrapped as a first stage would where asked for.

        Raises:
            ValueError: another shape, or, on the CPU, an id outside 0..n_classes-1.
        """
        if c.ndim not in (1, 2) or (c.ndim == 2 and c.shape[1] != 1):
            raise ValueError(f"class ids must have the shape (B,) or (B, 1), got {tuple(c.shape)}")
        self.validate(c)
        c = c.reshape(-1, 1).long()
        return (c, None, [None, None, c]) if self.quantize_interface else c

    def to_rgb(
        self, x: Tensor, size: Size | None = None, *, names: Sequence[str] = (),
        plot: Callable[[Tensor, Size], Tensor] | None = None,
    ) -> Tensor | None:
        """Write number and name of each class on an image of that size."""
        if size is None:
            return None
        known = len(names) == self.n_classes
        lines = [f"{number} {names[number]}" if known else str(number) for number in x.flatten().tolist()]
        return text_pictures(lines, size)

    def from_user(self, value: Any, size: Size) -> Tensor:
        """Take a class number."""
        if value is None:
            raise ValueError(self.remedy)
        self.validate(number := torch.tensor([int(value)]))
        return number


class SOSProvider(AbstractEncoder):
    """The condition of an unconditional model: the same start-of-sequence token for every image."""

    kind = "none"
    remedy = "the model has no condition: leave it out"

    def __init__(self, sos_token: int, quantize_interface: bool = True):
        super().__init__()
        if sos_token < 0:
            raise ValueError(f"sos_token must be a token id, 0 or more, got {sos_token}")
        self.sos_token = sos_token
        self.quantize_interface = quantize_interface

    @property
    def vocab_size(self) -> int:
        """Highest token + 1."""
        return self.sos_token + 1

    def token_shape(self, height: int, width: int) -> tuple[int, ...]:
        """One token, for any image."""
        return (1,)

    def encode(self, x: Tensor) -> Encoded | Tensor:  # type: ignore[override]
        """Return one start token per sample of `x` (B, ...): (B, 1) long, on the device of `x`."""
        c = torch.full((x.shape[0], 1), self.sos_token, dtype=torch.long, device=x.device)
        return (c, None, [None, None, c]) if self.quantize_interface else c

    def to_rgb(
        self, x: Tensor, size: Size | None = None, *, names: Sequence[str] = (),
        plot: Callable[[Tensor, Size], Tensor] | None = None,
    ) -> None:
        """Return None: there is nothing to show."""

    def default(self, size: Size) -> Tensor:
        """Return what `encode` needs to count the images."""
        return torch.zeros(1, 1)
