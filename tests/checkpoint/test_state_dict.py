"""Loading a state dict into a module: reported by name, all of it or nothing."""

import logging

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
