"""Codes of a picture of any size, drawn through a window that slides over a larger latent grid.

Esser et al. 2021, section 3.3: the transformer sees only as many codes as it was trained on, those of a
window around the next position. B batch, H W latent grid, N codes of a window, M condition tokens before
them, h w condition grid, Q positions of a step, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.sampling.decode import CachedTransformer
from taming.sampling.filters import Number
from taming.sampling.logits_sampler import Callback, Chooser, Generators, check_logits, report
from taming.sampling.schedules import Setting

Position = tuple[int, int]  # row, column
Condition = Tensor | Sequence[Tensor]


@torch.no_grad()
def sample_window(
    transformer: CachedTransformer, condition: Condition, *, shape: tuple[int, int] | None = None,
    window: int | Position = 16, condition_windows: Sequence[Position | None] | None = None,
    stride: int = 1, start: Position | None = None, known: Tensor | None = None,
    mask: Tensor | None = None, wavefront: bool = False,
    temperature: Setting = 1.0, top_k: Number | None = None, top_p: Number | None = None,
    min_p: Number | None = None, greedy: bool = False, guidance: Setting = 1.0,
    null_condition: Condition | None = None, generator: Generators = None, callback: Callback | None = None,
    n_codes: int | None = None,
) -> Tensor:
    """Draw a grid of codes (B, H, W), each given the codes before it in a window that holds it.

    With `stride` 1 this is the rule of 2021: the position lies in the window's centre, or off it where the
    window would leave the grid. As long as the window stays, its keys and values do too.

    Args:
        transformer: the network, in eval mode.
        condition: a grid of codes (B, h, w), of which the transformer sees those of the window; or tokens
            that it sees in every window, (B, M), such as a class or a start token; or several of these, which
            it sees one after the other.
        shape: (H, W); needed where no condition is a grid of that shape.
        window: side, or (height, width), of the window that the transformer was trained on, in codes.
        condition_windows: (height, width) of the window in the grid of each condition, where that is coarser
            or finer than the codes, else None.
        stride: positions of a row that are drawn before the window moves; more is faster, and the last ones
            lie off the centre.
        start: the first position (row, column) to draw; those before it in raster order are known.
        known: codes (B, H, W) that are given, where `start` or `mask` say so.
        mask: True where known codes stay, (H, W) or (B, H, W).
        wavefront: draw in one batch all positions that do not see each other: the same codes in fewer steps,
            each of them a whole forward. For stride 1.
        temperature, top_k, top_p, min_p, greedy, guidance, n_codes: see `sample_tokens`. Schedules are asked
            for the position in raster order, row * W + column.
        null_condition: null tokens in place of the condition, of its shapes or with a batch of 1.
        generator: one per image or a single one, see `sample_tokens`; a position's random number does not
            depend on the stride, the mask or the wavefront.
        callback: called after each step with its number (from 0) and the grid so far (B, H, W); if it returns
            False, sampling stops there.

    Raises:
        ValueError: a grid smaller than the window, a window longer than the transformer's block, a condition
            or known codes of another size, nothing left to draw, guidance without null tokens, or logits that
            are not numbers.
        Cancelled: by the callback; it holds the grid so far.
    """
    sides, given, nulls, inner, (height, width) = _checked(
        transformer, condition, null_condition, shape, window, condition_windows, stride
    )
    if wavefront and stride != 1:
        raise ValueError(f"wavefront draws with stride 1, not {stride}")
    batch_size, device = len(given[0]), given[0].device
    kept = _kept_positions((batch_size, height, width), start, known, mask).to(device)  # (B, H, W)
    codes = torch.zeros(batch_size, height, width, dtype=torch.int64, device=device)
    if known is not None:
        codes = torch.where(kept, known.to(device), codes)
    choose = Chooser(
        batch_size, height * width, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        greedy=greedy, guidance=guidance, has_null=nulls is not None, generator=generator,
        n_codes=n_codes,
    )

    def read(origin: Position, guided: bool) -> tuple[Tensor, int]:
        """What the transformer reads at a window, (B, M + N) or (2B, M + N), and M."""
        halves = [_sequence(parts, inner, codes, origin, sides) for parts in (given, nulls)[: 1 + guided]]
        return torch.cat([tokens for tokens, _ in halves]), halves[0][1]

    todo = (~kept.all(0)).tolist()  # a position is drawn unless it is known in all images
    origins = _origins(height, width, sides, stride)
    take_turns = _waves if wavefront else _one_by_one
    turns = take_turns(transformer, read, choose.guided, todo, origins, sides)
    for step, (logits, positions) in enumerate(turns):
        check_logits(logits, step, last=False)
        i, j = torch.tensor(positions, device=device).T
        drawn = choose(logits, [row * width + column for row, column in positions])
        codes[:, i, j] = torch.where(kept[:, i, j], codes[:, i, j], drawn)
        report(callback, step, codes)
    return codes


Turn = tuple[Tensor, list[Position]]  # logits (B or 2B, Q, V), and the Q positions that they belong to
Read = Callable[[Position, bool], tuple[Tensor, int]]


def _one_by_one(
    transformer: CachedTransformer, read: Read, guided: list[bool], todo: list[list[bool]],
    origins: list[list[Position]], window: Position,
) -> Iterator[Turn]:
    """Logits (B, 1, V) of one position after the other, over the cache while the window stays."""
    wh, ww = window
    caches: dict[bool, Any] = {}  # one for each number of halves
    current = None
    for i, row in enumerate(todo):
        for j in (j for j, wanted in enumerate(row) if wanted):
            both, (top, left) = guided[i * len(row) + j], origins[i][j]
            sequence, length = read((top, left), both)
            end = length + (i - top) * ww + j - left
            if both not in caches:
                caches[both] = transformer.new_cache(len(sequence), length + wh * ww - 1)
            cache = caches[both]
            if (top, left, both) != current:
                current, cache.length = (top, left, both), 0
            yield transformer.extend(sequence[:, cache.length : end], cache)[:, None], [(i, j)]


def _waves(
    transformer: CachedTransformer, read: Read, guided: list[bool], todo: list[list[bool]],
    origins: list[list[Position]], window: Position,
) -> Iterator[Turn]:
    """Logits (B, Q, V) of all Q positions whose windows are complete, by a forward over padded sequences."""
    for positions in _levels(todo, origins, window):
        both = any(guided[i * len(todo[0]) + j] for i, j in positions)
        yield _logits_at(transformer, read, both, positions, origins, window), positions


def _logits_at(
    transformer: CachedTransformer, read: Read, both: bool, positions: list[Position],
    origins: list[list[Position]], window: Position,
) -> Tensor:
    """Logits (B or 2B, Q, V) of Q positions, each in its own window, by one forward."""
    parts, ends = [], []
    for i, j in positions:
        top, left = origins[i][j]
        sequence, length = read((top, left), both)
        parts.append(sequence)
        ends.append(length + (i - top) * window[1] + j - left)
    tokens = torch.stack(parts, dim=1)[:, :, : max(ends)]  # (B, Q, T); none sees those after it
    logits = transformer(tokens.flatten(0, 1))[0].view(*tokens.shape, -1)
    return logits[:, range(len(ends)), [end - 1 for end in ends]]


@torch.no_grad()
def window_nll(
    transformer: CachedTransformer, condition: Condition, codes: Tensor, *, window: int | Position = 16,
    condition_windows: Sequence[Position | None] | None = None,
) -> Tensor:
    """Negative log-likelihood (B, H, W), in nats, of each code of a grid under the rule of stride 1.

    It tells what another way of drawing costs: the codes of a longer stride, for instance, are less likely.

    Args:
        transformer, condition, window, condition_windows: see `sample_window`.
        codes: the grid (B, H, W): what was drawn, or what an image was encoded to.

    Raises:
        ValueError: see `sample_window`.
    """
    shape = tuple(codes.shape[1:])
    sides, given, _, inner, (height, width) = _checked(
        transformer, condition, None, shape, window, condition_windows, stride=1
    )
    origins, rows = _origins(height, width, sides, 1), []
    for i in range(height):
        logits = _logits_at(
            transformer, lambda origin, _: _sequence(given, inner, codes, origin, sides), False,
            [(i, j) for j in range(width)], origins, sides,
        )
        rows.append(F.cross_entropy(logits.float().transpose(1, 2), codes[:, i], reduction="none"))
    return torch.stack(rows, dim=1)


def _origins(height: int, width: int, window: Position, stride: int) -> list[list[Position]]:
    """The window's upper left corner for every position; it moves every `stride` columns."""
    wh, ww = window
    tops = [min(max(i - wh // 2, 0), height - wh) for i in range(height)]
    lefts = []
    for j in range(width):
        first = j - j % stride  # what is drawn before the window moves must lie in it
        lefts.append(min(max(first - min(ww // 2, ww - stride), 0), width - ww))
    return [[(top, left) for left in lefts] for top in tops]


def _levels(todo: list[list[bool]], origins: list[list[Position]], window: Position) -> list[list[Position]]:
    """Positions to draw, grouped: each group sees only groups before it."""
    level = [[0] * len(row) for row in todo]  # steps after which a position is there; 0: known
    groups: list[list[Position]] = []
    for i, row in enumerate(todo):
        for j in (j for j, wanted in enumerate(row) if wanted):
            top, left = origins[i][j]
            seen = [max(level[r][left : left + window[1]]) for r in range(top, i)]
            level[i][j] = 1 + max(seen + level[i][left:j], default=0)
            if level[i][j] > len(groups):
                groups.append([])
            groups[level[i][j] - 1].append((i, j))
    return groups


def _as_list(condition: Condition) -> list[Tensor]:
    return [condition] if torch.is_tensor(condition) else list(condition)


def _checked(
    transformer: CachedTransformer, condition: Condition, null_condition: Condition | None,
    shape: Position | None, window: int | Position,
    condition_windows: Sequence[Position | None] | None, stride: int,
) -> tuple[Position, list[Tensor], list[Tensor] | None, list[Position], Position]:
    """Sides of the window, conditions, null conditions, the window in each condition's own grid, (H, W)."""
    sides = (window, window) if isinstance(window, int) else window
    given = _as_list(condition)
    nulls = None if null_condition is None else _as_list(null_condition)
    inner = [pair or sides for pair in condition_windows or [None] * len(given)]
    shape = _grid_shape(given, inner, shape, sides, stride)
    _check_conditions(given, nulls, inner, shape, sides, transformer.block_size)
    return sides, given, nulls, inner, shape


def _cut(part: Tensor, origin: Position, window: Position, own: Position) -> Tensor:
    """What of a grid (B, h, w) lies in the window, whose size in that grid is `own`: (B, N); tokens stay."""
    if part.ndim == 2:
        return part
    top, left = (first * cells // side for first, side, cells in zip(origin, window, own, strict=True))
    return part[:, top : top + own[0], left : left + own[1]].flatten(1)


def _sequence(
    parts: list[Tensor], inner: list[Position], codes: Tensor, origin: Position, window: Position
) -> tuple[Tensor, int]:
    """Condition tokens and codes of a window, (B, M + N), and M."""
    seen = [_cut(part, origin, window, own) for part, own in zip(parts, inner, strict=True)]
    tokens = [part.expand(len(codes), -1) for part in seen] + [_cut(codes, origin, window, window)]
    return torch.cat(tokens, dim=1), sum(part.shape[1] for part in seen)


def _grid_shape(
    given: list[Tensor], inner: list[Position], shape: Position | None, window: Position, stride: int
) -> Position:
    """Check window and stride, and return (H, W)."""
    pairs = zip(given, inner, strict=True)
    whole = [tuple(part.shape[1:]) for part, own in pairs if part.ndim == 3 and own == window]
    if not whole and shape is None:
        raise ValueError("shape=(H, W), in codes, is needed where the condition is no grid")
    height, width = shape or whole[0]
    wh, ww = window
    if height < wh or width < ww:
        raise ValueError(
            f"a grid of {height}x{width} codes is smaller than the window of {wh}x{ww}: "
            f"at least {max(height, wh)}x{max(width, ww)} are needed"
        )
    if not 1 <= stride <= ww:
        raise ValueError(f"stride = {stride} is outside 1..{ww}, the window's width")
    return height, width


def _check_conditions(
    given: list[Tensor], nulls: list[Tensor] | None, inner: list[Position], shape: Position, window: Position,
    block_size: int,
) -> None:
    """Grids that belong to others than this shape, null tokens of another shape, too long a sequence."""
    needed = window[0] * window[1] - 1
    for part, own in zip(given, inner, strict=True):
        needed += part.shape[1] if part.ndim == 2 else own[0] * own[1]
        grid = tuple(part.shape[1:])
        if part.ndim == 3 and any(n * side != whole * cells for n, side, whole, cells in zip(
            grid, window, shape, own, strict=True
        )):
            raise ValueError(
                f"the condition has {grid[0]}x{grid[1]} codes, but shape is {shape[0]}x{shape[1]}"
                + (f", of which {window[0]}x{window[1]} see {own[0]}x{own[1]}" if own != window else "")
            )
    if nulls is not None:
        ours, theirs = [tuple(part.shape) for part in given], [tuple(part.shape) for part in nulls]
        if theirs not in (ours, [(1, *sizes[1:]) for sizes in ours]):
            shapes = (", ".join(map(str, shapes)) for shapes in (theirs, ours))
            raise ValueError("null_condition {} does not fit the condition {}".format(*shapes))
    if needed > block_size:
        raise ValueError(
            f"condition and codes of a window of {window[0]}x{window[1]} need a block size of {needed}; the "
            f"transformer's is {block_size}: take the window that it was trained on"
        )


def _kept_positions(
    shape: tuple[int, int, int], start: Position | None, known: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Which codes stay, (B, H, W)."""
    batch_size, height, width = shape
    if known is not None and tuple(known.shape) != shape:
        raise ValueError(f"known codes {tuple(known.shape)} do not fit the grid {shape}")
    if known is None and (start is not None or mask is not None):
        raise ValueError("start and mask say where known codes stay: give known=, codes (B, H, W)")
    if known is not None and start is None and mask is None:
        raise ValueError("known codes are given, but neither start= nor mask= says where they stay")
    kept = torch.zeros(shape, dtype=torch.bool)
    if mask is not None:
        if tuple(mask.shape) not in (shape, shape[1:]):
            raise ValueError(f"mask {tuple(mask.shape)} does not fit the grid {shape}")
        kept |= mask.bool().cpu()
    if start is not None:
        if not (0 <= start[0] < height and 0 <= start[1] < width):
            raise ValueError(f"start = {start} lies outside the grid of {height}x{width} codes")
        kept.view(batch_size, -1)[:, : start[0] * width + start[1]] = True
    if kept.all():
        raise ValueError("the mask keeps every code: there is nothing to draw")
    return kept
