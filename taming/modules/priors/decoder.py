"""What decoder-only transformers over a grid of codes share: layout of the sequence, attention, cache.

B batch, T tokens that are read, S positions so far, M condition tokens, H W grid of codes, N = H*W,
D channels, V vocabulary, n heads, m heads of keys and values, d channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.priors.base import AutoregressivePrior
from taming.modules.transformer.attention import attend
from taming.modules.transformer.cpu_inference import PACK_FROM, can_pack, pack_linears
from taming.modules.transformer.positions import Part, part_length

KeysAndValues = tuple[Tensor, Tensor]  # of one block: (B, m, positions, d) each


@dataclass
class DecoderCache:
    """Preallocated keys and values of all blocks; the first `length` tokens are read. 0 forgets them."""

    rooms: list[KeysAndValues]
    blocks: Sequence[nn.Module]  # the transformer's, or copies with weights in the order of single steps
    head: nn.Module
    length: int = 0
    condition: dict[str, Any] = field(default_factory=dict)  # what a prior keeps of the condition


class GridDecoder(AutoregressivePrior):
    """A transformer over condition tokens, then codes in raster order. It takes all calls that a GPT takes.

    A subclass embeds (`embed`), and names its blocks and its head. Of no condition, it reads one start token.

    Args:
        vocab_size: V; with `condition_vocab_size` the number of codes.
        layout: the parts of the sequence: for each condition a number of tokens or [h, w] of a grid, and last
            [H, W] of the codes. A model that is built with its stages takes it from them.
        condition_vocab_size: number of condition tokens with embeddings of their own; None: they share the
            vocabulary of the codes.
        first: positions that the transformer reads before the codes, minus tokens of the condition: 1 with a
            position before the condition that is not a token, below 0 where tokens are not positions.

    Raises:
        ValueError: a layout that does not end with a grid.
    """

    on_grid = True

    def __init__(
        self, vocab_size: int, layout: Sequence[Part], condition_vocab_size: int | None, first: int = 0
    ):
        super().__init__()
        self.vocab_size, self.condition_vocab_size, self.first = vocab_size, condition_vocab_size, first
        *parts, grid = [part if isinstance(part, int) else tuple(part) for part in layout or [0]]
        if isinstance(grid, int) or len(grid) != 2 or min(grid) < 1:
            raise ValueError(
                f"layout: {layout} does not end with the grid of the codes: give [[height, width]], after a "
                "number of tokens, or [height, width] of a grid, for each condition"
            )
        if any((part < 1) if isinstance(part, int) else len(part) != 2 or min(part) < 1 for part in parts):
            raise ValueError(
                f"layout: {layout} has a part that is neither a number of tokens nor [height, width]"
            )
        self.height, self.width = grid
        self.parts: list[int | tuple[int, ...]] = parts or [1]  # a start token
        self.num_condition = sum(map(part_length, self.parts))
        self.block_size = self.num_condition + self.height * self.width - 1

    # ---- what a subclass offers

    def embed(
        self, idx: Tensor, start: int, kept: dict[str, Any], **more: Any
    ) -> tuple[Tensor, Sequence[Any]]:
        """Embed tokens (B, T) from number `start` on: (B, T, D), and what each block and the head take, too.

        `kept` is empty at the start, and the same when the sequence goes on. At the start there are more or
        fewer positions than tokens, (B, first + T, D). `more` is what `forward` was given.
        """
        raise NotImplementedError

    @property
    def decoder_blocks(self) -> Sequence[Any]:
        """Blocks: of x (B, T, D), what `embed` gave, keys and values or None, and the place of the first."""
        raise NotImplementedError

    @property
    def decoder_head(self) -> nn.Module:
        """What maps x (B, T, D), and what `embed` gave for it, to logits (B, T, V)."""
        raise NotImplementedError

    # ---- the calls of a prior

    def forward(self, idx: Tensor, **more: Any) -> tuple[Tensor, None]:
        """Map condition and codes (B, T) to logits (B, T, V) of what follows each."""
        self.check_tokens(idx, 0)
        x, (*others, last) = self.embed(idx, 0, {}, **more)
        for block, other in zip(self.decoder_blocks, others, strict=True):
            x = block(x, other, None, 0)
        logits = self.decoder_head(x, last)  # (B, first + T, V)
        if self.first < 0:  # nothing is predicted after tokens that are not positions
            return F.pad(logits, (0, 0, -self.first, 0)), None
        return logits[:, self.first :], None

    def check_tokens(self, idx: Tensor, start: int) -> None:
        """Raise ValueError unless tokens (B, T) from a place on fit the layout."""
        end, most = start + idx.shape[1], self.num_condition + self.height * self.width
        if not self.num_condition <= end <= most:
            raise ValueError(
                f"{end} tokens are not {self.num_condition} of the condition and up to "
                f"{self.height}x{self.width} codes: the layout is {[*self.parts, [self.height, self.width]]}"
            )

    def new_cache(self, batch_size: int, length: int) -> DecoderCache:
        """Return room for `length` tokens of `batch_size` sequences, with the model's device and dtype."""
        like = next(self.parameters())
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        parts: list[Any] = [*self.decoder_blocks, self.decoder_head]
        rooms = [
            (like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype))
            for shape in (block.room(batch_size, self.first + length) for block in parts[:-1])
        ]
        if length >= PACK_FROM and can_pack(like.device, dtype):
            parts = [pack_linears(part, batch_size, dtype) for part in parts]
        return DecoderCache(rooms, parts[:-1], parts[-1])

    def extend(self, idx: Tensor, cache: DecoderCache) -> Tensor:
        """Append tokens (B, T) to the cache; return logits (B, V) of the code after the last.

        The first call must hold the whole condition.
        """
        self.check_tokens(idx, cache.length)
        if cache.length == 0:
            cache.condition.clear()
        x, (*others, last) = self.embed(idx, cache.length, cache.condition)
        place = cache.length + (self.first if cache.length else 0)
        for block, other, room in zip(cache.blocks, others, cache.rooms, strict=True):
            x = block(x, other, room, place)
        cache.length += idx.shape[1]
        return cache.head(x[:, -1:], None if last is None else last[:, -1:])[:, 0]


