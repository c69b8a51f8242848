"""PixelSNAIL over the codes of an image: causal gated convolutions and attention (Chen et al. 2017).

The network is that of VQ-VAE-2 (Razavi et al. 2019), with the parameter names of its public implementation by
rosinality. B batch, H W grid of codes, N = H*W codes in raster order, K vocabulary, M condition tokens,
C = channel, D = cond_res_channel, n heads, d channels of a head, k = kernel_size; R rows and Q columns that
are computed: all at first, one position at a time in sampling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.priors.base import AutoregressivePrior
from taming.modules.transformer.positions import Part, part_length
from taming.parameters import NonNegativeInt, PositiveInt, Probability, Range

Area = tuple[slice, slice]  # rows and columns of the grid


@dataclass
class GridCache:
    """What sampling keeps: inputs of causal convolutions, keys and values, features of the condition.

    All that was computed for the first positions holds until `length` is set to 0. The weights are those of
    the moment in which the cache was made.
    """

    codes: Tensor  # (B, k // 2 + H, k // 2 + W + k // 2), padded
    maps: dict[nn.Module, Tensor]
    length: int = 0  # tokens read: condition and codes
    area: Area = (slice(0), slice(0))  # positions that are computed now
    position: int = 0  # the first of them, in raster order
    condition: Tensor | None = None  # (B, D, H, W), or (B, D, 1, 1)
    weights: dict[nn.Module, Tensor] = field(default_factory=dict)


class NormedWeight(nn.Module):
    """A weight g * v / |v|, with the norm over all axes but the first (Salimans and Kingma 2016), and a bias.

    Args:
        shape: (out, in, ...).
        bias: whether there is one.
        mask: 0 at the taps that stay 0; broadcasts over the shape.
    """

    mask: Tensor | None

    def __init__(self, *shape: int, bias: bool = True, mask: Tensor | None = None):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(shape))
        self.weight_g = nn.Parameter(torch.empty(shape[0], *[1] * (len(shape) - 1)))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.register_buffer("mask", mask, persistent=False)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as torch's convolutions
        with torch.no_grad():  # the taps that are left get the variance of all
            self.weight_g.copy_(self._norm(self.weight_v))

    def forward(self, cache: GridCache | None = None) -> Tensor:
        """Return the weight; a cache keeps it."""
        if cache is not None and self in cache.weights:
            return cache.weights[self]
        v = self.weight_v if self.mask is None else self.weight_v * self.mask
        weight = v * (self.weight_g / self._norm(v)).to(v.dtype)
        if cache is not None:
            cache.weights[self] = weight
        return weight

    def _norm(self, v: Tensor) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)  # of bfloat16 weights, too
        return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True, dtype=wide)


class WNConv2d(nn.Module):
    """A convolution with a normed weight and zero padding that keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, bias: bool = True):
        super().__init__()
        self.conv = NormedWeight(out_channels, in_channels, kernel_size, kernel_size, bias=bias)

    def forward(self, x: Tensor, cache: GridCache | None = None) -> Tensor:
        """Map x (B, in, R, Q) to (B, out, R, Q)."""
        weight = self.conv(cache)
        return F.conv2d(x, weight, self.conv.bias, padding=weight.shape[-1] // 2)


class _Holder(nn.Module):
    """Stands between a module and its weight, where the public implementation has one level more."""

    conv: Any

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv


class CausalConv2d(nn.Module):
    """A k x k convolution that sees k - 1 rows above its position, and the row itself to the left of it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        mask = torch.ones(kernel_size, kernel_size)
        mask[-1, kernel_size // 2 :] = 0
        self.conv = _Holder(NormedWeight(out_channels, in_channels, kernel_size, kernel_size, mask=mask))
        self.kernel_size = kernel_size

    def room(self, batch_size: int, height: int, width: int, like: Tensor) -> Tensor:
        """Return room for inputs, (B, in, above + H, side + W + side), zeros outside of the grid."""
        above, side, channels = self.kernel_size - 1, self.kernel_size // 2, self.conv.conv.weight_v.shape[1]
        return like.new_zeros(batch_size, channels, above + height, side + width + side)

    def forward(self, x: Tensor, cache: GridCache | None = None) -> Tensor:
        """Map x (B, in, R, Q), from the first row on or those of the cache's area, to (B, out, R, Q)."""
        weight, bias = self.conv.conv(cache), self.conv.conv.bias
        above, side = self.kernel_size - 1, self.kernel_size // 2
        if cache is None:
            return F.conv2d(F.pad(x, (side, side, above, 0)), weight, bias)
        rows, columns = cache.area
        inputs = cache.maps[self]  # (B, in, above + H, side + W + side)
        inputs[..., above + rows.start : above + rows.stop, side + columns.start : side + columns.stop] = x
        seen = inputs[..., rows.start : rows.stop + above, columns.start : columns.stop + 2 * side]
        if x.shape[-2:] == (1, 1):  # a matrix product, which is faster than a convolution
            return F.linear(seen.flatten(1), weight.flatten(1), bias)[..., None, None]
        return F.conv2d(seen, weight, bias)


class GatedResBlock(nn.Module):
    """x + a * sigmoid(b), where (a, b) come of two convolutions of x, an auxiliary input and the condition.

    Args:
        in_channels, channels: of x, and between the two convolutions.
        kernel_size, causal: of the convolutions.
        dropout: rate between them.
        aux_channels, cond_channels: of the auxiliary input and of the condition; 0 for none.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int = 1, *, causal: bool = False,
        dropout: float = 0.1, aux_channels: int = 0, cond_channels: int = 0,
    ):
        super().__init__()
        conv = CausalConv2d if causal else WNConv2d
        self.conv1 = conv(in_channels, channels, kernel_size)
        if aux_channels:
            self.aux_conv = WNConv2d(aux_channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(channels, 2 * in_channels, kernel_size)
        if cond_channels:
            self.condition = WNConv2d(cond_channels, 2 * in_channels, bias=False)

    def forward(
        self, x: Tensor, aux: Tensor | None = None, condition: Tensor | None = None,
        cache: GridCache | None = None,
    ) -> Tensor:
        """Map x (B, in_channels, R, Q) to the same shape; `condition` is (B, D, R, Q) or (B, D, 1, 1)."""
        h = self.conv1(F.elu(x), cache)  #                     (B, channels, R, Q)
        if aux is not None:
            h = h + self.aux_conv(F.elu(aux), cache)
        h = self.conv2(self.dropout(F.elu(h)), cache)  #       (B, 2 * in_channels, R, Q)
        if condition is not None:
            h = h + self.condition(condition, cache)
        return x + F.glu(h, dim=1)


class CausalAttention(nn.Module):
    """Attention of each position to all positions before it, not to itself; the first gets zeros."""

    def __init__(self, query_channels: int, key_channels: int, channels: int, n_head: int, dropout: float):
        super().__init__()
        self.query = NormedWeight(channels, query_channels)
        self.key = NormedWeight(channels, key_channels)
        self.value = NormedWeight(channels, key_channels)
        self.n_head, self.dropout = n_head, dropout

    def room(self, batch_size: int, height: int, width: int, like: Tensor) -> Tensor:
        """Return room for keys and values, (2, B, n, N, d)."""
        channels = len(self.key.weight_v) // self.n_head
        return like.new_zeros(2, batch_size, self.n_head, height * width, channels)

    def forward(self, query: Tensor, key: Tensor, cache: GridCache | None = None) -> Tensor:
        """Map queries and keys (B, *, R, Q) to (B, channels, R, Q)."""
        rows, columns = query.shape[2:]
        q, k, v = (
            rearrange(
                F.linear(rearrange(x, "b c r q -> b (r q) c"), part(cache), part.bias),
                "b t (n d) -> b n t d", n=self.n_head,
            )
            for part, x in ((self.query, query), (self.key, key), (self.value, key))
        )
        dropout = self.dropout if self.training else 0.0
        start = 0 if cache is None else cache.position
        if cache is not None:
            end, kept = start + q.shape[2], cache.maps[self]  # (2, B, n, N, d)
            kept[0, :, :, start:end], kept[1, :, :, start:end] = k, v
            k, v = kept[0, :, :, :end], kept[1, :, :, :end]
        if start:  # one position, after others
            y = F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1])
        else:  # position i sees the keys up to i - 1
            y = F.scaled_dot_product_attention(
                q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True, dropout_p=dropout
            )
            y = F.pad(y, (0, 0, 1, 0))
        return rearrange(y, "b n (r q) d -> b (n d) r q", r=rows, q=columns)


class PixelBlock(nn.Module):
    """Gated blocks of causal convolutions, then attention over the block's input and their result.

    Args:
        channel, res_channel: C, and channels between the convolutions of a gated block.
        kernel_size, n_res_block: of the gated blocks.
        n_head: heads; 0 puts a 1x1 convolution in place of the attention.
        dropout: rate.
        cond_channels: D; 0 without a condition.
    """

    def __init__(
        self, channel: int, res_channel: int, kernel_size: int, n_res_block: int, n_head: int, dropout: float,
        cond_channels: int,
    ):
        super().__init__()
        self.resblocks = nn.ModuleList([
            GatedResBlock(
                channel, res_channel, kernel_size, causal=True, dropout=dropout, cond_channels=cond_channels
            )
            for _ in range(n_res_block)
        ])
        self.attends = n_head > 0
        if not self.attends:
            self.out = WNConv2d(channel + 2, channel)
            return
        self.key_resblock = GatedResBlock(2 * channel + 2, channel, dropout=dropout)
        self.query_resblock = GatedResBlock(channel + 2, channel, dropout=dropout)
        self.causal_attention = CausalAttention(channel + 2, 2 * channel + 2, channel // 2, n_head, dropout)
        self.out_resblock = GatedResBlock(channel, channel, dropout=dropout, aux_channels=channel // 2)

    def forward(
        self, x: Tensor, background: Tensor, condition: Tensor | None, cache: GridCache | None
    ) -> Tensor:
        """Map x (B, C, R, Q), with the background (B, 2, R, Q), to (B, C, R, Q)."""
        y = x
        for block in self.resblocks:
            y = block(y, condition=condition, cache=cache)
        if not self.attends:
            return self.out(torch.cat((y, background), dim=1), cache)
        key = self.key_resblock(torch.cat((x, y, background), dim=1), cache=cache)  # (B, 2C + 2, R, Q)
        query = self.query_resblock(torch.cat((y, background), dim=1), cache=cache)  #       (B, C + 2, R, Q)
        seen = self.causal_attention(query, key, cache)  #                                   (B, C / 2, R, Q)
        return self.out_resblock(y, seen, cache=cache)


class CondResNet(nn.Module):
    """Features of a grid of condition codes, by gated blocks of convolutions that see all around.

    Args:
        vocab_size, channels: K, D.
        kernel_size, n_res_block: of the convolutions; of the gated blocks.
        factor: positions of the codes per condition code, along each side.
    """

    def __init__(self, vocab_size: int, channels: int, kernel_size: int, n_res_block: int, factor: int):
        super().__init__()
        self.factor = factor
        blocks = (GatedResBlock(channels, channels, kernel_size) for _ in range(n_res_block))
        self.blocks = nn.Sequential(WNConv2d(vocab_size, channels, kernel_size), *blocks)

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes (B, h, w) to features (B, D, H, W)."""
        first: Any
        first, *rest = self.blocks
        weight, (height, width) = first.conv(), codes.shape[1:]
        side = weight.shape[-1] // 2
        x = one_hot_conv(pad_codes(codes, weight, side, side, side), weight, height, width)
        x = (x + first.conv.bias).movedim(-1, 1)  # (B, D, h, w)
        for block in rest:
            x = block(x)
        return x.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


def pad_codes(codes: Tensor, weight: Tensor, above: int, side: int, below: int = 0) -> Tensor:
    """Put codes that stand for no code, K, around a grid of codes (B, H, W)."""
    return F.pad(codes, (side, side, above, below), value=weight.shape[1])


def one_hot_conv(codes: Tensor, weight: Tensor, rows: int, columns: int) -> Tensor:
    """Convolve one-hot codes: (B, R, Q, out), the sum of the columns of the weight that the codes choose.

    Args:
        codes: padded, (B, >= R + kh - 1, >= Q + kw - 1), int64; K stands for no code.
        weight: (out, K, kh, kw).
        rows, columns: R, Q.
    """
    height, width = weight.shape[2:]
    table = F.pad(weight.permute(2, 3, 1, 0), (0, 0, 0, 1))  # (kh, kw, K + 1, out); nothing for no code
    return sum(  # type: ignore[return-value]  # at least one tap
        F.embedding(codes[:, i : i + rows, j : j + columns], table[i, j])
        for i in range(height) for j in range(width)
    )


class PixelSNAIL(AutoregressivePrior):
    """p(codes | condition) by causal convolutions and attention over the grid of the codes, in raster order.

    The condition tokens are a class, or grids of codes that are as fine as the image's or coarser by a whole
    factor, or several of these: the features of all are added, in every gated block. Without a condition,
    the start token is not read. It takes the same calls as the GPT, the sliding window included.

    Args:
        vocab_size: K; codes and condition tokens share it.
        layout: the parts of the sequence: 1 for a class, [h, w] for a grid of condition codes, and last
            [H, W] of the codes. A model that is built with its stages takes it from them.
        channel, res_channel: C, a multiple of 2 * n_head with attention; and channels between the two
            convolutions of a gated block.
        kernel_size: k, odd.
        n_block, n_res_block: blocks, and gated blocks in each.
        attention, n_head: whether there is attention, and its heads.
        dropout: rate, in the gated blocks and of the attention.
        n_cond_res_block, cond_res_channel, cond_res_kernel: of the network over a grid of condition codes;
            its channels D are C when None.
        n_out_res_block: 1x1 gated blocks before the logits.

    Raises:
        ValueError: an even kernel, channels that do not divide, a condition that is neither a class nor a
            grid that fits.
    """

    on_grid = True
    background: Tensor

    def __init__(
        self, vocab_size: Annotated[int, Range(2)], layout: Sequence[Part], channel: PositiveInt = 256,
        res_channel: PositiveInt = 256, kernel_size: Annotated[int, Range(3)] = 5, n_block: PositiveInt = 4,
        n_res_block: PositiveInt = 4, attention: bool = True, n_head: PositiveInt = 8,
        dropout: Probability = 0.1, n_cond_res_block: NonNegativeInt = 3,
        cond_res_channel: PositiveInt | None = None, cond_res_kernel: PositiveInt = 3,
        n_out_res_block: NonNegativeInt = 0,
    ):
        super().__init__()
        *parts, grid = layout
        if isinstance(grid, int):
            raise ValueError(f"layout: the codes are a grid, [height, width], not {grid}")
        if kernel_size % 2 == 0 or cond_res_kernel % 2 == 0:
            raise ValueError(f"kernel_size: {kernel_size} and cond_res_kernel: {cond_res_kernel} must be odd")
        if attention and channel % (2 * n_head):
            raise ValueError(f"channel: {channel} is not a multiple of 2 * n_head: {2 * n_head}")
        self.vocab_size, self.kernel_size = vocab_size, kernel_size
        self.height, self.width = grid
        self.parts = [tuple(part) if not isinstance(part, int) else part for part in parts]
        # without a condition, one start token stands before the codes
        self.num_condition = sum(map(part_length, parts)) or 1
        self.block_size = self.num_condition + self.height * self.width - 1

        half, cond_channels = kernel_size // 2, (cond_res_channel or channel) if parts else 0
        self.horizontal = _Holder(_Holder(NormedWeight(channel, vocab_size, half, kernel_size)))
        self.vertical = _Holder(_Holder(NormedWeight(channel, vocab_size, half + 1, half)))
        places = [(torch.arange(side).float() - side / 2) / side for side in (self.height, self.width)]
        self.register_buffer("background", torch.stack(torch.meshgrid(*places, indexing="ij"))[None])
        self.blocks = nn.ModuleList([
            PixelBlock(
                channel, res_channel, kernel_size, n_res_block, n_head if attention else 0, dropout,
                cond_channels,
            )
            for _ in range(n_block)
        ])
        for name, part in self._condition_parts():
            self.add_module(name, self._condition_network(
                part, vocab_size, cond_channels, cond_res_kernel, n_cond_res_block
            ))
        out = [GatedResBlock(channel, res_channel, dropout=dropout) for _ in range(n_out_res_block)]
        self.out = nn.Sequential(*out, nn.ELU(), WNConv2d(channel, vocab_size))

    def _condition_parts(self) -> list[tuple[str, int | tuple[int, ...]]]:
        """Name the network of each part of the condition: as the public implementation where there is one."""
        numbers = [f"_{i}" for i in range(len(self.parts))] if len(self.parts) > 1 else [""]
        kinds = ["embedding" if isinstance(part, int) else "resnet" for part in self.parts]
        return [(f"cond_{kind}{n}", part) for kind, n, part in zip(kinds, numbers, self.parts, strict=False)]

    def _condition_network(
        self, part: int | tuple[int, ...], vocab_size: int, channels: int, kernel_size: int, n_res_block: int
    ) -> nn.Module:
        if part == 1:
            return nn.Embedding(vocab_size, channels)
        if isinstance(part, int):
            raise ValueError(
                f"PixelSNAIL takes a class or grids of codes as a condition, not a sequence of {part} "
                "tokens: take taming.modules.transformer.mingpt.GPT"
            )
        factor = self.height // part[0]
        if factor < 1 or (part[0] * factor, part[1] * factor) != (self.height, self.width):
            raise ValueError(
                f"a condition of {part[0]}x{part[1]} codes does not fit {self.height}x{self.width} codes of "
                "the image: it must be as large, or smaller by one whole factor along both sides"
            )
        return CondResNet(vocab_size, channels, kernel_size, n_res_block, factor)

    # ---- the network

    def condition_features(self, tokens: Tensor) -> Tensor | None:
        """Map condition tokens (B, M) to what gated blocks add: (B, D, H, W), or (B, D, 1, 1) of a class."""
        features, start = None, 0
        for name, part in self._condition_parts():
            network = getattr(self, name)
            if isinstance(part, int):
                new = network(tokens[:, start])[..., None, None]
                start += 1
            else:
                end = start + math.prod(part)
                new = network(tokens[:, start:end].view(-1, *part))
                start = end
            features = new if features is None else features + new
        return features

    def _logits(self, codes: Tensor, condition: Tensor | None, area: Area, cache: GridCache | None) -> Tensor:
        """Return logits (B, K, R, Q) of an area, from padded codes (B, k // 2 + H, ...) and the condition."""
        rows, columns = area
        weights: list[NormedWeight] = [part.conv.conv for part in (self.horizontal, self.vertical)]
        size = rows.stop - rows.start, columns.stop - columns.start
        seen = codes[:, rows.start :, columns.start :]
        # "horizontal" sees k // 2 rows above, "vertical" those and the row itself, left of the position; no
        # bias where the former has no row above, the latter no column to the left
        above, left = (one_hot_conv(seen, weight(cache), *size) for weight in weights)  # (B, R, Q, C)
        index = torch.arange(max(self.height, self.width), device=codes.device)
        above = above + (index[rows] > 0)[:, None, None] * self.horizontal.conv.conv.bias
        left = left + (index[columns] > 0)[:, None] * self.vertical.conv.conv.bias
        x = (above + left).movedim(-1, 1)  # (B, C, R, Q)
        background = self.background[..., rows, columns].expand(len(x), -1, -1, -1)
        if condition is not None and condition.shape[2:] != (1, 1):
            condition = condition[..., rows, columns]
        for block in self.blocks:
            x = block(x, background, condition, cache)  # (B, C, R, Q)
        *gated, activation, last = self.out
        for block in gated:
            x = block(x, cache=cache)
        return last(activation(x), cache)

    def _read(self, tokens: Tensor, cache: GridCache | None = None) -> Tensor:
        """Return logits (B, K, R, W) of all rows down to that of the code after these, (B, M + T)."""
        count = tokens.shape[1] - self.num_condition
        if not 0 <= count < self.height * self.width:
            raise ValueError(
                f"{tokens.shape[1]} tokens are not {self.num_condition} of the condition and fewer than "
                f"{self.height}x{self.width} codes: the layout is {[*self.parts, [self.height, self.width]]}"
            )
        condition = self.condition_features(tokens)
        rows = count // self.width + 1
        codes = F.pad(tokens[:, self.num_condition :], (0, rows * self.width - count), value=self.vocab_size)
        half = self.kernel_size // 2
        padded = pad_codes(codes.view(-1, rows, self.width), self.horizontal.conv.conv.weight_v, half, half)
        area = slice(0, rows), slice(0, self.width)
        if cache is not None:
            cache.codes[:, : half + rows] = padded
            cache.condition, cache.area, cache.position = condition, area, 0
        return self._logits(padded, condition, area, cache)

    def forward(self, idx: Tensor) -> tuple[Tensor, None]:
        """Map condition and codes (B, T) to logits (B, T, V) of what follows each.

        They are 0 within the condition, which is not modelled.
        """
        count = idx.shape[1] - self.num_condition + 1
        logits = self._read(idx).flatten(2).transpose(1, 2)[:, :count]  # (B, count, V)
        return F.pad(logits, (0, 0, self.num_condition - 1, 0)), None

    # ---- decoding, position by position (taming.sampling.CachedTransformer)

    def new_cache(self, batch_size: int, length: int) -> GridCache:
        """Return room for what is computed once for `batch_size` grids; `length` is not needed."""
        device = self.background.device
        dtype = self.background.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        like, half = torch.empty(0, device=device, dtype=dtype), self.kernel_size // 2
        padded = batch_size, half + self.height, half + self.width + half
        maps: dict[nn.Module, Tensor] = {
            module: module.room(batch_size, self.height, self.width, like)
            for module in self.modules() if isinstance(module, CausalConv2d | CausalAttention)
        }
        return GridCache(torch.full(padded, self.vocab_size, device=device), maps)

    def extend(self, idx: Tensor, cache: GridCache) -> Tensor:
        """Append tokens (B, T) to the cache; return logits (B, V) of the code after the last.

        Of each new code only the position after it is computed: no earlier one changes.
        """
        if cache.length == 0:
            logits = self._read(idx, cache)
            cache.length = idx.shape[1]
            return logits.flatten(2)[:, :, cache.length - self.num_condition]
        for token in idx.T:
            half, place = self.kernel_size // 2, cache.length - self.num_condition
            cache.codes[:, half + place // self.width, half + place % self.width] = token
            cache.length, cache.position = cache.length + 1, place + 1
            row, column = divmod(place + 1, self.width)
            if row == self.height:
                raise ValueError(f"all {self.height}x{self.width} codes are there: none follows")
            cache.area = slice(row, row + 1), slice(column, column + 1)
            logits = self._logits(cache.codes, cache.condition, cache.area, cache)
        return logits[..., 0, 0]
