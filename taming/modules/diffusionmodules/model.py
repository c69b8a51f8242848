"""Convolutional encoder and decoder of the VQGAN, and the other networks that 2021's code had in this file.

The halves of the U-Net of Ho et al. 2020, as Esser et al. 2021 (appendix B) use them. The folder's name is
historic: only `Model` belongs to diffusion. Attribute names are the keys of published checkpoints.

B batch, C channels, H W pixels, h w latent grid, f = 2 ** (len(ch_mult) - 1) = H / h.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.group_norm import GroupNorm
from taming.modules.pixel_range import UNIT, PixelRange, from_images, to_images
from taming.parameters import Length, NonNegativeInt, PositiveInt, Probability

logger = logging.getLogger(__name__)

Resolution = PositiveInt | Annotated[Sequence[PositiveInt], Length(2)]  # pixels: a side, or [height, width]
Multiples = Annotated[Sequence[PositiveInt], Length(1)]


def get_timestep_embedding(timesteps: Tensor, embedding_dim: int) -> Tensor:
    """Return sines and cosines of time steps (B,) as (B, embedding_dim), float32.

    Source: Vaswani et al. 2017, "Attention is all you need", section 3.5.
    """
    half = embedding_dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    exponents = steps * -(math.log(10000) / (half - 1))
    angles = timesteps.float()[:, None] * torch.exp(exponents)  # (B, half)
    embedding = torch.cat((angles.sin(), angles.cos()), dim=1)
    return F.pad(embedding, (0, embedding_dim % 2))


def nonlinearity(x: Tensor) -> Tensor:
    """Swish, x * sigmoid(x) (Ramachandran et al. 2017)."""
    return F.silu(x)


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Return a group normalization with the eps that published checkpoints were trained with."""
    if in_channels % num_groups:
        raise ValueError(
            f"{in_channels} channels cannot be normalized in {num_groups} groups: "
            f"make ch * ch_mult a multiple of {num_groups}"
        )
    return GroupNorm(num_groups, in_channels, eps=1e-6)


class Upsample(nn.Module):
    """Double H and W by nearest neighbor, then smooth with a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Downsample(nn.Module):
    """Halve H and W, rounding down: a strided 3x3 convolution if `with_conv`, else average pooling."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_conv:
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as the weights were trained
        return F.avg_pool2d(x, kernel_size=2)


