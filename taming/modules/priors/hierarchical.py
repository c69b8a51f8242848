"""A prior over codes at two levels: the coarse grid, then the fine one given the coarse one.

    p(codes | condition) = p(top | condition) p(bottom | top, condition)

Razavi et al. 2019, "Generating diverse high-fidelity images with VQ-VAE-2", section 3.2. B batch, N codes of
both grids, the coarse one first, each in raster order; M condition tokens, h w grid, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from taming.modules.priors.base import Prior
from taming.modules.transformer.positions import Part, part_length
from taming.parameters import Length, PositiveInt
from taming.sampling import Cancelled, SamplingOptions, image_generators
from taming.sampling.logits_sampler import Callback, Generators
from taming.sampling.window import Condition

Size = tuple[int, int]
Grids = list[Tensor]  # (B, h, w) each, the coarse one first


@dataclass(frozen=True)
class _Layout:
    """What the priors of both levels read.

    Attributes:
        parts: of the condition: numbers of tokens, and grids.
        grids: the coarse and the fine one.
        window: that of the bottom prior over the fine grid; the whole grid if there is none.
        windows: what it sees of each part and of the coarse grid; None for tokens.
    """

    parts: list[int | Size]
    grids: list[Size]
    window: Size
    windows: list[Size | None]

    @classmethod
    def of(cls, layout: Sequence[Part], bottom_window: Sequence[int] | None) -> "_Layout":
        """Read a layout, condition first, then both grids.

        Raises:
            ValueError: no two grids, or a window that covers parts of codes.
        """
        *parts, coarse, fine = [part if isinstance(part, int) else (part[0], part[1]) for part in layout]
        if isinstance(coarse, int) or isinstance(fine, int) or fine[0] % coarse[0] or fine[1] % coarse[1]:
            raise ValueError(f"layout: {list(layout)} must end in a grid and one finer by whole factors")
        if bottom_window is not None and len(bottom_window) != 2:
            raise ValueError(f"bottom_window: {list(bottom_window)} must be [height, width], in fine codes")
        (height, width), (h, w) = fine, bottom_window or fine
        h, w = min(h, height), min(w, width)
        windows: list[Size | None] = []
        for part in (*parts, coarse):
            if isinstance(part, int):
                windows.append(None)
                continue
            if min(h, w) < 1 or part[0] * h % height or part[1] * w % width:
                raise ValueError(
                    f"bottom_window: {h}x{w} of {height}x{width} codes does not cover whole codes of the "
                    f"grid of {part[0]}x{part[1]}: give multiples of {height // part[0]}x{width // part[1]}"
                )
            windows.append((part[0] * h // height, part[1] * w // width))
        return cls(parts, [coarse, fine], (h, w), windows)

    def sequences(self) -> dict[str, list[Part]]:
        """Return the parts of the sequence of each prior, without a start token."""
        conditions = [*self.parts, self.grids[0]]
        seen = [window or part for part, window in zip(conditions, self.windows, strict=True)]
        return {
            name: [part if isinstance(part, int) else list(part) for part in parts]
            for name, parts in {"top": conditions, "bottom": [*seen, self.window]}.items()
        }


class HierarchicalPrior(Prior):
    """Two priors of one level each: `top` over the coarse grid, `bottom` over the fine one.

    The bottom prior reads the coarse grid as one condition more, the last. The two share no parameters: to
    train them together is to train them apart. Both read the condition of the model; without one, the top
    prior begins at the start token, the bottom prior at the coarse grid.

    Args:
        vocab_size: V of both priors.
        layout: the parts of the sequence: 1 for a class, [h, w] for a grid of condition codes, and last the
            grids of both levels. A model that is built with its stages takes it from them.
        top, bottom: the priors; in a configuration `{target, params}` of them, whose `vocab_size`, `layout`
            and `block_size` follow from the others here (`sequences`).
        bottom_window: (h, w) of a window over the fine grid, at most, where a sequence of both grids would be
            too long. The bottom prior then reads the codes of the window and the coarse codes above it. It
            is trained on one window of each image, at a random place, and samples by a sliding window.

    Raises:
        ValueError: a layout without two grids, a prior of several levels or with a vocabulary of its own for
            conditions, a block size that is too short, a window that does not fit the grids.
    """

    on_grid = True
    levels = 2

    def __init__(
        self, vocab_size: PositiveInt, layout: Sequence[Part], top: Prior, bottom: Prior,
        bottom_window: Annotated[Sequence[PositiveInt], Length(2)] | None = None,
    ):
        super().__init__()
        laid_out = _Layout.of(layout, bottom_window)
        self.parts, self.grids, self.window = laid_out.parts, laid_out.grids, laid_out.window
        self.windows, self.has_window = laid_out.windows, laid_out.window != laid_out.grids[1]
        self.vocab_size, self.top, self.bottom = vocab_size, top, bottom
        self.num_condition = sum(map(part_length, self.parts)) or 1  # without a condition, one start token
        self.block_size = self.num_condition + sum(map(part_length, self.grids)) - 1
        for name, parts in laid_out.sequences().items():
            self._check(name, getattr(self, name), parts)

    @staticmethod
    def sequences(
        layout: Sequence[Part], bottom_window: Sequence[int] | None = None
    ) -> dict[str, list[Part]]:
        """Return the parts of the sequences that the priors read, by their names, without a start token."""
        return _Layout.of(layout, bottom_window).sequences()

    def _check(self, name: str, prior: Prior, parts: Sequence[Part]) -> None:
        """Raise ValueError unless a prior fits the sequence of its level."""
        if not isinstance(prior, Prior) or prior.levels != 1 or prior.condition_vocab_size is not None:
            raise ValueError(
                f"{name}: {type(prior).__name__} is not a prior over one grid whose codes and conditions "
                "share a vocabulary: take taming.modules.transformer.mingpt.GPT, for instance"
            )
        if prior.vocab_size < self.vocab_size:
            raise ValueError(
                f"{name}.params.vocab_size: {prior.vocab_size} is below vocab_size: {self.vocab_size}"
            )
        start = 0 if len(parts) > 1 or prior.on_grid else 1
        needed = start + sum(map(part_length, parts)) - 1
        if prior.block_size < needed:
            raise ValueError(
                f"{name}.params.block_size: {prior.block_size} is too short for {list(parts)}, the condition "
                f"and then the codes: leave it out, or give {needed}"
                + ("; or let a window slide over the fine grid, bottom_window" if name == "bottom" else "")
            )

    def set_batches_seen(self, batches: int) -> None:
        """Tell both priors."""
        self.top.set_batches_seen(batches)
        self.bottom.set_batches_seen(batches)

    # ---- likelihood

    def code_logits(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Return logits (B, N, V) of codes (B, N), as `AutoregressivePrior.code_logits` does.

        Raises:
            ValueError: there is a window, in which a code has other logits than in another one.
        """
        if self.has_window:
            raise ValueError("with bottom_window there are no logits of whole grids: see log_prob")
        top, bottom = self._split(codes)
        priors: Any = self.top, self.bottom
        return torch.cat((
            priors[0].code_logits(top, condition), priors[1].code_logits(bottom, self._given(condition, top)),
        ), dim=1)

    def log_prob(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return log p of each code (B, N), in nats; with a window, under the rule by which it samples.

        `inputs` are not read there: training, which replaces codes, has one window of each image; see `loss`.
        """
        top, bottom = self._split(codes)
        read = [None, None] if inputs is None else self._split(inputs)
        coarse = self.top.log_prob(top, condition, read[0])
        if not self.has_window:
            fine = self.bottom.log_prob(bottom, self._given(condition, top), read[1])
            return torch.cat((coarse, fine), dim=1)
        fine = -self.bottom.window_nll(
            [*self._parts(condition), _as_grid(top, self.grids[0])], _as_grid(bottom, self.grids[1]),
            window=self.window, condition_windows=self.windows,
        )
        return torch.cat((coarse, fine.flatten(1)), dim=1)

    def loss(self, codes: Tensor, condition: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return the mean over both grids of what the priors minimize, (), in nats per code.

        With a window, that of the fine grid is estimated: in training from one window of each image, else
        from windows side by side.
        """
        top, bottom = self._split(codes)
        read = [None, None] if inputs is None else self._split(inputs)
        coarse = self.top.loss(top, condition, read[0])
        if not self.has_window:
            fine = self.bottom.loss(bottom, self._given(condition, top), read[1])
        else:
            grids = [*self._parts(condition), _as_grid(top, self.grids[0])]
            places = self._random_places(codes) if self.training else self._tiles(codes)
            losses = [
                self.bottom.loss(
                    self._cut(bottom, place),
                    torch.cat([
                        part if own is None else _cut(part, self._place_in(place, own), own)
                        for part, own in zip(grids, self.windows, strict=True)
                    ], dim=1),
                    None if read[1] is None else self._cut(read[1], place),
                )
                for place in places
            ]
            fine = torch.stack(losses).mean()
        share = part_length(self.grids[0]) / sum(map(part_length, self.grids))
        return share * coarse + (1.0 - share) * fine

    def _random_places(self, codes: Tensor) -> list[Tensor]:
        """Return the upper left corner of one window for each image, (B, 2)."""
        room = [whole - side + 1 for whole, side in zip(self.grids[1], self.window, strict=True)]
        corners = [torch.randint(n, (len(codes),), device=codes.device) for n in room]
        return [torch.stack(corners, dim=1)]

    def _tiles(self, codes: Tensor) -> list[Tensor]:
        """Return the corners (B, 2) of windows side by side; the last ones end with the grid."""
        rows, columns = (
            sorted({min(start, whole - side) for start in range(0, whole, side)})
            for whole, side in zip(self.grids[1], self.window, strict=True)
        )
        return [codes.new_tensor([[row, column]]).expand(len(codes), 2) for row in rows for column in columns]

    def _place_in(self, place: Tensor, own: Size) -> Tensor:
        """Return where a window of the fine grid begins in another grid, as `sample_window` does."""
        return place * place.new_tensor(own) // place.new_tensor(self.window)

    def _cut(self, bottom: Tensor, place: Tensor) -> Tensor:
        return _cut(_as_grid(bottom, self.grids[1]), place, self.window)

    def window_nll(  # type: ignore[override]  # arguments are named
        self, condition: Condition, codes: Any, *, window: Any,
        condition_windows: Sequence[Size | None] | None = None,
    ) -> Any:
        """Return the nats of each code of both grids, a list; see `Prior.window_nll`."""
        parts = _as_parts(condition)
        coarse, fine = codes
        return [
            self.top.window_nll(parts, coarse, window=window[0], condition_windows=condition_windows),
            self.bottom.window_nll(
                [*(parts if self.parts else []), coarse], fine, window=self.window,
                condition_windows=self._bottom_windows(condition_windows),
            ),
        ]

    # ---- sampling

    def sample(  # type: ignore[override]  # no known codes: they are at two levels
        self, condition: Tensor, shape: Any, options: SamplingOptions | None = None, *,
        null_condition: Tensor | None = None, generator: Generators = None,
        callback: Callback | None = None, codebook_size: int | None = None,
    ) -> Tensor:
        """Sample codes (B, N), the coarse grid first; `shape` are both grids. See `Prior.sample`.

        Schedules of the options begin anew with the fine grid. The callback sees the codes of both grids.
        """
        options = options or SamplingOptions()
        generator = _generators(generator, options, len(condition))
        arguments: dict[str, Any] = {"generator": generator, "codebook_size": codebook_size}
        watch = _Watch(callback)
        top = watch.over(lambda callback: self.top.sample(
            condition, shape[0], options, null_condition=null_condition, callback=callback, **arguments
        ))
        null = None
        if null_condition is not None:
            null = self._given(null_condition.expand(len(top), -1), top)

        def sample_bottom(callback: Callback) -> Tensor:
            if not self.has_window:
                given = self._given(condition, top)
                return self.bottom.sample(
                    given, shape[1], options, null_condition=null, callback=callback, **arguments
                )
            coarse = _as_grid(top, self.grids[0])
            nulls = None if null_condition is None else [
                *self._parts(null_condition.expand(len(top), -1)), coarse
            ]
            return self.bottom.sample_window(
                [*self._parts(condition), coarse], options, shape=shape[1], window=self.window,
                condition_windows=self.windows, null_condition=nulls, callback=callback, **arguments,
            ).flatten(1)

        return torch.cat((top, watch.over(sample_bottom, before=top)), dim=1)

    def sample_window(  # type: ignore[override]  # arguments are named
        self, condition: Condition, options: SamplingOptions | None = None, *, shape: Any, window: Any,
        condition_windows: Sequence[Size | None] | None = None, known: Any = None, mask: Tensor | None = None,
        null_condition: Condition | None = None, generator: Generators = None,
        callback: Callback | None = None, codebook_size: int | None = None, **changes: Any,
    ) -> Any:
        """Sample both grids, [(B, h, w), (B, H, W)], of any size, each through its window.

        Args:
            shape, window, known: as `taming.sampling.sample_window` takes them, of both grids: lists.
            mask: True where codes stay, (B, h, w) or (h, w) of the coarse grid, and all that is below them.
            condition, options, condition_windows, null_condition, generator, callback, codebook_size: see
                there. The callback sees the codes of both grids, (B, N), 0 where there are none yet.

        Raises:
            ValueError: conditions that change with the window; and see there.
        """
        parts, options = _as_parts(condition), (options or SamplingOptions()).replace(**changes)
        batch_size, fine_codes = len(parts[0]), math.prod(shape[1])
        generator = _generators(generator, options, batch_size)
        nulls = None if null_condition is None else [
            part.expand(batch_size, *part.shape[1:]) for part in _as_parts(null_condition)
        ]
        masks: list[Tensor | None] = [mask, None]
        if mask is not None:
            factors = [n // m for n, m in zip(shape[1], shape[0], strict=True)]
            masks[1] = mask.repeat_interleave(factors[0], -2).repeat_interleave(factors[1], -1)
        arguments: dict[str, Any] = {"generator": generator, "codebook_size": codebook_size}
        if known is not None and not (isinstance(known, list) and len(known) == 2):
            raise ValueError("known codes are those of both grids, a list, the coarse one first")
        known, watch = known or [None, None], _Watch(callback)

        def sample_top(callback: Callback) -> Tensor:
            return self.top.sample_window(
                parts, options, shape=shape[0], window=window[0], condition_windows=condition_windows,
                known=known[0], mask=mask, null_condition=nulls, callback=callback, **arguments,
            )

        nothing = parts[0].new_zeros(batch_size, fine_codes)
        coarse = watch.over(sample_top, after=nothing)

        def sample_bottom(callback: Callback) -> Tensor:
            return self.bottom.sample_window(
                [*(parts if self.parts else []), coarse], options, shape=shape[1], window=self.window,
                condition_windows=self._bottom_windows(condition_windows), known=known[1], mask=masks[1],
                null_condition=None if nulls is None or not self.parts else [*nulls, coarse],
                callback=callback, **arguments,
            )

        return [coarse, watch.over(sample_bottom, before=coarse.flatten(1))]

    # ---- sequences

    def _split(self, codes: Tensor) -> list[Tensor]:
        """Split codes (B, N) into those of both grids."""
        return list(codes.split([part_length(grid) for grid in self.grids], dim=1))

    def _given(self, condition: Tensor, top: Tensor) -> Tensor:
        """Return what the bottom prior reads first: the condition, if there is one, and the coarse codes."""
        return torch.cat((condition, top), dim=1) if self.parts else top

    def _parts(self, condition: Tensor) -> list[Tensor]:
        """Split condition tokens (B, M) into parts, (B, M_i) or (B, h, w); none of a start token."""
        if not self.parts:
            return []
        tokens = condition.split([part_length(part) for part in self.parts], dim=1)
        pairs = zip(tokens, self.parts, strict=True)
        return [each if isinstance(part, int) else _as_grid(each, part) for each, part in pairs]

    def _bottom_windows(self, windows: Sequence[Size | None] | None) -> list[Size | None]:
        """Return what a window of the fine grid sees of each condition, and of the coarse grid.

        `windows` are what the whole training grid sees.
        """
        (height, width), (h, w) = self.grids[1], self.window
        own = [each and (each[0] * h // height, each[1] * w // width) for each in windows or ()]
        return [*(own if self.parts else []), self.windows[-1]]


def _as_grid(codes: Tensor, grid: Size) -> Tensor:
    return codes.reshape(-1, *grid)


def _as_parts(condition: Condition) -> list[Tensor]:
    if callable(condition):
        raise ValueError(
            "conditions that change with the window are for priors of one level: give the whole layout "
            "(`taming scenes --layout whole`)"
        )
    return [condition] if isinstance(condition, Tensor) else list(condition)


def _cut(grid: Tensor, place: Tensor, size: Size) -> Tensor:
    """Return windows of grids (B, H, W) that begin at places (B, 2): (B, h * w)."""
    rows, columns = (place[:, i, None] + torch.arange(size[i], device=grid.device) for i in (0, 1))
    images = torch.arange(len(grid), device=grid.device)[:, None, None]
    return grid[images, rows[:, :, None], columns[:, None, :]].flatten(1)


def _generators(generator: Generators, options: SamplingOptions, batch_size: int) -> Generators:
    """Return the generators that both levels go on with: a seed alone would give both the same numbers."""
    if generator is None and options.seed is not None:
        return image_generators(options.seed, range(batch_size))
    return generator


class _Watch:
    """Tells one callback of the steps of several samplers, with the codes of both grids (B, N)."""

    def __init__(self, callback: Callback | None):
        self.callback, self.steps = callback, 0

    def over(
        self, sample: Callable[[Callback], Tensor], before: Tensor | None = None, after: Tensor | None = None
    ) -> Tensor:
        """Sample; the callback sees the codes between those before and after them."""
        done = self.steps

        def joined(codes: Tensor) -> Tensor:
            each = (before, codes.flatten(1), after)
            return torch.cat([part for part in each if part is not None], dim=1)

        def of_both(step: int, codes: Tensor) -> object:
            self.steps = done + step + 1
            return self.callback is None or self.callback(done + step, joined(codes))

        try:
            return sample(of_both)
        except Cancelled as stop:
            raise Cancelled(done + stop.step, joined(stop.codes)) from None
