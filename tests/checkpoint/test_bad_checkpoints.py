"""Checkpoints that cannot be loaded: refused with the reason and the remedy, and nothing half-loaded."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from taming.checkpoint import load_model, save_exported
from taming.config import allow_targets
from taming.models.base import ImageModel
from tests.checkpoint.test_load import CONFIG, WithBuffers, WithLoss, config_for, save


@pytest.fixture(autouse=True)
def _allow_the_modules_below():
    allow_targets("tests.checkpoint.test_load")


class Net(ImageModel):
    """The smallest model that trains."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    folder = save_exported(WithLoss(), config_for(WithLoss), tmp_path / "export")
    OmegaConf.save(OmegaConf.create(config_for(WithBuffers)), folder / "config.yaml")
    with pytest.raises(ValueError, match="do not fit WithBuffers; nothing was loaded") as caught:
        load_model(folder)
    text = str(caught.value)
    assert "model.safetensors" in text and "change either" in text
    assert "missing in the file: 4 (weight; twin; frozen; count)" in text
    assert "unexpected in the file: 2 (net." in text


@pytest.mark.parametrize("target, message", [
    ("taming.models.vqgan.VQModle", r"has no 'VQModle' \(did you mean VQModel"),
    ("taming.models.vqgan.Old", "has no 'Old'; it has: VQModel, .*GumbelVQ"),
    ("taming.models.old.VQModel", r"there is no module taming\.models\.old; taming\.models has: .*vqgan"),
    ("taming.models.vqgann.VQModel", r"there is no module taming\.models\.vqgann \(did you mean vqgan"),
    ("my_project.models.Net", "if you trust my_project, allow it: --allow my_project"),
    ("main.Gone", "target 'main.Gone' is unknown"),
])
def test_a_config_for_a_class_that_is_gone_says_so(tmp_path, target, message):
    config = {"model": {"target": target, "params": {}}}
    with pytest.raises(ValueError, match=message):
        load_model(save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=config))


def test_safetensors_without_a_config_say_which_is_missing(tmp_path):
    folder = save_exported(nn.Linear(3, 2), CONFIG, tmp_path / "export")
    (folder / "config.yaml").rename(tmp_path / "elsewhere.yaml")
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(ValueError, match=r"export/config\.yaml, .*load_model\(path, config=\.\.\.\)"):
            load_model(path)
    assert load_model(folder, config=tmp_path / "elsewhere.yaml")[0].weight.shape == (2, 3)


@pytest.mark.parametrize("kept", [0.001, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["export", "last.ckpt"])
def test_a_file_cut_anywhere_is_refused(tmp_path, form, kept):
    if form == "export":
        file = save_exported(nn.Linear(30, 200), CONFIG, tmp_path / form) / "model.safetensors"
    else:
        file = save(nn.Linear(30, 200), tmp_path / form, config=CONFIG)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match="truncated|damaged|not a checkpoint") as caught:
        load_model(tmp_path / form)
    assert str(file) in str(caught.value) and "get it again" in str(caught.value)


def test_a_refused_file_leaves_a_model_as_it_was(tmp_path):
    """init_from_ckpt is what a training calls: it must not go on with half of the weights."""
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    files = [
        save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "other.ckpt"),
        save(nn.Linear(2, 2), tmp_path / "cut.ckpt", more=torch.ones(999)),
    ]
    files[1].write_bytes(files[1].read_bytes()[:1500])
    half = {"net.weight": torch.ones(2, 2), "net.bias": torch.ones(3)}  # the first fits, the second does not
    torch.save({"state_dict": half}, tmp_path / "half.ckpt")
    for file in (*files, tmp_path / "half.ckpt"):
        with pytest.raises(ValueError, match=file.name):
            model.init_from_ckpt(file)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), (file, key)


@pytest.mark.parametrize("state, message", [
    ({"weight": "text", "bias": [1]}, "do not fit Linear; nothing was loaded"),
    ({1: torch.ones(2, 3), "bias": torch.ones(2)}, "1 in its state_dict is not the name"),
    ({"weight": torch.ones(2, 3, device="meta"), "bias": torch.ones(2)}, "'weight' .* without data"),
    ({"weight": torch.eye(2, 3).to_sparse(), "bias": torch.ones(2)}, "'weight' .* sparse"),
    ({}, r"missing in the file: 2 \(weight; bias\)"),
])
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_a_state_dict_of_other_things_is_refused(tmp_path, state, message):
    torch.save({"state_dict": state, "config": CONFIG}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "x.ckpt")
    assert "x.ckpt" in str(caught.value)


def test_a_counter_that_is_none_counts_as_zero(tmp_path):
    file = save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=CONFIG, batches_seen="many", global_step=-1)
    assert load_model(file)[2] == 0