class ResnetBlock(nn.Module):
    """Two normalized 3x3 convolutions around a skip connection.

    Args:
        in_channels, out_channels: channels in and out; as many out as in when None.
        conv_shortcut: change the channels of the skip connection by a 3x3 convolution instead of 1x1.
        dropout: rate before the second convolution.
        temb_channels: channels of the time embedding, 0 for none; 512 is the default of 2021.
        num_groups: groups of the normalization.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int | None = None, conv_shortcut: bool = False,
        dropout: float = 0.0, temb_channels: int = 512, num_groups: int = 32,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, conv_shortcut
        self.norm1 = Normalize(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map x (B, in_channels, H, W), and a time embedding (B, temb_channels) if there is one."""
        h = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map (B, C, h, w), with a skip connection."""

    def __init__(self, in_channels: int, num_groups: int = 32):
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels, num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(self.norm(x))

    def attend(self, h: Tensor) -> Tensor:
        """Return what attention adds to a feature map, of its normalized values h (B, C, h, w)."""
        height = h.shape[2]
        q, k, v = (rearrange(part(h), "b c h w -> b 1 (h w) c") for part in (self.q, self.k, self.v))
        # strided ones miss torch's fused kernel on a CPU, and the (h*w)**2 scores are kept
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, C), scaled by C ** -0.5
        return self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=height))


# ---- what encoders, decoders and U-Nets are built from


@dataclass(frozen=True)
class _Blocks:
    """Builds the residual and attention blocks of one network, which share these settings."""

    dropout: float
    num_groups: int = 32
    attn_type: str = "vanilla"
    temb_channels: int = 0

    def residual(self, in_channels: int, out_channels: int) -> ResnetBlock:
        return ResnetBlock(
            in_channels=in_channels, out_channels=out_channels, dropout=self.dropout,
            temb_channels=self.temb_channels, num_groups=self.num_groups,
        )

    def attention(self, channels: int) -> nn.Module:
        """Return self-attention, or nothing in its place where `attn_type` is "none"."""
        if self.attn_type not in ("vanilla", "none"):
            raise ValueError(f'ddconfig.attn_type: {self.attn_type!r} is unknown; choose "vanilla" or "none"')
        return AttnBlock(channels, self.num_groups) if self.attn_type == "vanilla" else nn.Identity()


class _Level(nn.Module):
    """One resolution: residual blocks channels[0] -> channels[1] -> ..., each with attention if asked.

    Args:
        joined: channels that each block takes besides, from the other side of a U-Net; none when None.
    """

    def __init__(
        self, blocks: _Blocks, channels: Sequence[int], attend: bool, joined: Sequence[int] | None = None
    ):
        super().__init__()
        ins = channels[:-1] if joined is None else [a + b for a, b in zip(channels, joined, strict=False)]
        self.block = nn.ModuleList(blocks.residual(a, b) for a, b in zip(ins, channels[1:], strict=True))
        self.attn = nn.ModuleList(blocks.attention(c) for c in channels[1:] if attend)

    def run_block(self, i: int, h: Tensor, temb: Tensor | None = None) -> Tensor:
        """Run block i and the attention after it."""
        h = self.block[i](h, temb)
        return self.attn[i](h) if self.attn else h


class DownLevel(_Level):
    """A level of the way down; all but the lowest halve H and W at their end.

    The list `kept` gets the results that a U-Net joins on its way up.
    """

    downsample: Downsample | None

    def forward(self, h: Tensor, temb: Tensor | None = None, kept: list[Tensor] | None = None) -> Tensor:
        for i in range(len(self.block)):
            h = self.run_block(i, h, temb)
            if kept is not None:
                kept.append(h)
        if self.downsample is None:
            return h
        h = self.downsample(h)
        if kept is not None:
            kept.append(h)
        return h


class UpLevel(_Level):
    """A level of the way up; all but the last double H and W at their end.

    Each block also takes the last entry of the list `kept`, which goes.
    """

    upsample: Upsample | None

    def forward(self, h: Tensor, temb: Tensor | None = None, kept: list[Tensor] | None = None) -> Tensor:
        for i in range(len(self.block)):
            h = self.run_block(i, h if kept is None else torch.cat((h, kept.pop()), dim=1), temb)
        return h if self.upsample is None else self.upsample(h)


class _Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, blocks: _Blocks, in_channels: int, channels: int):
        super().__init__()
        self.block_1 = blocks.residual(in_channels, channels)
        self.attn_1 = blocks.attention(channels)
        self.block_2 = blocks.residual(channels, channels)

    def forward(self, h: Tensor, temb: Tensor | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, temb)), temb)


@dataclass(frozen=True)
class _Shape:
    """Channels and attention of each resolution, the same for all networks here; see `Encoder`."""

    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    resolution: int | Sequence[int]
    attn_resolutions: Iterable[int]
    resamp_with_conv: bool
    ch_in: int | None = None

    @property
    def widths(self) -> list[int]:
        """Channels from full to lowest resolution."""
        return [self.ch * mult for mult in self.ch_mult]

    @property
    def side(self) -> int:
        """The resolution, or the shorter side of it."""
        return self.resolution if isinstance(self.resolution, int) else min(self.resolution)

    def attends(self, i: int) -> bool:
        return self.side // 2**i in self.attn_resolutions

    def down(self, blocks: _Blocks) -> nn.ModuleList:
        """Return the levels from `ch_in` channels at full resolution, `ch` by default, to the lowest."""
        levels, befores = [], [self.ch_in or self.ch, *self.widths]
        for i, (before, width) in enumerate(zip(befores, self.widths, strict=False)):
            level = DownLevel(blocks, [before] + [width] * self.num_res_blocks, self.attends(i))
            last = i == len(self.widths) - 1
            level.downsample = None if last else Downsample(width, self.resamp_with_conv)
            levels.append(level)
        return nn.ModuleList(levels)

    def up(self, blocks: _Blocks, joins: bool = False) -> nn.ModuleList:
        """Return the levels from the lowest resolution to the full one, which is the first of the list.

        With `joins`, each block also takes the result of a block or change of resolution on the way down.
        """
        levels: list[UpLevel] = []
        before = self.widths[-1]
        for i, width in reversed([*enumerate(self.widths)]):
            joined = [width] * self.num_res_blocks + [[self.ch, *self.widths][i]]
            channels = [before] + [width] * (self.num_res_blocks + 1)
            level = UpLevel(blocks, channels, self.attends(i), joined if joins else None)
            level.upsample = Upsample(width, self.resamp_with_conv) if i else None
            levels.insert(0, level)
            before = width
        return nn.ModuleList(levels)


@cache
def _warn_of_ignored(names: tuple[str, ...]) -> None:
    """Warn once of arguments that encoder and decoder do not have, such as those of other code bases."""
    logger.warning("ignored in ddconfig: %s; Encoder and Decoder have no such arguments", ", ".join(names))


class Encoder(nn.Module):
    """Map images (B, in_channels, H, W) to latents (B, z_channels, H / f, W / f), sizes rounded down.

    Args:
        ch: channels at full resolution, a multiple of `num_groups`.
        out_ch: channels of the decoded image (the decoder's; taken so that both halves share one `ddconfig`).
        ch_mult: multiple of `ch` at each resolution; each but the last halves H and W.
        num_res_blocks: residual blocks per resolution.
        attn_resolutions: resolutions, counted in pixels from `resolution` down, that get attention.
        dropout: rate inside the residual blocks.
        resamp_with_conv: halve by a strided convolution, not by average pooling.
        in_channels: channels of the images.
        resolution: the training size in pixels, a side or [height, width]; it only places the attention, by
            the shorter side.
        z_channels: channels of the latents.
        double_z: twice `z_channels`, the mean and log-variance of a KL autoencoder; a VQGAN has it off.
        num_groups: groups of the normalization, 32 in the paper. A group should hold several channels: alone
            in it, a channel loses its mean, and with it the image's color. Small networks want 8.
        attn_type: "vanilla", or "none" to leave out all attention, that of the lowest resolution too, as
            latent diffusion's vq-f4-noattn does.
        pixel_range: lowest and highest value of a pixel inside the network; images are in [-1, 1] outside.
        ch_in: channels of the first convolution; `ch` when None.
        ignored: further arguments have no effect, as in 2021; a warning names them.
    """

    def __init__(
        self, *, ch: PositiveInt, out_ch: PositiveInt, ch_mult: Multiples = (1, 2, 4, 8),
        num_res_blocks: NonNegativeInt, attn_resolutions: Iterable[int], dropout: Probability = 0.0,
        resamp_with_conv: bool = True, in_channels: PositiveInt, resolution: Resolution,
        z_channels: PositiveInt, double_z: bool = True, num_groups: PositiveInt = 32,
        attn_type: str = "vanilla", pixel_range: PixelRange = UNIT, ch_in: PositiveInt | None = None,
        **ignored: Any,
    ):
        super().__init__()
        if ignored:
            _warn_of_ignored(tuple(ignored))
        self.ch, self.temb_ch, self.num_resolutions, self.num_res_blocks = ch, 0, len(ch_mult), num_res_blocks
        self.resolution, self.in_channels, self.z_channels = resolution, in_channels, z_channels
        self.pixel_range, self.from_images = (pixel_range[0], pixel_range[1]), from_images(pixel_range)
        blocks = _Blocks(dropout, num_groups, attn_type)
        shape = _Shape(ch, ch_mult, num_res_blocks, resolution, attn_resolutions, resamp_with_conv, ch_in)
        width = shape.widths[-1]
        self.conv_in = nn.Conv2d(in_channels, ch_in or ch, kernel_size=3, padding=1)
        self.down = shape.down(blocks)
        self.mid = _Middle(blocks, width, width)
        self.norm_out = Normalize(width, num_groups)
        out_channels = 2 * z_channels if double_z else z_channels
        self.conv_out = nn.Conv2d(width, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(self.from_images(x))  # (B, ch, H, W)
        for level in self.down:
            h = level(h)  # (B, ch * ch_mult[i], H / 2**(i+1), W / 2**(i+1))
        h = self.mid(h)  # (B, ch * ch_mult[-1], h, w)
        return self.conv_out(nonlinearity(self.norm_out(h)))  # (B, z_channels, h, w)

    @property
    def factor(self) -> int:
        """Pixels of each side that make one latent position: f."""
        return 2 ** (self.num_resolutions - 1)


class Decoder(nn.Module):
    """Map latents (B, z_channels, h, w) to images (B, out_ch, h*f, w*f); arguments as for `Encoder`.

    `in_channels`, `ch_in` and `double_z` are the encoder's, taken so that both halves share one `ddconfig`.
    With `give_pre_end` the features before the last normalization are returned.
    """

    def __init__(
        self, *, ch: PositiveInt, out_ch: PositiveInt, ch_mult: Multiples = (1, 2, 4, 8),
        num_res_blocks: NonNegativeInt, attn_resolutions: Iterable[int], dropout: Probability = 0.0,
        resamp_with_conv: bool = True, in_channels: PositiveInt, resolution: Resolution,
        z_channels: PositiveInt, give_pre_end: bool = False, double_z: bool = True,
        num_groups: PositiveInt = 32, attn_type: str = "vanilla", pixel_range: PixelRange = UNIT,
        ch_in: PositiveInt | None = None, **ignored: Any,
    ):
        super().__init__()
        if ignored:
            _warn_of_ignored(tuple(ignored))
        self.ch, self.temb_ch, self.num_resolutions, self.num_res_blocks = ch, 0, len(ch_mult), num_res_blocks
        self.resolution, self.in_channels, self.give_pre_end = resolution, in_channels, give_pre_end
        self.to_images = to_images(pixel_range)
        blocks = _Blocks(dropout, num_groups, attn_type)
        shape = _Shape(ch, ch_mult, num_res_blocks, resolution, attn_resolutions, resamp_with_conv)
        width, sides = shape.widths[-1], [resolution] * 2 if isinstance(resolution, int) else resolution
        self.z_shape = (1, z_channels, *(side // 2 ** (len(ch_mult) - 1) for side in sides))
        self.conv_in = nn.Conv2d(z_channels, width, kernel_size=3, padding=1)
        self.mid = _Middle(blocks, width, width)
        self.up = shape.up(blocks)
        self.norm_out = Normalize(shape.widths[0], num_groups)
        self.conv_out = nn.Conv2d(shape.widths[0], out_ch, kernel_size=3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        self.last_z_shape = z.shape
        h = self.mid(self.conv_in(z))  # (B, ch * ch_mult[-1], h, w)
        for level in reversed(self.up):
            h = level(h)  # (B, ch * ch_mult[i], H / 2**(i-1), W / 2**(i-1))
        if self.give_pre_end:
            return h  # (B, ch * ch_mult[0], H, W)
        return self.to_images(self.conv_out(nonlinearity(self.norm_out(h))))  # (B, out_ch, H, W)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight compares gradients."""
        return self.conv_out.weight

    @property
    def out_ch(self) -> int:
        """Channels of the images."""
        return self.conv_out.out_channels


# ---- U-Nets and small decoders: no model here uses them, code that builds on 2021's does


class _TimeEmbedding(nn.Module):
    """Two layers between the sines of a time step (B, ch) and what the blocks take, (B, temb_ch)."""

    def __init__(self, ch: int, temb_ch: int):
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(ch, temb_ch), nn.Linear(temb_ch, temb_ch)])

    def forward(self, x: Tensor) -> Tensor:
        return self.dense[1](nonlinearity(self.dense[0](x)))


