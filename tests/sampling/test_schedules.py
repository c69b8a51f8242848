"""Schedules by the values that they pass through."""

import pytest
import torch

from taming.sampling import Interval, Linear, PowerCosine
from taming.sampling.schedules import per_step


def test_linear_and_power_cosine_reach_both_ends():
    assert [Linear(1.0, 3.0, 5)(step) for step in range(7)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]
    assert Linear(2.0, 5.0, 1)(0) == 2.0
    cosine = PowerCosine(1.0, 4.0, 9, power=1.0)
    assert [cosine(step) for step in (0, 4, 8)] == pytest.approx([1.0, 2.5, 4.0])
    late = PowerCosine(1.0, 4.0, 9)  # (1/2)**4 = 1/16 of half a wave
    assert late(4) == pytest.approx(1.0 + 3.0 * (1 - 0.98078528) / 2)
    assert late(8) == pytest.approx(4.0)


def test_interval_holds_its_ends():
    assert [Interval(2.5, 1, 2)(step) for step in range(4)] == [1.0, 2.5, 2.5, 1.0]
    rising = Interval(Linear(0.0, 1.0, 5), 2, 3, outside=7.0)
    assert [rising(step) for step in range(5)] == [7.0, 7.0, 0.5, 0.75, 7.0]


def test_values_of_all_steps_and_images():
    assert per_step("guidance", 2, 3, 2).tolist() == [[2.0, 2.0]] * 3
    assert per_step("guidance", torch.tensor([1.0, 4.0]), 2, 2).tolist() == [[1.0, 4.0]] * 2
    mixed = per_step("guidance", lambda step: step if step else torch.tensor([5.0, 6.0]), 2, 2)
    assert mixed.tolist() == [[5.0, 6.0], [1.0, 1.0]]


@pytest.mark.parametrize(("value", "message"), [
    (float("nan"), "guidance must be finite, not nan"),
    (lambda step: torch.ones(3), r"guidance \(3,\): give a number, or 2"),
])
def test_what_is_no_setting_is_said(value, message):
    with pytest.raises(ValueError, match=message):
        per_step("guidance", value, 4, 2)
