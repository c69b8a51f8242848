"""Sampling of masked units: how many are decided in each step, which ones, and that rows are independent."""

import itertools
import math

import pytest
import torch

from taming.sampling import (
    Cancelled,
    Linear,
    SamplingOptions,
    halton_order,
    image_generators,
    sample_masked,
    sample_masked_window,
)
from taming.sampling.schedules import MASK_SCHEDULES, num_masked

V = 5


def table(count, size=1, seed=0):
    """Logits (B, U, V) that differ by row and unit."""
    return torch.randn(size, count, V, generator=torch.Generator().manual_seed(seed))


def run(logits, options, masked=None, units=None, **arguments):
    size, count = logits.shape[:2]
    masked = torch.ones(size, count, dtype=torch.bool) if masked is None else masked
    units = torch.zeros(size, count, dtype=torch.int64) if units is None else units
    return sample_masked(
        lambda units, masked, guided: logits, units, masked, options, has_null=False, **arguments
    )


@pytest.mark.parametrize("name", MASK_SCHEDULES)
def test_schedules_fall_from_all_to_none(name):
    shares = MASK_SCHEDULES[name](torch.linspace(0, 1, 11, dtype=torch.float64))
    assert shares[0] == 1 and abs(shares[-1]) < 1e-12 and (shares.diff() < 0).all()


def test_schedules_by_their_values():
    half = torch.tensor(0.5, dtype=torch.float64)
    values = {name: float(schedule(half)) for name, schedule in MASK_SCHEDULES.items()}
    assert values == pytest.approx({
        "cosine": math.sqrt(0.5), "arccos": 2 / 3, "linear": 0.5, "square": 0.75, "cubic": 0.875,
        "root": 1 - math.sqrt(0.5),
    })


@pytest.mark.parametrize("name", MASK_SCHEDULES)
@pytest.mark.parametrize(("count", "steps"), [(16, 4), (24, 24), (7, 3), (1, 1), (5, 2), (64, 12)])
def test_each_step_decides_something_and_the_last_one_all(name, count, steps):
    left, units = torch.tensor([count]), torch.tensor([count])
    trace = [count]
    for step in range(steps):
        left = num_masked(name, torch.tensor([steps]), step, units, left)
        trace.append(int(left))
    assert trace[-1] == 0 and all(a > b for a, b in itertools.pairwise(trace))
    progress = torch.arange(1, steps, dtype=torch.float64) / steps
    want = (count * MASK_SCHEDULES[name](progress)).tolist()
    assert all(  # as the schedule says, unless a step would have nothing to do
        math.floor(share + 1e-9) == left or left in (trace[i] - 1, steps - 1 - i)
        for i, (share, left) in enumerate(zip(want, trace[1:], strict=False))
    )
    if name == "linear" and count % steps == 0:
        assert trace == [count - i * count // steps for i in range(steps + 1)]


def test_the_most_certain_units_are_kept_first():
    logits, seen = table(9), []
    codes = run(logits, SamplingOptions(greedy=True, steps=3, mask_schedule="linear"),
                watch=lambda units, masked: seen.append(masked[0].clone()))
    assert torch.equal(codes, logits.argmax(-1))
    certain = logits.log_softmax(-1).amax(-1)[0].argsort(descending=True)
    for i, masked in enumerate(seen):
        assert set(certain[: 3 * (i + 1)].tolist()) == set((~masked).nonzero()[:, 0].tolist())


def test_logits_or_probabilities_decide_who_is_certain():
    logits = torch.zeros(1, 2, V)
    logits[0, 0] = 5.0  # high, and all the same
    logits[0, 1, 2] = 4.0
    first = []
    for by_logit in (False, True):
        seen = []
        run(logits, SamplingOptions(greedy=True, steps=2), by_logit=by_logit,
            watch=lambda units, masked, seen=seen: seen.append(masked[0].tolist()))
        first.append(seen[0])
    assert first == [[True, False], [False, True]]


def test_an_order_takes_the_place_of_certainty():
    order, seen = torch.tensor([2, 0, 3, 1]), []
    run(table(4), SamplingOptions(steps=4, mask_schedule="linear", seed=0), order=order,
        watch=lambda units, masked: seen.append(masked[0].tolist()))
    assert seen == [
        [True, False, True, True], [True, False, True, False], [False, False, True, False], [False] * 4
    ]


def test_noise_falls_to_nothing_and_changes_the_order():
    logits = torch.zeros(1, 400, V)
    logits[:, :200, 0] = 3.0  # certain; the others are not

    def first(temperature):
        seen = []
        run(logits, SamplingOptions(steps=2, mask_schedule="linear", top_k=1, seed=0,
                                    mask_temperature=temperature),
            watch=lambda units, masked: seen.append(masked[0]))
        return int((~seen[0][:200]).sum())

    assert first(0.0) == 200
    assert 110 < first(2.0) < 190  # half of the noise is left after one step of two
    assert 85 < first(1000.0) < 115


def test_samples_follow_their_distribution():
    logits = table(1).expand(1, 4000, V)
    codes = run(logits, SamplingOptions(steps=3, seed=1), order=torch.arange(4000))
    shares = torch.bincount(codes[0], minlength=V) / 4000
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), atol=0.03, rtol=0)
    some = run(logits, SamplingOptions(steps=3, seed=1, top_k=2))
    assert set(some[0].tolist()) == set(logits[0, 0].topk(2).indices.tolist())
    cut = run(logits, SamplingOptions(steps=3, seed=1), vocabulary=3)
    assert cut.max() == 2