class Model(nn.Module):
    """The U-Net of a diffusion model; arguments as for `Encoder`.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B.

    Args:
        use_timestep: condition on a time step.
    """

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int,
        attn_resolutions: Iterable[int], dropout: float = 0.0, resamp_with_conv: bool = True,
        in_channels: int, resolution: int, use_timestep: bool = True,
    ):
        super().__init__()
        self.ch, self.temb_ch, self.num_resolutions = ch, 4 * ch, len(ch_mult)
        self.num_res_blocks, self.resolution, self.in_channels = num_res_blocks, resolution, in_channels
        self.use_timestep = use_timestep
        if use_timestep:
            self.temb = _TimeEmbedding(ch, self.temb_ch)
        blocks = _Blocks(dropout, temb_channels=self.temb_ch)
        shape = _Shape(ch, ch_mult, num_res_blocks, resolution, attn_resolutions, resamp_with_conv)
        width = shape.widths[-1]
        self.conv_in = nn.Conv2d(in_channels, ch, kernel_size=3, padding=1)
        self.down = shape.down(blocks)
        self.mid = _Middle(blocks, width, width)
        self.up = shape.up(blocks, joins=True)
        self.norm_out = Normalize(shape.widths[0])
        self.conv_out = nn.Conv2d(shape.widths[0], out_ch, kernel_size=3, padding=1)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Map images (B, in_channels, H, W) and time steps (B,) to (B, out_ch, H, W)."""
        temb = None
        if self.use_timestep:
            if t is None:
                raise ValueError("a Model with use_timestep takes time steps: give t")
            temb = self.temb(get_timestep_embedding(t, self.ch))  # (B, 4 * ch)
        return self._run(x, temb)

    def _run(self, x: Tensor, temb: Tensor | None, *latents: Tensor) -> Tensor:
        h = self.conv_in(x)
        kept = [h]
        for level in self.down:
            h = level(h, temb, kept)
        h = self.mid(torch.cat((h, *latents), dim=1), temb)
        for level in reversed(self.up):
            h = level(h, temb, kept)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class VUNet(Model):
    """A U-Net over a condition, which takes a latent at its lowest level; arguments as for `Encoder`.

    Source: Esser et al. 2018, "A Variational U-Net for Conditional Appearance and Shape Generation".

    Args:
        c_channels: channels of the condition.
        z_channels: channels of the latent.
        in_channels, use_timestep, ignored: without effect.
    """

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: Sequence[int] = (1, 2, 4, 8), num_res_blocks: int,
        attn_resolutions: Iterable[int], dropout: float = 0.0, resamp_with_conv: bool = True,
        in_channels: int, c_channels: int, resolution: int, z_channels: int, use_timestep: bool = False,
        **ignored: Any,
    ):
        super().__init__(
            ch=ch, out_ch=out_ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions, dropout=dropout, resamp_with_conv=resamp_with_conv,
            in_channels=c_channels, resolution=resolution, use_timestep=False,
        )
        width = ch * ch_mult[-1]
        self.z_in = nn.Conv2d(z_channels, width, kernel_size=1)
        self.mid = _Middle(_Blocks(dropout, temb_channels=self.temb_ch), 2 * width, width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        """Map a condition (B, c_channels, H, W) and a latent (B, z_channels, h, w) to (B, out_ch, H, W)."""
        return self._run(x, None, self.z_in(z))


class SimpleDecoder(nn.Module):
    """Map features (B, in_channels, h, w) to (B, out_channels, 2h, 2w); further arguments have no effect."""

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any):
        super().__init__()
        blocks, c = _Blocks(dropout=0.0), in_channels
        self.model = nn.ModuleList([
            nn.Conv2d(c, c, kernel_size=1),
            blocks.residual(c, 2 * c), blocks.residual(2 * c, 4 * c), blocks.residual(4 * c, 2 * c),
            nn.Conv2d(2 * c, c, kernel_size=1),
            Upsample(c, with_conv=True),
        ])
        self.norm_out = Normalize(c)
        self.conv_out = nn.Conv2d(c, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x)
        return self.conv_out(nonlinearity(self.norm_out(x)))


class UpsampleDecoder(nn.Module):
    """Map features (B, in_channels, h, w) to (B, out_channels, h * 2**n, w * 2**n), n = len(ch_mult) - 1.

    The other arguments are those of `Encoder`; `resolution` has no effect.
    """

    def __init__(
        self, in_channels: int, out_channels: int, ch: int, num_res_blocks: int, resolution: int,
        ch_mult: Sequence[int] = (2, 2), dropout: float = 0.0,
    ):
        super().__init__()
        self.temb_ch, self.num_resolutions, self.num_res_blocks = 0, len(ch_mult), num_res_blocks
        blocks, width = _Blocks(dropout), in_channels
        self.res_blocks, self.upsample_blocks = nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(ch_mult):
            inputs = [width] + [ch * mult] * num_res_blocks
            self.res_blocks.append(nn.Sequential(*[blocks.residual(a, ch * mult) for a in inputs]))
            width = ch * mult
            if i < len(ch_mult) - 1:
                self.upsample_blocks.append(Upsample(width, with_conv=True))
        self.norm_out = Normalize(width)
        self.conv_out = nn.Conv2d(width, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for i, level in enumerate(self.res_blocks):
            x = level(x)
            if i < len(self.upsample_blocks):
                x = self.upsample_blocks[i](x)
        return self.conv_out(nonlinearity(self.norm_out(x)))
