"""Schedules by the values that they pass through."""

import argparse
import math

import pytest
import torch

from taming.cli.options import add_sampling_fields, sampling_options
from taming.sampling import Interval, Linear, PowerCosine, SamplingOptions
from taming.sampling.schedules import GUIDANCE_SCHEDULES, guidance_schedule, per_step


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


def values(name, scale=5.0, steps=8, **more):
    schedule = guidance_schedule(scale, name, steps, **more)
    return per_step("guidance", schedule, steps, 2)[:, 0].tolist()


def test_schedules_by_name():
    assert values("constant") == [5.0] * 8
    assert values("linear", steps=5) == [1.0, 2.0, 3.0, 4.0, 5.0]
    # RAR: w_t = 1 + (g - 1) (1 - cos(pi (t / N)^p)) / 2
    for name, more, power in (("cosine", {}, 1.0), ("power-cosine", dict(power=2.75), 2.75)):
        want = [1 + 4 * (1 - math.cos(math.pi * (t / 8) ** power)) / 2 for t in range(8)]
        assert values(name, **more) == pytest.approx(want, rel=1e-6)
    assert values("linear", torch.tensor([3.0, 5.0]), steps=3) == [1.0, 2.0, 3.0]
    assert values("cosine", torch.tensor([3.0, 5.0]))[4] == pytest.approx(2.0)


def test_an_interval_cuts_any_schedule():
    assert values("constant", interval=(2, 3)) == [1.0, 1.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1.0]
    assert values("linear", steps=5, interval=(3, None)) == [1.0, 1.0, 1.0, 4.0, 5.0]
    assert values("linear", steps=5, interval=[0, 1]) == [1.0, 2.0, 1.0, 1.0, 1.0]
    assert values("constant", lambda step: 3.0 + step, interval=(6, 20))[5:] == [1.0, 9.0, 10.0]


@pytest.mark.parametrize(("changes", "message"), [
    (dict(guidance_schedule="sine"), "guidance_schedule is 'sine': give one of constant, linear, cosine"),
    (dict(guidance_schedule="power-cosine", guidance_power=0.0), "guidance_power is 0: give a number above"),
    (dict(guidance_schedule="linear", guidance=Linear(1.0, 2.0, 4)), "guidance is a schedule already"),
    (dict(guidance_interval=(3, 2)), "guidance_interval is 3,2: give the first and the last step"),
    (dict(guidance_interval=(-1, 2)), "guidance_interval is -1,2"),
    (dict(guidance_schedule="linear", guidance=2.0, has_null=False), "the model has no null token"),
])
def test_schedules_that_cannot_be_are_said(changes, message):
    has_null = changes.pop("has_null", True)
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**changes).check(has_null=has_null)


def test_commands_take_schedules(capsys):
    parser = argparse.ArgumentParser()
    add_sampling_fields(parser)
    words = "--guidance 4 --guidance-schedule power-cosine --guidance-power 2.75 --guidance-interval 2,9"
    options = sampling_options(parser.parse_args(words.split()))
    assert options.guidance_at(8)(5) == pytest.approx(1 + 3 * (1 - math.cos(math.pi * (5 / 8) ** 2.75)) / 2)
    assert options.guidance_at(8)(1) == 1.0
    assert sampling_options(parser.parse_args(["--guidance-interval", "3"])).guidance_interval == (3, None)
    assert sampling_options(parser.parse_args([])) == SamplingOptions(seed=0)
    for wrong in ("--guidance-schedule=cosin", "--guidance-interval=a,b", "--guidance-power=0"):
        with pytest.raises(SystemExit):
            parser.parse_args([wrong])
    said = capsys.readouterr().err
    assert "did you mean cosine" in said and "give FIRST,LAST" in said and "0 is not a number above 0" in said
    assert all(name in parser.format_help() for name in GUIDANCE_SCHEDULES)
