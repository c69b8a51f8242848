"""Codes of a picture of any size, drawn through a window that slides over a larger latent grid.

Esser et al. 2021, section 3.3: the transformer sees only as many codes as it was trained on, those of a
window around the next position. B batch, H W latent grid, N codes of a window, M condition tokens before
them, Q positions of a step, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from taming.sampling.decode import CachedTransformer, Generators, check_logits, uniform_numbers
from taming.sampling.filters import draw, filter_logits

Position = tuple[int, int]  # row, column


@torch.no_grad()
def sample_window(
    transformer: CachedTransformer, condition: Tensor, *, shape: tuple[int, int] | None = None,
    window: int | tuple[int, int] = 16, stride: int = 1, start: Position | None = None,
    known: Tensor | None = None, mask: Tensor | None = None, wavefront: bool = False,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, greedy: bool = False,
    generator: Generators = None, callback: Callable[[int, Tensor], None] | None = None,
    n_codes: int | None = None,
) -> Tensor:
    """Draw a grid of codes (B, H, W), each given the codes before it in a window that holds it.

    With `stride` 1 this is the rule of 2021: the position lies in the window's centre, or off it where the
    window would leave the grid. As long as the window stays, its keys and values do too.

    Args:
        transformer: the network, in eval mode.
        condition: a code for each position, (B, H, W), of which the transformer sees those of the window; or
            tokens that it sees in every window, (B, M), such as a class or a start token.
        shape: (H, W); needed where the condition is no grid.
        window: side, or (height, width), of the window that the transformer was trained on, in codes.
        stride: positions of a row that are drawn before the window moves; more is faster, and the last ones
            lie off the centre.
        start: the first position (row, column) to draw; those before it in raster order are known.
        known: codes (B, H, W) that are given, where `start` or `mask` say so.
        mask: True where known codes stay, (H, W) or (B, H, W).
        wavefront: draw in one batch all positions that do not see each other: the same codes in fewer steps,
            each of them a whole forward. For stride 1.
        temperature, top_k, top_p, greedy, n_codes: see `sample_tokens`.
        generator: one per image or a single one, see `sample_tokens`; a position's random number does not
            depend on the stride, the mask or the wavefront.
        callback: called after each step with its number (from 0) and the grid so far (B, H, W).

    Raises:
        ValueError: a grid smaller than the window, a window longer than the transformer's block, a condition
            or known codes of another size, nothing left to draw, or logits that are not numbers.
    """
    wh, ww = (window, window) if isinstance(window, int) else window
    height, width = _grid_shape(condition, shape, (wh, ww), stride, transformer.block_size)
    if wavefront and stride != 1:
        raise ValueError(f"wavefront draws with stride 1, not {stride}")
    batch_size, device = len(condition), condition.device
    kept = _kept_positions((batch_size, height, width), start, known, mask).to(device)  # (B, H, W)
    codes = torch.zeros(batch_size, height, width, dtype=torch.int64, device=device)
    if known is not None:
        codes = torch.where(kept, known.to(device), codes)
    numbers = torch.zeros(batch_size, height * width, dtype=torch.float64)
    if not greedy:
        numbers = uniform_numbers(batch_size, height * width, generator)
    numbers = numbers.to(device).view(batch_size, height, width)

    def put(logits: Tensor, i: Tensor, j: Tensor) -> None:
        """Draw the codes of a step, from logits (B, Q, V) at the Q positions i, j (Q,)."""
        if greedy:
            drawn = logits.argmax(-1)
        else:
            logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            drawn = draw(logits.flatten(0, 1), numbers[:, i, j].flatten()).view(logits.shape[:2])
        codes[:, i, j] = torch.where(kept[:, i, j], codes[:, i, j], drawn)

    todo = (~kept.all(0)).tolist()  # a position is drawn unless it is known in all images
    origins = _origins(height, width, (wh, ww), stride)
    steps = _waves if wavefront else _one_by_one
    for step, (logits, positions) in enumerate(steps(transformer, condition, codes, todo, origins, (wh, ww))):
        check_logits(logits, step, last=False)
        i, j = torch.tensor(positions, device=device).T
        put(logits[..., :n_codes], i, j)
        if callback is not None:
            callback(step, codes)
    return codes


Step = tuple[Tensor, list[Position]]  # logits (B, Q, V), and the Q positions that they belong to


def _one_by_one(transformer, condition, codes, todo, origins, window) -> Iterator[Step]:
    """Logits (B, 1, V) of one position after the other, over the cache while the window stays."""
    (wh, ww), current, cache = window, None, None
    for i, row in enumerate(todo):
        for j in (j for j, wanted in enumerate(row) if wanted):
            top, left = origins[i][j]
            sequence, length = _sequence(condition, codes, (top, left), window)
            end = length + (i - top) * ww + j - left
            if cache is None:
                cache = transformer.new_cache(len(codes), length + wh * ww - 1)
            if (top, left) != current:
                current, cache.length = (top, left), 0
            yield transformer.extend(sequence[:, cache.length : end], cache)[:, None], [(i, j)]


def _waves(transformer, condition, codes, todo, origins, window) -> Iterator[Step]:
    """Logits (B, Q, V) of all Q positions whose windows are complete, by a forward over padded sequences."""
    for positions in _levels(todo, origins, window):
        parts, ends = [], []
        for i, j in positions:
            top, left = origins[i][j]
            sequence, length = _sequence(condition, codes, (top, left), window)
            parts.append(sequence)
            ends.append(length + (i - top) * window[1] + j - left)
        tokens = torch.stack(parts, dim=1)[:, :, : max(ends)]  # (B, Q, T); none sees those after it
        logits = transformer(tokens.flatten(0, 1))[0].view(*tokens.shape, -1)
        yield logits[:, range(len(ends)), [end - 1 for end in ends]], positions


def _sequence(condition: Tensor, codes: Tensor, origin: Position, window: Position) -> tuple[Tensor, int]:
    """What the transformer reads at a window: condition and codes (B, M + N), and M."""
    rows, columns = (slice(first, first + side) for first, side in zip(origin, window, strict=True))
    prefix = condition[:, rows, columns].flatten(1) if condition.ndim == 3 else condition
    return torch.cat((prefix, codes[:, rows, columns].flatten(1)), dim=1), prefix.shape[1]


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


def _grid_shape(
    condition: Tensor, shape: Position | None, window: Position, stride: int, block_size: int
) -> Position:
    """Check sizes and return (H, W)."""
    grid = tuple(condition.shape[1:]) if condition.ndim == 3 else None
    if grid is None and shape is None:
        raise ValueError("shape=(H, W), in codes, is needed where the condition is no grid")
    if grid is not None and shape is not None and tuple(shape) != grid:
        raise ValueError(f"the condition has {grid[0]}x{grid[1]} codes, but shape is {shape[0]}x{shape[1]}")
    height, width = grid or shape
    wh, ww = window
    if height < wh or width < ww:
        raise ValueError(
            f"a grid of {height}x{width} codes is smaller than the window of {wh}x{ww}: "
            f"at least {max(height, wh)}x{max(width, ww)} are needed"
        )
    if not 1 <= stride <= ww:
        raise ValueError(f"stride = {stride} is outside 1..{ww}, the window's width")
    needed = wh * ww * (2 if grid else 1) + (0 if grid else condition.shape[1]) - 1
    if needed > block_size:
        raise ValueError(
            f"condition and codes of a window of {wh}x{ww} need a block size of {needed}; the transformer's "
            f"is {block_size}: take the window that it was trained on"
        )
    return height, width


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