@pytest.mark.parametrize("order", [None, torch.arange(12).flip(0)])
def test_a_row_does_not_depend_on_its_batch(order):
    """Rows have different numbers of masked units, one of them fewer than steps, and one none."""
    logits, options = table(12, size=4), SamplingOptions(steps=5, mask_temperature=1.0)
    masked = torch.rand(4, 12, generator=torch.Generator().manual_seed(3)) < 0.7
    masked[1], masked[2] = torch.arange(12) < 2, False
    given = torch.arange(48).view(4, 12) % V
    together = run(logits, options, masked, given, order=order, generator=image_generators(7, range(4)))
    assert torch.equal(together[~masked], given[~masked])
    for i in range(4):
        row = slice(i, i + 1)
        alone = run(logits[row], options, masked[row], given[row], order=order,
                    generator=image_generators(7, [i]))
        assert torch.equal(alone, together[row])
    by_seed = run(logits, options.replace(seed=7), masked, given, order=order)
    assert torch.equal(by_seed, together)
    other = run(logits, options.replace(seed=8), masked, given, order=order)
    assert not torch.equal(other, together)


def test_guidance_and_its_schedule_are_asked_by_the_step():
    given, null, halves = table(6), table(6, seed=1), []

    def predict(units, masked, guided):
        halves.append(guided)
        return torch.cat((given, null)) if guided else given

    units, masked = torch.zeros(1, 6, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool)
    options = SamplingOptions(greedy=True, steps=3, mask_schedule="linear", guidance=Linear(1.0, 5.0, 3))
    codes = sample_masked(predict, units, masked, options, has_null=True, order=torch.arange(6))
    assert halves == [False, True, True]
    want = [(null + scale * (given - null)).argmax(-1)[0, 2 * i : 2 * i + 2] for i, scale in
            enumerate((1.0, 3.0, 5.0))]
    assert torch.equal(codes[0], torch.cat(want))
    with pytest.raises(ValueError, match="guidance of 3 needs null tokens"):
        run(given, options)


@pytest.mark.parametrize(("change", "message"), [
    ({"mask_schedule": "sine"}, "mask_schedule is 'sine': give one of cosine, arccos"),
    ({"temperature": lambda step: 1.0 - step}, "temperature must be above 0"),
])
def test_bad_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(table(4), SamplingOptions(**change))


