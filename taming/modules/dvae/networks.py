"""Encoder and decoder of DALL-E's discrete VAE (Ramesh et al. 2021, appendix A.1), with the released names.

B batch, C channels of a pixel, H W pixels, h w latent grid, K codes, n groups, f = 2^(n - 1) pixels per code.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import Resolution
from taming.parameters import PositiveInt


class Conv2d(nn.Module):
    """A convolution with zero padding that keeps the size, and parameters `w` and `b`.

    Weights begin with the deviation 1 / sqrt(fan in), biases with 0.
    """

    def __init__(self, n_in: int, n_out: int, kernel_size: int):
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.w, std=1 / math.sqrt(n_in * kernel_size**2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """x, or a 1x1 convolution of it where the width changes, plus gain * four narrow convolutions.

    Args:
        n_in, n_out: channels.
        kernel_sizes: of the four convolutions, each after a ReLU.
        gain: 1 / (number of blocks of the network)^2.
    """

    def __init__(self, n_in: int, n_out: int, kernel_sizes: Sequence[int], gain: float):
        super().__init__()
        widths = [n_in, *[n_out // 4] * 3, n_out]
        self.gain = gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel_size in enumerate(kernel_sizes):
            parts[f"relu_{i + 1}"] = nn.ReLU()
            parts[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel_size)
        self.res_path = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, n_in, h, w) to (B, n_out, h, w)."""
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


def _groups(
    widths: Sequence[int], n_blk_per_group: int, kernel_sizes: Sequence[int], resize: nn.Module, name: str
) -> OrderedDict[str, nn.Module]:
    """Return groups of blocks; `widths` are the input's, then each group's. All but the last are resized."""
    count = len(widths) - 1
    gain = 1 / (count * n_blk_per_group) ** 2
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(count):
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for j in range(n_blk_per_group):
            n_in = widths[i] if j == 0 else widths[i + 1]
            blocks[f"block_{j + 1}"] = Block(n_in, widths[i + 1], kernel_sizes, gain)
        if i < count - 1:
            blocks[name] = resize
        groups[f"group_{i + 1}"] = nn.Sequential(blocks)
    return groups


def _output(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, n_out, 1)))


@dataclass(frozen=True)
class Sizes:
    """Sizes of encoder and decoder; the defaults are those of DALL-E.

    Attributes:
        resolution: training size in pixels, a side or [height, width].
        in_channels: C.
        n_hid: channels of the encoder's first group and the decoder's last, a multiple of 4; those of the
            groups at half the resolution are twice as many, and so on.
        n_init: channels of a code.
        n_blk_per_group: blocks of a group.
        n_groups: n.

    Raises:
        ValueError: a width that is not a multiple of 4, or a resolution that f does not divide.
    """

    resolution: Resolution
    in_channels: PositiveInt = 3
    n_hid: PositiveInt = 256
    n_init: PositiveInt = 128
    n_blk_per_group: PositiveInt = 2
    n_groups: PositiveInt = 4

    def __post_init__(self) -> None:
        if self.n_hid % 4:
            raise ValueError(f"ddconfig.n_hid: {self.n_hid} is not a multiple of 4, as blocks need it")
        sides = [self.resolution] if isinstance(self.resolution, int) else list(self.resolution)
        if any(side % self.factor for side in sides):
            raise ValueError(
                f"ddconfig.resolution: {self.resolution} is not a multiple of f = {self.factor}, that of "
                f"{self.n_groups} groups"
            )

    @property
    def factor(self) -> int:
        """Pixels per code along each side, f."""
        return 2 ** (self.n_groups - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of the groups, from the highest resolution to the lowest."""
        return [self.n_hid * 2**i for i in range(self.n_groups)]


class Encoder(nn.Module):
    """Maps images to logits of K = vocab_size codes."""

    def __init__(self, sizes: Sizes, vocab_size: int):
        super().__init__()
        widths = [sizes.n_hid, *sizes.widths]
        self.blocks = nn.Sequential(OrderedDict(
            input=Conv2d(sizes.in_channels, sizes.n_hid, 7),
            **_groups(widths, sizes.n_blk_per_group, (3, 3, 3, 1), nn.MaxPool2d(2), "pool"),
            output=_output(widths[-1], vocab_size),
        ))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W), mapped by `map_pixels`, to logits (B, K, h, w), float32."""
        output: Any
        *features, output = self.blocks
        for part in features:
            x = part(x)
        with torch.autocast(x.device.type, enabled=False):  # thousands of codes: half precision is too coarse
            return output(x.to(output.conv.w.dtype))


class Decoder(nn.Module):
    """Maps K = vocab_size codes to the parameters of the likelihood of each value of a pixel."""

    def __init__(self, sizes: Sizes, vocab_size: int):
        super().__init__()
        widths, resize = [sizes.n_init, *reversed(sizes.widths)], nn.Upsample(scale_factor=2, mode="nearest")
        self.blocks = nn.Sequential(OrderedDict(
            input=Conv2d(vocab_size, sizes.n_init, 1),
            **_groups(widths, sizes.n_blk_per_group, (1, 3, 3, 3), resize, "upsample"),
            output=_output(sizes.n_hid, 2 * sizes.in_channels),
        ))

    def forward(self, z: Tensor) -> Tensor:
        """Map weights of the codes (B, K, h, w) to statistics (B, 2 C, H, W): mu, and then ln b."""
        first: Any = self.blocks[0]
        with torch.autocast(z.device.type, enabled=False):
            latents = first(z.to(first.w.dtype))  # (B, n_init, h, w)
        return self.decode_latents(latents)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Look up codes (B, h, w): (B, n_init, h, w), what `forward` makes of one-hot codes first."""
        first: Any = self.blocks[0]
        return F.embedding(codes, first.w[:, :, 0, 0].t()).movedim(-1, 1) + first.b[:, None, None]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Map latents (B, n_init, h, w) to statistics (B, 2 C, H, W)."""
        x = latents
        for part in self.blocks[1:]:
            x = part(x)
        return x
