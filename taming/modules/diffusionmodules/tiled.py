"""Decode large latents tile by tile, in bounded memory, to the image that the decoder gives at once.

Two parts of a decoder see further than its convolutions. Attention sees all positions: everything up to the
last attention is computed whole, at latent resolution, where it is small. A group normalization takes mean
and variance over the whole map, so tiles normalized one by one would have different colors and show seams.
Here each normalization gets the statistics of the whole map, gathered from all tiles in a pass of its own.
Such a pass computes what comes before it again, unless a map between is small enough to be kept. Tiles
overlap by the reach of their convolutions, so there are no seams: nothing is estimated or blended, and the
result differs from the untiled one by rounding only.

The price is time: half as much again where all maps can be kept, and five times the work at full resolution
where those cannot.

B batch, C channels, H W pixels, h w latent grid, G groups.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from taming.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock, UpLevel, Upsample

GIB = 2**30
ON_CPU = 2 * GIB  # bytes that decoding may take by default
MAPS_AT_ONCE = 6  # of the largest size, while a decoder runs untiled: what a residual block and oneDNN hold


def decode(decoder: Decoder, z: Tensor, memory: int | None = None) -> Tensor:
    """Return decoder(z), computed in tiles where it would take more than `memory` bytes besides the weights.

    The default is 2 GiB on a CPU, and half of the free memory on a GPU. There are no tiles with gradients, in
    training, or for networks other than `Decoder`.
    """
    if torch.is_grad_enabled() or decoder.training or not isinstance(decoder, Decoder):
        return decoder(z)
    if memory is None:
        memory = torch.cuda.mem_get_info(z.device)[0] // 2 if z.is_cuda else ON_CPU
    if MAPS_AT_ONCE * _largest_map(decoder, z) <= memory:
        return decoder(z)
    if len(z) > 1:
        return torch.cat([decode(decoder, image, memory) for image in z.split(1)])
    return decode_tiled(decoder, z, keep=memory // 2)


@torch.no_grad()
def decode_tiled(decoder: Decoder, z: Tensor, *, tile: int = 256, keep: int = GIB) -> Tensor:
    """Decode latents (B, z_channels, h, w) to images (B, out_ch, H, W), as decoder(z) does, in square tiles.

    Args:
        decoder: in eval mode.
        z: latents.
        tile: side of a tile without its overlap, in pixels.
        keep: bytes for the maps that are kept whole: more is faster. Besides them there are the weights, the
            image, some ten maps of one tile, and what comes before the last attention.
    """
    steps = _steps(decoder)
    last = max((i for i, step in enumerate(steps) if isinstance(step.module, AttnBlock)), default=-1)
    x = z
    for step in steps[: last + 1]:
        x = step.module(x)
    waiting: list[_Step] = []
    for step in steps[last + 1 :]:
        waiting.append(step)
        scale = math.prod(step.scale for step in waiting)
        kept = x.nbytes + x[:, :1].nbytes * scale**2 * step.channels
        if step is steps[-1] or kept <= keep:
            x, waiting = _run(waiting, x, tile), []
    return x


@dataclass
class _Step:
    """A part of the decoder, and its effect on a map: factor on H and W, channels, reach in pixels."""

    module: nn.Module
    channels: int
    scale: int = 1
    reach: int = 0  # pixels at each side of a tile whose result depends on pixels outside of it


def _steps(decoder: Decoder) -> list[_Step]:
    """Return the parts of the decoder in the order in which its forward runs them."""
    width = decoder.conv_in.out_channels
    steps = [_Step(decoder.conv_in, width, reach=1)]
    middle = decoder.mid
    parts = [middle.block_1, middle.attn_1, middle.block_2]
    for level in cast(list[UpLevel], [*reversed(decoder.up)]):
        for i, block in enumerate(level.block):
            parts += [block, level.attn[i]] if level.attn else [block]
        parts += [] if level.upsample is None else [level.upsample]
    for part in parts:
        if isinstance(part, ResnetBlock):
            width = part.out_channels
            steps.append(_Step(part, width, reach=2))
        elif isinstance(part, Upsample):
            steps.append(_Step(part, width, scale=2, reach=1))
        else:  # attention, or the identity in its place
            steps.append(_Step(part, width))
    if not decoder.give_pre_end:
        end = nn.Sequential(decoder.norm_out, nn.SiLU(), decoder.conv_out, decoder.to_images)
        steps.append(_Step(end, decoder.conv_out.out_channels, reach=1))
    return steps


def _largest_map(decoder: Decoder, z: Tensor) -> int:
    """Return the bytes of the largest map between two steps."""
    scale, largest = 1, 0
    for step in _steps(decoder):
        scale *= step.scale
        largest = max(largest, z[:, :1].nbytes * scale**2 * step.channels)
    return largest


@dataclass
class _Tile:
    """Place of a tile in the map that it is cut from: its core, and the core with the overlap around it."""

    rows: slice
    columns: slice
    rows_around: slice
    columns_around: slice

    def core(self, x: Tensor) -> Tensor:
        """Return the core of a map (B, C, ...) that was computed from the tile, at any scale."""
        scale = x.shape[-1] // (self.columns_around.stop - self.columns_around.start)
        rows = _scaled(self.rows, scale, self.rows_around.start)
        return x[..., rows, _scaled(self.columns, scale, self.columns_around.start)]


def _scaled(span: slice, scale: int, origin: int = 0) -> slice:
    return slice((span.start - origin) * scale, (span.stop - origin) * scale)


def _tiles(height: int, width: int, side: int, overlap: int) -> Iterator[_Tile]:
    def spans(length: int) -> list[tuple[slice, slice]]:
        cores = [slice(start, min(start + side, length)) for start in range(0, length, side)]
        return [(c, slice(max(c.start - overlap, 0), min(c.stop + overlap, length))) for c in cores]

    for rows, rows_around in spans(height):
        for columns, columns_around in spans(width):
            yield _Tile(rows, columns, rows_around, columns_around)


def _run(steps: list[_Step], x: Tensor, side: int) -> Tensor:
    """Run steps over a map (B, C, H, W) in tiles of `side` pixels of the result; only that is kept whole."""
    norms: list[_SharedNorm] = []
    modules = [_with_shared_norms(step.module, norms) for step in steps]
    scale, overlap = 1, 0.0
    for step in steps:
        scale *= step.scale
        overlap += step.reach / scale
    height, width = x.shape[-2:]
    tiles = list(_tiles(height, width, max(1, side // scale), math.ceil(overlap)))

    def through(tile: _Tile) -> Tensor:
        y = x[..., tile.rows_around, tile.columns_around]
        for norm in norms:
            norm.tile = tile
        for module in modules:
            y = module(y)
        return tile.core(y)

    for norm in norms:  # in the order in which they run
        for tile in tiles:
            with suppress(_Measured):
                through(tile)
        norm.finish()
    first = through(tiles[0])  # shows type and channels
    result = first.new_empty(*first.shape[:2], height * scale, width * scale)
    for tile in tiles:
        y = first if tile is tiles[0] else through(tile)
        result[..., _scaled(tile.rows, scale), _scaled(tile.columns, scale)] = y
    return result


class _Measured(Exception):
    """Raised where a tile reaches a normalization whose statistics are not complete: it was counted there."""


class _SharedNorm(nn.Module):
    """A group normalization that all tiles of a map share: it gathers its statistics first, then it runs."""

    tile: _Tile  # the one that comes next

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm, self.count, self.finished = norm, 0, False
        # (B, G), float64: the mean, and the sum of squared distances from it
        self.mean = self.squares = torch.zeros((), dtype=torch.float64, device=norm.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a tile (B, C, ...), or count its core and raise `_Measured`."""
        if not self.finished:
            self.add(self.tile.core(x))
            raise _Measured
        return torch.addcmul(self.shift, x, self.scale).to(x.dtype)

    def add(self, x: Tensor) -> None:
        """Count the values of a core by the update of Chan et al. 1979, which loses no digits."""
        groups = x.unflatten(1, (self.norm.num_groups, -1)).float()  # (B, G, C / G, H, W)
        count = groups[0, 0].numel()
        variance, mean = (part.double() for part in torch.var_mean(groups, dim=(2, 3, 4), correction=0))
        total, distance = self.count + count, mean - self.mean
        self.mean = self.mean + distance * count / total
        self.squares = self.squares + variance * count + distance**2 * self.count * count / total
        self.count = total

    def finish(self) -> None:
        """Turn the counts into the statistics of the whole map."""
        norm, channels = self.norm, self.norm.num_channels // self.norm.num_groups
        deviation = (self.squares / self.count + norm.eps).sqrt()
        scale = norm.weight / deviation.repeat_interleave(channels, 1)  # (B, C)
        shift = norm.bias - self.mean.repeat_interleave(channels, 1) * scale
        self.scale, self.shift = (part.float()[..., None, None] for part in (scale, shift))
        self.finished = True


def _with_shared_norms(module: nn.Module, norms: list[_SharedNorm]) -> nn.Module:
    """Copy a module with its group normalizations shared and listed; all else belongs to the original."""
    if isinstance(module, nn.GroupNorm):
        norms.append(_SharedNorm(module))
        return norms[-1]
    twin = copy.copy(module)
    twin._modules = {
        name: child and _with_shared_norms(child, norms) for name, child in module._modules.items()
    }
    return twin
