"""Names, types and ranges of parameters, against signatures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from pytorch_lightning import Trainer

from taming.parameters import (
    NonNegativeFloat,
    NonNegativeInt,
    ParametersOf,
    PositiveFloat,
    PositiveInt,
    Probability,
    Range,
    accepted_parameters,
    did_you_mean,
    find_problem,
    mismatch,
)


@pytest.mark.parametrize(("annotation", "right", "wrong", "expected"), [
    (int, [0, -3], [1.0, True, "1", None, [1]], "a whole number"),
    (float, [0, 1, 0.5, -2.0], [False, "1e1", None, []], "a number"),
    (bool, [True, False], [0, 1, "maybe", None], "True or False"),
    (str, ["", "a"], [1, None, ["a"]], "a text"),
    (PositiveInt, [1, 7], [0, -1, 1.0, True], "a whole number of at least 1"),
    (NonNegativeInt, [0, 7], [-1, 0.0], "a whole number of at least 0"),
    (PositiveFloat, [1, 1e-9], [0, 0.0, -1, math.inf, math.nan], "a number above 0"),
    (NonNegativeFloat, [0, 0.5], [-1e-9, math.inf, math.nan], "a number of at least 0"),
    (Probability, [0, 1, 0.5], [-0.1, 1.1, 7, math.nan, True], "a number from 0 to 1"),
    (int | None, [None, 3], [0.5, "none"], "a whole number or null"),
    (Optional[Union[int, float]], [None, 3, 0.5], ["abc", True], "a whole number or a number or null"),  # noqa: UP007, UP045
    (tuple[int, ...], [[1, 2], (1,), []], ["1,1,1", 16, {0: 2}, [1, "a"], None],
     "a list, each element a whole number"),
    (Sequence[PositiveInt], [[1]], [[0], "1"], "a list, each element a whole number of at least 1"),
    (Iterable[str], [["a"], ("a",)], ["ab", [1]], "a list, each element a text"),
    (tuple[float, float], [[0.5, 0.9]], [[0.5], [0.5, 0.9, 1], 0.5], "a list of 2 (a number, a number)"),
    (list, [[], ["a", 1]], ["a", 1, {}], "a list"),
    (dict[str, int], [{}, {"a": 1}], [[], "a", None, 7], "a mapping (key: value)"),
    (Mapping[str, Any] | None, [None, {}], [[], 5], "a mapping (key: value) or null"),
    (Path, ["a/b", Path("a")], [1, None, ["a"]], "a path"),
    (Literal["l1", "l2"], ["l1"], ["l3", 1], "one of l1, l2"),
    (Annotated[float, Range(2, 3)], [2, 2.5, 3], [1.9, 3.1], "a number from 2 to 3"),
    (Any, [None, 1, "a", [1], {}], [], ""),
    (object, [None, 1, "a"], [], ""),
])
def test_values_and_annotations(annotation, right, wrong, expected):
    assert [value for value in right if mismatch(value, annotation)] == []
    assert [mismatch(value, annotation) for value in wrong] == [expected] * len(wrong)


class Parent:
    def __init__(self, size: PositiveInt, flip: bool = False, *, rates: Sequence[Probability] = ()):
        pass


class Child(Parent):
    def __init__(
        self, labels: int = None, nested: Annotated[dict, ParametersOf(Parent)] | None = None, **options
    ):
        super().__init__(**options)


Parent.__module__ = Child.__module__ = "taming.models.test"


@pytest.mark.parametrize(("params", "problem"), [
    ({"size": 1, "labels": 3, "flip": True, "rates": [0, 0.5], "nested": {"size": 2}}, None),
    ({"labels": None, "nested": None}, None),
    ({"labels": 1.5}, "does not accept labels: 1.5; it must be a whole number"),
    ({"size": 0}, "does not accept size: 0; it must be a whole number of at least 1"),
    ({"rates": [0.5, 7]}, "does not accept rates: [0.5, 7]; it must be a list, each element a number"),
    ({"siz": 1}, "does not accept 'siz' (did you mean size?); it accepts: labels, nested, size, flip, rates"),
    ({"nested": {"size": -4}}, "does not accept nested.size: -4; it must be a whole number of at least 1"),
    ({"nested": {"size": 1, "flipp": 1}}, "does not accept 'nested.flipp' (did you mean flip?)"),
    ({"nested": {}}, "needs 'nested.size' in its params"),
    ({"nested": 7}, "does not accept nested: 7; it must be a mapping (key: value) or null"),
])
def test_what_is_wrong_with_parameters(params, problem):
    found = find_problem(Child, params)
    assert found is None if problem is None else problem in found


def test_another_target_beside_a_mapping_checks_it_itself():
    def taker(sizes: Annotated[dict, ParametersOf(Parent, named_by=["other"])], other: dict | None = None):
        return sizes

    taker.__module__ = "taming.models.test"
    assert "does not accept 'sizes.depth'" in find_problem(taker, {"sizes": {"size": 1, "depth": 2}})
    named = {"sizes": {"depth": 2}, "other": {"target": "taming.modules.vqvae.networks.Encoder"}}
    assert find_problem(taker, named) is None
    assert "needs 'sizes.size'" in find_problem(taker, {"sizes": {}, "other": {"params": {"depth": 2}}})


def test_parameters_of_other_packages_are_checked_by_name_only():
    def loose(size: int = 3):
        return size

    assert find_problem(loose, {"size": [1, 2]}) is None
    assert "'sise' (did you mean size?)" in find_problem(loose, {"sise": 3})


def test_annotations_that_only_a_type_checker_can_read_are_passed_over():
    class Lazy:
        def __init__(self, size: "NotImported"):  # noqa: F821
            pass

    Lazy.__module__ = "taming.models.test"
    assert find_problem(Lazy, {"size": "whatever"}) is None


def test_arguments_of_the_trainer():
    accepted, is_open = accepted_parameters(Trainer)
    assert not is_open and accepted["max_epochs"].default is None
    for name, value in (("precision", "fp16"), ("max_epochs", 10.0), ("max_steps", "many"),
                        ("accelerator", 3), ("gradient_clip_val", "abc"), ("detect_anomaly", "foo"),
                        ("max_time", 7.5)):
        assert f"does not accept {name}: {value!r}; it must be" in find_problem(Trainer, {name: value})
    fine = {"precision": "bf16-mixed", "max_epochs": None, "devices": [0, 1], "limit_val_batches": 0.5,
            "max_time": {"minutes": 1}, "profiler": "simple"}
    assert find_problem(Trainer, fine) is None


def test_closest_names():
    found = did_you_mean("max_epoch", ["max_epochs", "devices"], "--{}".format)
    assert found == " (did you mean --max_epochs?)"
    assert did_you_mean("quite_another", ["max_epochs"]) == ""
