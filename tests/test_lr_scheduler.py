"""Schedules: golden multipliers, the corners, and that LambdaLR can save and resume them."""

import io
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming.lr_scheduler import (
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
)

GOLDEN = Path(__file__).parent / "golden"
CYCLES = dict(
    warm_up_steps=[10, 0], f_min=[0.1, 0.2], f_max=[1.0, 0.5], f_start=[0.0, 0.0], cycle_lengths=[110, 50]
)


def cosine(**changes):
    args = dict(warm_up_steps=10, lr_min=0.01, lr_max=1.0, lr_start=0.1, max_decay_steps=100)
    return LambdaWarmUpCosineScheduler(**{**args, **changes})


def test_golden():
    case = load_file(GOLDEN / "warmup_cosine.safetensors")
    schedule = cosine()
    got = torch.tensor([schedule(int(n)) for n in case["in/n"]], dtype=torch.float64)
    torch.testing.assert_close(got, case["out/multiplier"], rtol=0, atol=1e-12)


def test_corners_without_warm_up_and_after_the_end():
    schedule = cosine(warm_up_steps=0)
    assert [schedule(n) for n in (0, 50, 100, 10**6)] == pytest.approx([1.0, 0.505, 0.01, 0.01])


def test_cycles_follow_each_other_and_the_last_value_stays():
    schedule = LambdaWarmUpCosineScheduler2(**CYCLES)
    steps = [0, 5, 10, 60, 110, 135, 160, 10**6]
    assert [schedule(n) for n in steps] == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.35, 0.2, 0.2])


def test_linear_cycles():
    schedule = LambdaLinearScheduler(**CYCLES)
    steps = [0, 5, 10, 55, 110, 135, 160, 10**6]
    want = [0.0, 0.5, 0.1 + 0.9 * 100 / 110, 0.55, 0.1, 0.35, 0.2, 0.2]
    assert [schedule(n) for n in steps] == pytest.approx(want)


@pytest.mark.parametrize("schedule", [
    cosine(), LambdaWarmUpCosineScheduler2(**CYCLES), LambdaLinearScheduler(**CYCLES)
])
def test_lambda_lr_saves_and_resumes_without_unsafe_types(schedule):
    def build():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    optimizer, scheduler = build()
    for _ in range(30):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)  # rejects numpy numbers
    resumed_optimizer, resumed = build()
    resumed_optimizer.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["scheduler"])
    resumed_optimizer.step()
    resumed.step()
    assert resumed.get_last_lr() == pytest.approx([2.0 * schedule(31)])


def test_logs_at_its_interval_only(caplog):
    schedule = cosine(verbosity_interval=5)
    with caplog.at_level(logging.INFO, "taming.lr_scheduler"):
        for n in range(10):
            schedule(n)
    assert [record.getMessage() for record in caplog.records] == ["step 0: factor 0.1", "step 5: factor 0.55"]


@pytest.mark.parametrize(("build", "message"), [
    (lambda: cosine(max_decay_steps=10), r"\(10\).*\(10\)"),
    (lambda: LambdaLinearScheduler([1], [0.0, 0.0], [1.0], [0.0], [10]), "'f_min': 2"),
    (lambda: LambdaLinearScheduler([], [], [], [], []), "one entry per cycle"),
    (lambda: LambdaLinearScheduler([10], [0.0], [1.0], [0.0], [10]), "10 steps.*10 warm-up"),
])
def test_rejects_numbers_that_make_no_schedule(build, message):
    with pytest.raises(ValueError, match=message):
        build()