@pytest.mark.parametrize(("change", "message"), [
    ({"steps": 0}, "steps is 0: give 1 or more"),
    ({"mask_temperature": -1.0}, "mask_temperature is -1: give 0 or more"),
    ({"mask_order": "spiral"}, "mask_order is 'spiral': give one of confidence, halton"),
    ({"mask_schedule": "sine"}, "mask_schedule is 'sine': give one of cosine"),
])
def test_options_are_checked_before_anything_is_loaded(change, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**change).check()


def test_broken_logits_are_named():
    with pytest.raises(ValueError, match="logits of step 0 are NaN"):
        run(table(4) * math.nan, SamplingOptions())


@pytest.mark.parametrize("shape", [(4, 6), (1, 7), (16, 16), (5, 1)])
def test_halton_order_holds_each_position_once(shape):
    order = halton_order(*shape)
    assert sorted(order.flatten().tolist()) == list(range(shape[0] * shape[1]))


def test_halton_order_covers_the_grid_evenly():
    order = halton_order(16, 16)
    first = (order < 16).view(4, 4, 4, 4).sum((1, 3))  # of the first 16, in each quarter of a quarter
    assert first.max() <= 2 and (first > 0).sum() >= 12


# ---- windows


def fill(codes, masked, condition, options, *, null_condition, shape, generator, callback):
    """Code = 10 * the class + how many codes were known; so it shows what a window saw."""
    known = (~masked).sum(1, keepdim=True)
    new = torch.where(masked, 10 * condition + known, codes)
    if callback is not None:
        callback(codes.shape[1] - 1, new)
    return new


def window(shape, **arguments):
    return sample_masked_window(
        fill, 100, torch.tensor([[1], [2]]), shape=shape, window=(2, 4), **arguments
    )


def test_windows_follow_in_raster_order_and_keep_what_is_there():
    codes = window((2, 8))
    assert codes[0].tolist() == [[10, 10, 10, 10, 14, 14, 14, 14]] * 2  # moves by 2, half of its width
    assert torch.equal(codes[1], codes[0] + 10)
    assert window((2, 8), options=SamplingOptions(stride=4))[0, 0].tolist() == [10] * 8
    assert window((2, 7), options=SamplingOptions(stride=4))[0, 0].tolist() == [10] * 4 + [12] * 3
    down = window((4, 4))
    assert down[0].tolist() == [[10] * 4] * 2 + [[14] * 4] * 2  # moves by 1 row


def test_known_codes_stay_and_are_seen():
    known = torch.full((2, 2, 8), 3)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 6:] = True
    codes = window((2, 8), known=known, mask=mask)
    assert (codes[:, mask] == 3).all()
    assert codes[0, 0].tolist() == [10] * 4 + [14, 14, 3, 3]
    assert codes[0, 1].tolist() == [10] * 4 + [14, 14, 16, 16]


def test_callbacks_see_the_grid_and_can_stop():
    seen = []
    window((2, 8), callback=lambda step, codes: seen.append((step, codes.clone())))
    assert [step for step, _ in seen] == [7, 11, 15]
    assert seen[0][1][0].tolist() == [[10] * 4 + [-1] * 4] * 2 and seen[2][1].min() >= 0
    with pytest.raises(Cancelled) as stopped:
        window((2, 8), callback=lambda step, codes: step < 11)
    assert stopped.value.codes.shape == (2, 2, 8) and (stopped.value.codes == -1).sum() == 8


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(shape=(2, 3)), "smaller than the window of 2x4"),
    (dict(shape=(2, 8), options=SamplingOptions(wavefront=True)), "a wavefront is for priors that sample"),
    (dict(shape=(2, 8), options=SamplingOptions(stride=5)), "stride = 5 is outside 1..4"),
    (dict(shape=(2, 8), mask=torch.ones(2, 8)), "give known="),
])
def test_what_no_window_can_do_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        window(**arguments)
