"""Sampling of masked priors: all codes at once, in a few steps, each of which keeps the most certain ones.

Chang et al. 2022, "MaskGIT: masked generative image transformer", section 3.2. B batch, U units that are
masked each on its own (codes, or groups of bits of a code), V values of a unit, S steps, H W grid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taming.sampling.logits_sampler import (
    Callback,
    Generators,
    LogitsSampler,
    check_logits,
    image_generators,
    report,
    uniform_numbers,
)
from taming.sampling.options import SamplingOptions, resolve
from taming.sampling.schedules import num_masked
from taming.sampling.window import Condition, Position, kept_positions, window_view

# units (B, U), which of them are masked (B, U), whether with guidance -> logits (B, U, V), or (2B, U, V) with
# those of null tokens last
Predict = Callable[[Tensor, Tensor, bool], Tensor]
UNDECIDED = -1  # what a callback sees where a code is still masked


@torch.no_grad()
def sample_masked(
    predict: Predict, units: Tensor, masked: Tensor, options: SamplingOptions, *, has_null: bool,
    vocabulary: int | None = None, by_logit: bool = False, order: Tensor | None = None,
    generator: Generators = None, watch: Callable[[Tensor, Tensor], object] | None = None,
) -> Tensor:
    """Sample the masked ones of units (B, U) in `options.steps` steps, and return all units.

    Each step samples every masked unit from its own distribution, and keeps some, as many as
    `options.mask_schedule` says: those with the highest log p + t (1 - progress) g, where t is
    `options.mask_temperature` and g is Gumbel noise; without noise if `options.greedy`. All others are masked
    again. A row with fewer masked units than steps takes one step for each unit. Schedules of temperature and
    guidance are asked for the number of the step. Each row has its own random numbers, and does not depend
    on the batch it is in.

    Args:
        predict: the network, in eval mode.
        units: (B, U) int64; values where they are masked do not count.
        masked: (B, U) bool.
        options: see `SamplingOptions`.
        has_null: whether `predict` can give logits of null tokens.
        vocabulary: sample among the first so many values only.
        by_logit: compare logits in place of log p, as Yu et al. 2024 ("TiTok") do.
        order: (U,), decide on units with lower numbers first, in place of the most certain ones.
        generator: see `sample_tokens`.
        watch: called after each step with the units and which are still masked.

    Raises:
        ValueError: options out of range, guidance without null tokens, or logits that are NaN.
    """
    size, count = units.shape
    generator = _generators(generator, options, size)
    unknown, budget = masked.sum(1), min(options.steps, count)  # (B,)
    steps = unknown.clamp(max=budget)  # (B,)
    total = int(steps.max())
    sample = LogitsSampler(
        size, budget, units.device, options, has_null=has_null, generator=generator,
        codebook_size=vocabulary, codes_per_step=count,
    )
    noise = None
    if order is None and not options.greedy and options.mask_temperature > 0:
        uniform = uniform_numbers(size, budget * count, generator).clamp(min=1e-12)
        noise = -(-uniform.log()).log().view(size, budget, count).to(units.device)  # Gumbel
    for step in range(total):
        logits = predict(units, masked, sample.guided[step])  # (B, U, V), or (2B, U, V)
        check_logits(logits, step, last=step == total - 1)
        logits = sample.guide(logits, slice(step, step + 1))  # (B, U, V)
        units = torch.where(masked, sample.choose(logits, slice(step, step + 1)), units)
        if order is None:
            scores = logits.float() if by_logit else logits.float().log_softmax(-1)
            certainty = scores.gather(-1, units.clamp(max=logits.shape[-1] - 1)[..., None])[..., 0].double()
            if noise is not None:
                heat = options.mask_temperature * (1 - (step + 1) / steps.clamp(min=1)).clamp(min=0)  # (B,)
                certainty = certainty + heat[:, None] * noise[:, step]
        else:
            certainty = -order.expand(size, -1).double()
        certainty = certainty.masked_fill(~masked, torch.inf)  # what is decided stays
        rank = certainty.argsort(dim=1, stable=True).argsort(1)  # the least certain first
        left = num_masked(options.mask_schedule, steps.clamp(min=1), step, unknown, masked.sum(1))
        masked = masked & (rank < left[:, None])
        if watch is not None:
            watch(units, masked)
    return units


def _generators(generator: Generators, options: SamplingOptions, size: int) -> Generators:
    """Return generators of the seed where none are given, so that all draws of a row are of one stream."""
    if generator is None and options.seed is not None:
        return image_generators(options.seed, range(size))
    return generator


def halton_order(height: int, width: int) -> Tensor:
    """Return the rank (H, W), int64, of each position of a grid along a Halton sequence.

    Any first so many positions cover the grid evenly, so that positions that are decided in the same step are
    far from each other (Besnier et al. 2025, "Halton scheduler for masked generative image transformer").
    """
    rank = torch.full((height, width), -1)
    found, i = 0, 0
    while found < height * width:
        row, column = int(_radical_inverse(i, 2) * height), int(_radical_inverse(i, 3) * width)
        if rank[row, column] < 0:
            rank[row, column] = found
            found += 1
        i += 1
    return rank


def _radical_inverse(number: int, base: int) -> float:
    """Mirror the digits of a number at the point: 6 = 110 in base 2 becomes 0.011 = 0.375."""
    value, place = 0.0, 1.0 / base
    while number:
        number, digit = divmod(number, base)
        value += digit * place
        place /= base
    return value


# a masked prior: codes (B, N), which of them are masked (B, N), condition and null tokens (B, M) -> codes
Fill = Callable[..., Tensor]


@torch.no_grad()
def sample_masked_window(
    fill: Fill, block_size: int, condition: Condition, options: SamplingOptions | None = None, *,
    shape: Position | None = None, window: int | Position = 16,
    condition_windows: list[Position | None] | None = None, start: Position | None = None,
    known: Tensor | None = None, mask: Tensor | None = None, null_condition: Condition | None = None,
    generator: Generators = None, callback: Callback | None = None, **changes: Any,
) -> Tensor:
    """Sample a grid of codes (B, H, W) by a masked prior, window by window.

    Windows of the training size follow each other in raster order. Each keeps what earlier ones, or the
    caller, have given, and decides on the rest in `options.steps` steps. It moves by `options.stride` codes,
    but at least by half of its side.

    Args:
        fill: samples the masked codes of a window: (codes (B, N), masked (B, N), condition (B, M),
            options, *, null_condition, shape, generator, callback) -> codes (B, N).
        block_size: of the prior; see `Prior`.
        condition, options, shape, window, condition_windows, start, known, mask, null_condition, generator:
            see `sample_window`.
        callback: called after each step with the number of codes that are decided in all images, minus 1, and
            the grid so far (B, H, W), `UNDECIDED` where a code is masked.

    Raises:
        ValueError: see `sample_window`; a wavefront.
        Cancelled: by the callback.
    """
    options = resolve(options, changes)
    if options.wavefront:
        raise ValueError("a wavefront is for priors that sample code by code: leave it out")
    view = window_view(
        block_size, condition, null_condition, shape, window, condition_windows, options.stride
    )
    size, (height, width), (wh, ww) = view.batch_size, view.shape, view.window
    masked = ~kept_positions((size, height, width), start, known, mask).to(view.device)  # (B, H, W)
    codes = torch.zeros(size, height, width, dtype=torch.int64, device=view.device)
    if known is not None:
        codes = torch.where(masked, codes, known.to(view.device))
    generator = _generators(generator, options, size)
    given = int((~masked).sum((1, 2)).min())
    for top in _starts(height, wh, max(options.stride, wh // 2)):
        for left in _starts(width, ww, max(options.stride, ww // 2)):
            place = slice(None), slice(top, top + wh), slice(left, left + ww)
            inside, unknown = codes[place].flatten(1), masked[place].flatten(1)
            if not unknown.any():
                continue

            def watch(step: int, inside: Tensor, place: Any = place) -> None:
                grid, left = codes.clone(), masked.clone()
                grid[place], left[place] = inside.view(size, wh, ww), inside.view(size, wh, ww) == UNDECIDED
                report_masked(callback, grid, left, given)

            origin = (top, left)
            null = None if view.null_at is None else view.null_at(origin).expand(size, -1)
            codes[place] = fill(
                inside, unknown, view.condition_at(origin).expand(size, -1), options, null_condition=null,
                shape=(wh, ww), generator=generator, callback=callback and watch,
            ).view(size, wh, ww)
            masked[place] = False
    return codes


def _starts(length: int, window: int, step: int) -> list[int]:
    """Return where windows begin along a side, the last one at its end."""
    return [*range(0, length - window, step), length - window]


def report_masked(callback: Callback | None, codes: Tensor, masked: Tensor, given: int) -> None:
    """Call the callback with codes (B, ...) of which some are masked; `given` of each were known before."""
    if callback is not None:
        done = int((~masked).flatten(1).sum(1).min()) - given
        report(callback, max(done - 1, 0), codes.masked_fill(masked, UNDECIDED))
