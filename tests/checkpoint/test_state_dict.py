"""Loading a state dict into a module: reported by name, all of it or nothing."""

import logging
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from taming.checkpoint import load_weights
from tests.checkpoint.test_load import WithBuffers, assert_equal_states


class DropsMask(nn.Linear):
    """A layer with a load hook that migrates an old key."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_load_state_dict_pre_hook(self.drop_mask)

    @staticmethod
    def drop_mask(module, state, prefix, *_args):
        state.pop(prefix + "mask", None)


@pytest.mark.parametrize("assign", [False, True])
def test_mismatch_is_reported_by_name_and_changes_nothing(assign):
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    parameters = list(module.parameters())
    state = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).state_dict()
    del state["1.bias"]
    state |= {f"extra.{i}": torch.ones(1) for i in range(7)}
    with pytest.raises(ValueError) as caught:
        load_weights(module, state, source="runs/other.ckpt", assign=assign)
    text = str(caught.value)
    assert "runs/other.ckpt do not fit Sequential; nothing was loaded" in text
    assert "missing in the file: 1 (1.bias)" in text
    assert "unexpected in the file: 7 (extra.0; extra.1; extra.2; extra.3; extra.4; ...)" in text
    assert "shape mismatch: 1 (0.weight: file (2, 4), model (2, 3))" in text
    assert "config" in text
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(old is new for old, new in zip(parameters, module.parameters(), strict=True))


def test_copying_keeps_the_parameters_that_an_optimizer_holds():
    source, module = WithBuffers(), WithBuffers()
    source.count += 3
    weight = module.weight
    load_weights(module, source.state_dict(), source="x")
    assert module.weight is weight and module.twin is weight
    assert_equal_states(module, source)
    source.weight.data.zero_()
    assert weight.abs().sum() > 0  # a copy, not a view


def test_assigning_keeps_dtype_requires_grad_and_ties():
    source, module = WithBuffers(), WithBuffers()
    state = source.state_dict()
    state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    load_weights(module, state, source="x", assign=True)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, source.weight.half().float())
    assert module.twin is module.weight
    assert module.weight.requires_grad and not module.frozen.requires_grad
    same = WithBuffers()
    state = source.state_dict()
    load_weights(same, state, source="x", assign=True)
    assert same.weight.data_ptr() == state["weight"].data_ptr()


def test_ignored_and_optional_keys_are_reported(caplog):
    state = nn.Linear(2, 1).state_dict() | dict.fromkeys(["loss.a", "x.mask", "ema"], torch.ones(1))
    with caplog.at_level(logging.INFO, logger="taming.checkpoint"):
        report = load_weights(
            nn.Linear(2, 1), state, source="old.ckpt", ignore=["loss.", r".*\.mask"], optional=["ema"]
        )
    assert report.ignored == ("loss.a", "x.mask")
    assert report.unexpected == ("ema",) and report.missing == ()
    assert report.loaded == 2
    assert "loaded 2 tensors from old.ckpt into Linear; ignored: 2 (loss.a; x.mask)" in caplog.text
    with pytest.raises(ValueError, match="loss.a"):
        load_weights(nn.Linear(2, 1), state, source="old.ckpt", ignore=["oss."])


def test_load_hooks_of_layers_are_honoured():
    state = {**nn.Linear(2, 2).state_dict(), "mask": torch.ones(2, 2)}
    module = DropsMask()
    assert load_weights(module, state, source="x").unexpected == ()
    assert torch.equal(module.weight, state["weight"])


# ---- parts that are left out, and names of other software


def deep() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


def classifier(classes: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=deep(), norm=nn.LayerNorm(4), head=nn.Linear(4, classes)))


@pytest.mark.parametrize("ignore", [["head."], "head.", ["head.weight", "head.bias"], [r"head\..*"]])
@pytest.mark.parametrize("assign", [False, True])
def test_what_is_ignored_stays_as_initialised_whatever_its_shape(ignore, assign):
    old, new = classifier(10), classifier(12)
    before = new.head.weight.detach().clone()
    report = load_weights(new, old.state_dict(), source="x", ignore=ignore, assign=assign)
    assert torch.equal(new.body[1].weight, old.body[1].weight) and torch.equal(new.head.weight, before)
    assert report.ignored == report.kept == ("head.weight", "head.bias")
    assert report.loaded == 8
    assert "kept as initialised: 2 (head.weight; head.bias)" in str(report)


def test_a_part_that_the_file_lacks_may_be_ignored_too():
    new = nn.Sequential(OrderedDict(body=nn.Linear(3, 4), extra=nn.Linear(1, 1)))
    state = {f"body.{key}": value for key, value in nn.Linear(3, 4).state_dict().items()}
    report = load_weights(new, state, source="x", ignore=["extra."])
    assert report.kept == ("extra.weight", "extra.bias") and report.ignored == () and report.missing == ()


@pytest.mark.parametrize("new, words", [
    (classifier(12), "ignore_keys=[head.]"),
    (nn.Sequential(OrderedDict(body=deep(), norm=nn.LayerNorm(5))), "ignore_keys=[head.,norm.]"),
])
def test_a_mismatch_says_which_words_would_leave_it_out(new, words):
    state = classifier(10).state_dict()
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load_weights(new, state, source="x")
    assert len(str(caught.value).splitlines()) == 1
    ignore = words.removeprefix("ignore_keys=[").removesuffix("]").split(",")
    load_weights(new, state, source="x", ignore=ignore)
    assert torch.equal(new.body[0].weight, state["body.0.weight"])


def test_another_model_is_not_suggested_to_be_ignored():
    with pytest.raises(ValueError) as caught:
        load_weights(nn.Linear(2, 2), classifier(3).state_dict(), source="x")
    assert "ignore_keys" not in str(caught.value)


def test_a_word_that_is_no_pattern_is_a_prefix():
    state = {**nn.Linear(2, 2).state_dict(), "[old": torch.ones(1)}
    assert load_weights(nn.Linear(2, 2), state, source="x", ignore=["["]).ignored == ("[old",)


PREFIXED = [
    ["module."], ["_orig_mod."], ["module.", "_orig_mod."], ["_orig_mod.", "module."], ["model_ema."],
    ["first_stage_model."], ["module.", "first_stage_model."], ["_orig_mod.", "first_stage_model."],
]


@pytest.mark.parametrize("prefixes", PREFIXED, ids="".join)
def test_names_of_wrapped_models_are_understood(prefixes):
    old, new = classifier(3), classifier(3)
    state = {"".join(prefixes) + key: value for key, value in old.state_dict().items()}
    report = load_weights(new, state, source="x")
    assert_equal_states(new, old)
    assert set(report.prefixes) == set(prefixes)
    assert "without the prefix" in str(report) and report.loaded == 10


def test_a_part_that_was_compiled_is_understood():
    old, new = classifier(3), classifier(3)
    state = {key.replace("body.", "body._orig_mod."): value for key, value in old.state_dict().items()}
    assert load_weights(new, state, source="x").prefixes == ("_orig_mod.",)
    assert_equal_states(new, old)


def test_of_a_larger_model_only_the_first_stage_is_taken():
    old, new = classifier(3), classifier(3)
    state = {f"first_stage_model.{key}": value for key, value in old.state_dict().items()}
    others = {"transformer.head.weight": torch.ones(2), "model_ema.transformerheadweight": torch.ones(2)}
    report = load_weights(new, {**others, **state}, source="x")
    assert_equal_states(new, old)
    assert report.ignored == tuple(others) and report.prefixes == ("first_stage_model.",)


def test_averages_are_taken_instead_of_the_weights_beside_them():
    old, average, new = classifier(3), classifier(3), classifier(3)
    counters = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(5)}
    state = {**old.state_dict(), **counters}
    state |= {f"model_ema.{key.replace('.', '')}": value for key, value in average.state_dict().items()}
    assert load_weights(new, state, source="x").prefixes == ("model_ema.",)
    assert_equal_states(new, average)
    del state["model_ema.headbias"]
    with pytest.raises(ValueError, match="model_ema has averages, but none of head.bias"):
        load_weights(new, state, source="x")


def test_a_model_with_such_names_of_its_own_is_left_alone():
    old, new = nn.Module(), nn.Module()
    for model in (old, new):
        model.module, model.first_stage_model = nn.Linear(2, 2), nn.Linear(2, 2)
    report = load_weights(new, old.state_dict(), source="x")
    assert report.prefixes == () and report.ignored == ()
    assert_equal_states(new, old)


def test_prefixes_go_before_words_to_ignore():
    old, new = classifier(10), classifier(12)
    state = {f"module.{key}": value for key, value in old.state_dict().items()}
    assert load_weights(new, state, source="x", ignore=["head."]).kept == ("head.weight", "head.bias")
    assert torch.equal(new.body[2].weight, old.body[2].weight)