def keep(k: Tensor, v: Tensor, room: KeysAndValues | None, start: int) -> KeysAndValues:
    """Put keys and values (B, m, T, d) into their room from `start` on; return all so far, (B, m, S, d)."""
    if room is None:
        return k, v
    end = start + k.shape[2]
    keys, values = room
    keys[:, :, start:end], values[:, :, start:end] = k, v
    return keys[:, :, :end], values[:, :, :end]


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Return causal attention of the last T of S positions to all of them: (B, n, T, d).

    Args:
        q: (B, n, T, d).
        k, v: (B, m, S, d); n is a multiple of m, and neighbouring heads of q share those of k and v (Ainslie
            et al. 2023, "GQA").
        dropout: rate, 0 outside of training.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1:  # the queries of a group as rows: nothing is copied
        rows = F.scaled_dot_product_attention(q[:, :, 0].unflatten(1, (-1, groups)), k, v, dropout_p=dropout)
        return rows.flatten(1, 2)[:, :, None]
    if groups > 1:
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    return attend(q, k, v, dropout=dropout)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift (Peebles and Xie 2023, "DiT")."""
    return x * (1 + scale) + shift


def zero_modulation(channels: int, count: int) -> nn.Sequential:
    """Return a network from (..., D) to (..., count * D) that starts as zero ("adaLN-Zero" of DiT)."""
    linear = nn.Linear(channels, count * channels)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


def check_heads(channels: int, n_head: int) -> None:
    """Raise ValueError unless channels divide among heads."""
    if channels % n_head:
        raise ValueError(f"n_embd: {channels} is not a multiple of n_head: {n_head}")
