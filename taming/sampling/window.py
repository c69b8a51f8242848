"""Codes of an image of any size, sampled through a window that slides over a larger latent grid.

Esser et al. 2021, section 3.3: the transformer sees only as many codes as it was trained on, those of a
window around the next position. B batch, H W latent grid, N codes of a window, M condition tokens before
them, h w condition grid, Q positions of a step, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.sampling.decode import CachedTransformer
from taming.sampling.logits_sampler import Callback, Generators, LogitsSampler, check_logits, report
from taming.sampling.options import SamplingOptions, resolve

Position = tuple[int, int]  # row, column
ConditionAt = Callable[[Position], Tensor]  # upper left corner of a window -> the tokens (B, M) that it sees
Condition = Tensor | Sequence[Tensor] | ConditionAt


@torch.no_grad()
def sample_window(
    transformer: CachedTransformer, condition: Condition, options: SamplingOptions | None = None, *,
    shape: tuple[int, int] | None = None, window: int | Position = 16,
    condition_windows: Sequence[Position | None] | None = None, start: Position | None = None,
    known: Tensor | None = None, mask: Tensor | None = None, null_condition: Condition | None = None,
    generator: Generators = None, callback: Callback | None = None, codebook_size: int | None = None,
    **changes: Any,
) -> Tensor:
    """Sample a grid of codes (B, H, W), each given the codes before it in a window that holds it.

    With stride 1 this is the rule of the paper: the position lies in the window's centre, or off it where the
    window would leave the grid. While the window stays, its keys and values are kept.

    Args:
        transformer: the network, in eval mode.
        condition: a grid of codes (B, h, w); the transformer sees those of the window; or tokens
            that it sees in every window, (B, M), such as a class or a start token; or several of these, which
            it sees one after the other; or a callable from the window's upper left corner (row, column) to
            the tokens (B, M) that it sees there; it is asked once for each window.
        options: temperature, filters, guidance, stride, wavefront, ...; `changes` are applied on top.
            Schedules are asked for the position in raster order, row * W + column.
        shape: (H, W); needed where no condition is a grid of that shape.
        window: side, or (height, width), of the window that the transformer was trained on, in codes.
        condition_windows: (height, width) of the window in the grid of each condition, where that is coarser
            or finer than the codes, else None.
        start: the first position (row, column) to sample; those before it in raster order are known.
        known: codes (B, H, W) that are given, where `start` or `mask` say so.
        mask: True where known codes stay, (H, W) or (B, H, W).
        null_condition: null tokens in place of the condition, of its shapes or with a batch of 1.
        generator: one per image or a single one, see `sample_tokens`; a position's random number does not
            depend on the stride, the mask or the wavefront.
        callback: called after each step with its number (from 0) and the grid so far (B, H, W); sampling
            stops if it returns False.
        codebook_size: see `sample_tokens`.

    Raises:
        ValueError: a grid smaller than the window, a window longer than the transformer's block, a condition
            or known codes of another size, nothing left to sample, guidance without null tokens, a wavefront
            with another stride than 1, or logits that are NaN.
        Cancelled: by the callback; it holds the grid so far.
    """
    options = resolve(options, changes)
    view = window_view(
        transformer.block_size, condition, null_condition, shape, window, condition_windows, options.stride
    )
    if options.wavefront and options.stride != 1:
        raise ValueError(f"a wavefront is for stride 1, not {options.stride}")
    height, width = view.shape
    kept = kept_positions((view.batch_size, height, width), start, known, mask).to(view.device)  # (B, H, W)
    codes = torch.zeros(view.batch_size, height, width, dtype=torch.int64, device=view.device)
    if known is not None:
        codes = torch.where(kept, known.to(view.device), codes)
    sample = LogitsSampler(
        view.batch_size, height * width, view.device, options, has_null=view.null_at is not None,
        generator=generator, codebook_size=codebook_size, head=getattr(transformer, "code_head", None),
    )
    todo = (~kept.all(0)).tolist()  # a position is sampled unless it is known in all images
    origins = _origins(height, width, view.window, options.stride)
    steps = _wavefront if options.wavefront else _one_by_one
    for step, (logits, positions) in enumerate(steps(transformer, view, codes, sample.guided, todo, origins)):
        check_logits(logits, step, last=False)
        i, j = torch.tensor(positions, device=view.device).T
        new = sample(logits, [row * width + column for row, column in positions])
        codes[:, i, j] = torch.where(kept[:, i, j], codes[:, i, j], new)
        report(callback, step, codes)
    return codes


@torch.no_grad()
def window_nll(
    transformer: CachedTransformer, condition: Condition, codes: Tensor, *, window: int | Position = 16,
    condition_windows: Sequence[Position | None] | None = None,
) -> Tensor:
    """Return the negative log-likelihood (B, H, W), in nats, of each code under the rule of stride 1.

    It tells what another stride costs: the codes of a longer one are less likely.

    Args:
        transformer, condition, window, condition_windows: see `sample_window`.
        codes: the grid (B, H, W): sampled codes, or those of an image.

    Raises:
        ValueError: see `sample_window`.
    """
    shape = (codes.shape[1], codes.shape[2])
    view = window_view(
        transformer.block_size, condition, None, shape, window, condition_windows, stride=1
    )
    origins, rows = _origins(*shape, view.window, 1), []
    head = getattr(transformer, "code_head", None)
    for i in range(shape[0]):
        logits = _logits_at(transformer, view, codes, False, [(i, j) for j in range(shape[1])], origins)
        if head is not None:
            rows.append(-head.log_prob(logits, codes[:, i]))
            continue
        rows.append(F.cross_entropy(logits.float().transpose(1, 2), codes[:, i], reduction="none"))
    return torch.stack(rows, dim=1)


# ---- what the transformer reads at a window


@dataclass(frozen=True)
class View:
    """What the transformer reads at each place of the window."""

    condition_at: ConditionAt
    null_at: ConditionAt | None
    window: Position
    shape: Position  # (H, W)
    batch_size: int
    device: torch.device

    def sequence(self, codes: Tensor, origin: Position, guided: bool) -> tuple[Tensor, int]:
        """Return condition tokens and codes of a window, (B, M + N) or (2B, M + N), and M."""
        (top, left), (height, width) = origin, self.window
        inside = codes[:, top : top + height, left : left + width].flatten(1)  # (B, N)
        readers = [self.condition_at, self.null_at][: 1 + guided]
        conditions = [read(origin).expand(len(codes), -1) for read in readers if read is not None]
        halves = [torch.cat((tokens, inside), dim=1) for tokens in conditions]
        return torch.cat(halves), conditions[0].shape[1]


def window_view(
    block_size: int, condition: Condition, null_condition: Condition | None,
    shape: Position | None, window: int | Position, condition_windows: Sequence[Position | None] | None,
    stride: int,
) -> View:
    """Bring conditions to one form, and check that window, grid, conditions and block size agree."""
    sides = (window, window) if isinstance(window, int) else window
    condition_at: ConditionAt
    null_at: ConditionAt | None
    if callable(condition):
        height, width = _grid_shape(shape, sides, stride)
        condition_at, null_at = functools.cache(condition), _as_callable(null_condition)
        first = condition_at((0, 0))
        length = first.shape[1]
    else:
        given = _as_list(condition)
        inner = [pair or sides for pair in condition_windows or [None] * len(given)]
        pairs = zip(given, inner, strict=True)
        grids = [(part.shape[1], part.shape[2]) for part, own in pairs if part.ndim == 3 and own == sides]
        height, width = _grid_shape(shape or (grids[0] if grids else None), sides, stride)
        _check_grids(given, inner, (height, width), sides)
        first, condition_at, null_at = given[0], _cut(given, inner, sides), None
        length = sum(part.shape[1] if part.ndim == 2 else own[0] * own[1]
                     for part, own in zip(given, inner, strict=True))
        if null_condition is not None:
            assert not callable(null_condition), "null tokens of grids are grids"
            nulls = _as_list(null_condition)
            ours, theirs = [tuple(part.shape) for part in given], [tuple(part.shape) for part in nulls]
            if theirs not in (ours, [(1, *sizes[1:]) for sizes in ours]):
                shapes = (", ".join(map(str, shapes)) for shapes in (theirs, ours))
                raise ValueError("null_condition {} does not fit the condition {}".format(*shapes))
            null_at = _cut(nulls, inner, sides)
    needed = length + sides[0] * sides[1] - 1
    if needed > block_size:
        raise ValueError(
            f"condition and codes of a window of {sides[0]}x{sides[1]} need a block size of {needed}; the "
            f"transformer's is {block_size}: take the window that it was trained on"
        )
    return View(condition_at, null_at, sides, (height, width), len(first), first.device)


def _as_list(condition: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [condition] if isinstance(condition, Tensor) else list(condition)


def _as_callable(condition: Condition | None) -> ConditionAt | None:
    """Read the same tokens in every window, where they are not callable."""
    if condition is None or callable(condition):
        return condition
    tokens = torch.cat(_as_list(condition), dim=1)
    return lambda origin: tokens


def _cut(parts: list[Tensor], inner: list[Position], window: Position) -> ConditionAt:
    """Read tokens (B, M) as they are, and of grids (B, h, w) the part in the window, `inner` in that grid."""

    def condition_at(origin: Position) -> Tensor:
        seen = []
        for part, own in zip(parts, inner, strict=True):
            if part.ndim == 3:
                top, left = (n * cells // side for n, side, cells in zip(origin, window, own, strict=True))
                part = part[:, top : top + own[0], left : left + own[1]].flatten(1)
            seen.append(part)
        return torch.cat(seen, dim=1)

    return condition_at


def _grid_shape(shape: Position | None, window: Position, stride: int) -> Position:
    """Check window and stride, and return (H, W)."""
    if shape is None:
        raise ValueError("shape=(H, W), in codes, is needed where the condition is not a grid")
    (height, width), (wh, ww) = shape, window
    if height < wh or width < ww:
        raise ValueError(
            f"a grid of {height}x{width} codes is smaller than the window of {wh}x{ww}: "
            f"at least {max(height, wh)}x{max(width, ww)} are needed"
        )
    if not 1 <= stride <= ww:
        raise ValueError(f"stride = {stride} is outside 1..{ww}, the window's width")
    return height, width


def _check_grids(parts: list[Tensor], inner: list[Position], shape: Position, window: Position) -> None:
    """Raise ValueError for a condition grid that belongs to another shape."""
    for part, own in zip(parts, inner, strict=True):
        grid = tuple(part.shape[1:])
        if part.ndim == 3 and any(n * side != whole * cells for n, side, whole, cells in zip(
            grid, window, shape, own, strict=True
        )):
            raise ValueError(
                f"the condition has {grid[0]}x{grid[1]} codes, but shape is {shape[0]}x{shape[1]}"
                + (f"; a window of {window[0]}x{window[1]} sees {own[0]}x{own[1]}" if own != window else "")
            )


# ---- the order of the positions


Step = tuple[Tensor, list[Position]]  # logits (B or 2B, Q, V), and the Q positions that they belong to


def _one_by_one(
    transformer: CachedTransformer, view: View, codes: Tensor, guided: list[bool], todo: list[list[bool]],
    origins: list[list[Position]],
) -> Iterator[Step]:
    """Yield logits (B, 1, V) of one position after the other, over the cache while the window stays."""
    wh, ww = view.window
    caches: dict[bool, Any] = {}  # one for each number of halves
    current = None
    for i, row in enumerate(todo):
        for j in (j for j, wanted in enumerate(row) if wanted):
            both, (top, left) = guided[i * len(row) + j], origins[i][j]
            sequence, length = view.sequence(codes, (top, left), both)
            end = length + (i - top) * ww + j - left
            if both not in caches:
                caches[both] = transformer.new_cache(len(sequence), length + wh * ww - 1)
            cache = caches[both]
            if (top, left, both) != current:
                current, cache.length = (top, left, both), 0
            yield transformer.extend(sequence[:, cache.length : end], cache)[:, None], [(i, j)]


def _wavefront(
    transformer: CachedTransformer, view: View, codes: Tensor, guided: list[bool], todo: list[list[bool]],
    origins: list[list[Position]],
) -> Iterator[Step]:
    """Yield logits (B, Q, V) of all Q positions whose windows are complete, by one forward each time."""
    for positions in _dependency_levels(todo, origins, view.window):
        both = any(guided[i * len(todo[0]) + j] for i, j in positions)
        yield _logits_at(transformer, view, codes, both, positions, origins), positions


def _logits_at(
    transformer: CachedTransformer, view: View, codes: Tensor, both: bool, positions: list[Position],
    origins: list[list[Position]],
) -> Tensor:
    """Return logits (B or 2B, Q, V) of Q positions, each in its own window, by one forward."""
    parts, ends = [], []
    for i, j in positions:
        top, left = origins[i][j]
        sequence, length = view.sequence(codes, (top, left), both)
        parts.append(sequence)
        ends.append(length + (i - top) * view.window[1] + j - left)
    tokens = torch.stack(parts, dim=1)[:, :, : max(ends)]  # (B, Q, T); none sees those after it
    logits = transformer(tokens.flatten(0, 1))[0].view(*tokens.shape, -1)
    return logits[:, range(len(ends)), [end - 1 for end in ends]]


def _origins(height: int, width: int, window: Position, stride: int) -> list[list[Position]]:
    """Return the window's upper left corner for every position; it moves every `stride` columns."""
    wh, ww = window
    tops = [min(max(i - wh // 2, 0), height - wh) for i in range(height)]
    lefts = []
    for j in range(width):
        first = j - j % stride  # all positions before the window moves must lie in it
        lefts.append(min(max(first - min(ww // 2, ww - stride), 0), width - ww))
    return [[(top, left) for left in lefts] for top in tops]


def _dependency_levels(
    todo: list[list[bool]], origins: list[list[Position]], window: Position
) -> list[list[Position]]:
    """Group the positions to sample: each group depends only on groups before it."""
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


def kept_positions(
    shape: tuple[int, int, int], start: Position | None, known: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return which codes stay, (B, H, W)."""
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
        raise ValueError("the mask keeps every code: there is nothing to sample")
    return kept
