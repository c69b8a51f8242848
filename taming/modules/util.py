"""Small modules that other parts share: ActNorm, and the condition stages that need no network.

B batch, C channels, H W pixels, T tokens.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# What a first stage's `encode` returns too: the quantized tensor, its loss, and (_, _, indices).
Encoded = tuple[Tensor, None, list[Tensor | None]]


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

    @torch.no_grad()
    def initialize(self, input: Tensor) -> None:
        """Set shift and scale from the statistics of `input` (B, C, H, W) or (B, C), over all ranks."""
        per_channel = input.detach().to(self.loc.dtype).transpose(0, 1).flatten(1)  # (C, B*H*W)
        count = _sum_over_ranks(per_channel.new_tensor([per_channel.shape[1]], dtype=torch.float64))
        if count.item() < 2:
            raise ValueError(
                f"ActNorm needs two values per channel to start from, got one batch of shape "
                f"{tuple(input.shape)}: use a larger first batch"
            )
        count = count.to(per_channel.dtype)
        # Two passes: the mean of squares minus the squared mean would lose the digits that matter.
        mean = _sum_over_ranks(per_channel.sum(1)) / count
        variance = _sum_over_ranks((per_channel - mean[:, None]).square().sum(1)) / (count - 1)
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_(1 / (variance.sqrt() + 1e-6).view_as(self.scale))
        self.initialized.fill_(1)

    def forward(self, input: Tensor, reverse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize `input`; with `logdet` return (output, log-determinant (B,)); with `reverse` undo it."""
        if reverse:
            return self.reverse(input)
        if self.training and self.initialized.item() == 0:
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
        if self.training and self.initialized.item() == 0:
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


def _sum_over_ranks(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


class AbstractEncoder(nn.Module):
    """What stage 2 asks of a condition stage: `encode`, and two numbers that it checks when it is built."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Turn a batch of conditions into (quant, None, (None, None, indices))."""
        raise NotImplementedError

    def token_count(self, height: int, width: int) -> int:
        """Say how many condition tokens an image of `height` x `width` pixels gets."""
        raise NotImplementedError

    @property
    def n_tokens(self) -> int:
        """Highest token id + 1: the vocabulary that the transformer must have at least."""
        raise NotImplementedError


class Labelator(AbstractEncoder):
    """The condition of a class-conditional model: the class id is the one condition token."""

    def __init__(self, n_classes: int, quantize_interface: bool = True):
        super().__init__()
        self.n_classes = n_classes
        self.quantize_interface = quantize_interface

    @property
    def n_tokens(self) -> int:
        """Highest token id + 1."""
        return self.n_classes

    def token_count(self, height: int, width: int) -> int:
        """One token whatever the image."""
        return 1

    def encode(self, c: Tensor) -> Encoded | Tensor:
        """Turn class ids (B,) or (B, 1) into tokens (B, 1), wrapped as a first stage would where asked for.

        Raises:
            ValueError: another shape, or an id outside 0..n_classes-1.
        """
        if c.ndim not in (1, 2) or (c.ndim == 2 and c.shape[1] != 1):
            raise ValueError(f"class ids must have the shape (B,) or (B, 1), got {tuple(c.shape)}")
        c = c.reshape(-1, 1).long()
        if c.numel():
            lowest, highest = torch.stack(c.aminmax()).tolist()  # one transfer from the device, not two
            if lowest < 0 or highest >= self.n_classes:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(
                    f"class id {wrong} is outside 0..{self.n_classes - 1}: correct the labels, or set "
                    "n_classes in cond_stage_config"
                )
        return (c, None, [None, None, c]) if self.quantize_interface else c


class SOSProvider(AbstractEncoder):
    """The condition of an unconditional model: the same start-of-sequence token for every image."""

    def __init__(self, sos_token: int, quantize_interface: bool = True):
        super().__init__()
        if sos_token < 0:
            raise ValueError(f"sos_token must be a token id, 0 or more, got {sos_token}")
        self.sos_token = sos_token
        self.quantize_interface = quantize_interface

    @property
    def n_tokens(self) -> int:
        """Highest token id + 1."""
        return self.sos_token + 1

    def token_count(self, height: int, width: int) -> int:
        """One token whatever the image."""
        return 1

    def encode(self, x: Tensor) -> Encoded | Tensor:
        """Give one start token per sample of `x` (B, ...): (B, 1) long, on the device of `x`."""
        c = torch.full((x.shape[0], 1), self.sos_token, dtype=torch.long, device=x.device)
        return (c, None, [None, None, c]) if self.quantize_interface else c
