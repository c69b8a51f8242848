"""Checkpoints: found, read without running them, loaded completely or not at all, exported and read back."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from taming.checkpoint import (
    find_checkpoint,
    load_model,
    read_checkpoint,
    save_exported,
    without_ckpt_paths,
    write_checkpoint,
)
from taming.checkpoint import save as ckpt
from taming.config import allow_targets

EXPORTED = ["README.md", "config.json", "config.yaml", "model.safetensors"]
LEGACY = Path(__file__).parents[1] / "golden" / "legacy_lightning_1_0.ckpt"
CONFIG = {"model": {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 2}}}


@pytest.fixture(autouse=True)
def _allow_the_modules_below():
    allow_targets(__name__)


class WithBuffers(nn.Module):
    """A weight, a persistent buffer, one that no checkpoint holds, and tied weights."""

    def __init__(self, width: int = 4, ckpt_path: str | None = None, nested: dict | None = None):
        super().__init__()
        if ckpt_path or (nested or {}).get("params", {}).get("ckpt_path"):
            raise FileNotFoundError("the separate checkpoint was asked for")
        self.weight = nn.Parameter(torch.randn(width, width))
        self.weight.data.normal_(std=0.02)
        self.twin = self.weight
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("grid", torch.arange(width).flip(0), persistent=False)
        self.table = torch.linspace(0, 1, width)


class ComputesWithWeights(nn.Linear):
    """Its constructor needs the values of its weights, so it cannot be built without them."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("norm", torch.tensor(self.weight.norm().item()), persistent=False)


class WithLoss(nn.Module):
    """A model with a loss of its own, as a VQModel has."""

    def __init__(self, discriminator: bool = True):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.loss = nn.ModuleDict({"discriminator": nn.Linear(2, 1)} if discriminator else {})


def config_for(cls: type, **params) -> dict:
    return {"model": {"target": f"{cls.__module__}.{cls.__name__}", "params": params}}


def save(module: nn.Module, path: Path, **extra) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": module.state_dict(), **extra}, path)
    return path


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


# --- finding


def test_find_takes_a_file_a_run_and_an_exported_folder(tmp_path):
    newest = save(nn.Linear(1, 1), tmp_path / "run" / "checkpoints" / "b.ckpt")
    older = save(nn.Linear(1, 1), tmp_path / "run" / "checkpoints" / "c.ckpt")
    os.utime(older, (1, 1))
    assert find_checkpoint(newest) == newest
    assert find_checkpoint(tmp_path / "run") == newest
    last = save(nn.Linear(1, 1), tmp_path / "run" / "checkpoints" / "last.ckpt")
    os.utime(last, (0, 0))
    assert find_checkpoint(str(tmp_path / "run")) == last
    folder = save_exported(nn.Linear(3, 2), CONFIG, tmp_path / "export")
    assert find_checkpoint(folder) == folder / "model.safetensors"


def test_find_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt.*model\.safetensors"):
        find_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_checkpoint(tmp_path / "nowhere")


# --- loading models


def test_checkpoint_with_its_config_needs_only_the_path(tmp_path):
    source = nn.Linear(3, 2)
    save(source, tmp_path / "run/checkpoints/last.ckpt", config=CONFIG, batches_seen=7, global_step=14)
    model, config, step = load_model(tmp_path / "run")
    assert_equal_states(model, source)
    assert not model.training and step == 7
    assert config.model.target == "torch.nn.Linear"
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model(torch.ones(1, 3)).shape == (1, 2)


def test_config_is_found_beside_the_checkpoint(tmp_path):
    source = nn.Linear(3, 2)
    run = tmp_path / "run"
    file = save(source, run / "checkpoints" / "last.ckpt", global_step=14)
    with pytest.raises(ValueError, match=r"configs/\*\.yaml.*config\.yaml.*config=\.\.\."):
        load_model(run)
    (run / "configs").mkdir()
    first = {"model": {"target": "torch.nn.Linear", "params": {"in_features": 9, "out_features": 2}}}
    OmegaConf.save(OmegaConf.create(first), run / "configs" / "2021-01-01T00-00-00-project.yaml")
    second = OmegaConf.create({"model": {"params": {"in_features": 3}}})
    OmegaConf.save(second, run / "configs" / "2021-02-01T00-00-00-project.yaml")
    for path in (run, file):
        model, config, step = load_model(path)
        assert_equal_states(model, source)
        assert step == 14 and config.model.params.in_features == 3
    shutil.copy(file, tmp_path / "alone.ckpt")
    OmegaConf.save(OmegaConf.create(CONFIG), tmp_path / "alone.yaml")
    assert_equal_states(load_model(tmp_path / "alone.ckpt")[0], source)
    assert_equal_states(load_model(file, config=tmp_path / "alone.yaml")[0], source)
    assert_equal_states(load_model(file, config=CONFIG)[0], source)
    with pytest.raises(ValueError, match="has no section `model`"):
        load_model(file, config={"data": {}})


def test_tensors_that_no_checkpoint_holds_are_right(tmp_path):
    source = WithBuffers()
    source.count += 5
    file = save(source, tmp_path / "x.ckpt", config=config_for(WithBuffers))
    model, _, _ = load_model(file)
    assert_equal_states(model, source)
    assert model.grid.tolist() == [3, 2, 1, 0]
    assert torch.equal(model.table, torch.linspace(0, 1, 4))
    assert model.twin is model.weight
    assert model.weight.requires_grad and not model.frozen.requires_grad
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # what is built afterwards has memory again


def test_constructor_that_needs_its_weights_is_built_in_full(tmp_path):
    source = ComputesWithWeights()
    model, _, _ = load_model(save(source, tmp_path / "x.ckpt", config=config_for(ComputesWithWeights)))
    assert_equal_states(model, source)
    assert not model.norm.is_meta


def test_building_takes_no_random_numbers(tmp_path):
    file = save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=CONFIG)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_model(file)
    assert torch.equal(torch.rand(3), expected)


def test_separate_checkpoints_are_not_needed(tmp_path):
    source = WithBuffers()
    nested = {"target": "x", "params": {"ckpt_path": "elsewhere/last.ckpt", "a": [{"ckpt_path": "b"}]}}
    config = config_for(WithBuffers, ckpt_path="gone.ckpt", nested=nested)
    model, found, _ = load_model(save(source, tmp_path / "x.ckpt", config=config))
    assert_equal_states(model, source)
    assert found.model.params.ckpt_path == "gone.ckpt"  # as it was trained
    folder = save_exported(model, found, tmp_path / "export")
    assert "ckpt_path" not in (folder / "config.yaml").read_text()


def test_loss_weights_may_differ_and_the_rest_may_not(tmp_path, caplog):
    source = WithLoss()
    state = {**source.state_dict(), "loss.perceptual_loss.lin0.weight": torch.ones(1)}
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": state, "config": config_for(WithLoss, discriminator=False)}, path)
    with caplog.at_level(logging.INFO, logger="taming.checkpoint"):
        model, _, _ = load_model(path)
    assert torch.equal(model.net.weight, source.net.weight)
    assert "ignored: 1 (loss.perceptual_loss.lin0.weight)" in caplog.text
    assert "not in the model: 2 (loss.discriminator.weight; loss.discriminator.bias)" in caplog.text

    save(WithLoss(discriminator=False), path, config=config_for(WithLoss))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="taming.checkpoint"):
        model, _, _ = load_model(path)
    assert "not in the file: 2 (loss.discriminator.weight; loss.discriminator.bias)" in caplog.text
    assert len(caplog.records) == 1
    assert model.loss.discriminator.weight.abs().sum() > 0  # initialised as if built anew

    torch.save({"state_dict": {"net.weight": state["net.weight"]}, "config": config_for(WithLoss)}, path)
    with pytest.raises(ValueError, match=r"missing in the file: 1 \(net.bias\)"):
        load_model(path)


def test_legacy_file_loads_into_a_vqmodel(caplog):
    ddconfig = {
        "double_z": False, "z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
    }
    params = {
        "ddconfig": ddconfig, "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        "n_embed": 48, "embed_dim": 8,
    }
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
    with caplog.at_level(logging.INFO, logger="taming.checkpoint"):
        model, _, step = load_model(LEGACY, config=config)
    raw = read_checkpoint(LEGACY)["state_dict"]
    assert step == 12345
    assert all(torch.equal(value, raw[key]) for key, value in model.state_dict().items())
    assert "loss.perceptual_loss" in caplog.text and "loss.discriminator" in caplog.text
    reconstruction, _ = model(torch.zeros(1, 3, 32, 32))
    assert reconstruction.shape == (1, 3, 32, 32) and reconstruction.isfinite().all()
    params["n_embed"] = 64
    with pytest.raises(ValueError, match=r"quantize\.embedding\.weight: file \(48, 8\), model \(64, 8\)"):
        load_model(LEGACY, config=config)


def test_wrong_targets_fail_as_wrong_targets(tmp_path):
    config = {"model": {"target": "torch.nn.Linear", "params": {"width": 3}}}
    with pytest.raises(ValueError, match="width"):
        load_model(save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=config))
    config = {"model": {"target": "os.system", "params": {"command": "true"}}}
    with pytest.raises(ValueError, match=r"os\.system"):
        load_model(save(nn.Linear(3, 2), tmp_path / "y.ckpt", config=config))


def test_ckpt_paths_are_cut_at_any_depth_and_nothing_else():
    section = OmegaConf.create({"ckpt_path": 1, "a": [{"ckpt_path": 2, "b": "${data.size}"}], "ckpts": 3})
    cut = without_ckpt_paths(section)
    assert OmegaConf.to_container(cut) == {"a": [{"b": "${data.size}"}], "ckpts": 3}
    assert section.ckpt_path == 1


def mapped(address: int, file: Path) -> bool:
    """Tell whether this place in memory is a part of that file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            return line.endswith(str(file))
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks the kernel where memory lies")
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("form", ["export", "last.ckpt"])
def test_weights_are_in_memory_once(tmp_path, form, mmap):
    """In memory of their own, or in the file if that is asked for; optimizer states are not read."""
    layers = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 4096}}  # 67 MB
    source = nn.Linear(4096, 4096)
    if form == "export":
        file = save_exported(source, {"model": layers}, tmp_path / form) / "model.safetensors"
    else:
        file = save(source, tmp_path / form, config={"model": layers}, optimizer_states=[torch.ones(2**24)])
    total = source.weight.sum()
    size = source.weight.nbytes
    del source
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory counts from here
    model, _, _ = load_model(tmp_path / form, mmap=mmap)
    assert torch.equal(model.weight.sum(), total)  # reads every page
    lines = Path("/proc/self/status").read_text().splitlines()
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    assert mapped(model.weight.data_ptr(), file) is mapped(model.bias.data_ptr(), file) is mmap
    assert memory["VmHWM"] - memory["VmRSS"] < 0.2 * size  # what was on top of the model at any time


@pytest.mark.parametrize("form", ["export", "last.ckpt"])
def test_a_model_outlives_its_file(tmp_path, form):
    """Writing into the file, as torch.save and tools that copy do, once was a bus error."""
    layers = {"target": "torch.nn.Linear", "params": {"in_features": 600, "out_features": 600}}
    source = nn.Linear(600, 600)
    if form == "export":
        file = save_exported(source, {"model": layers}, tmp_path / form) / "model.safetensors"
    else:
        file = save(source, tmp_path / form, config={"model": layers})
    model, _, _ = load_model(tmp_path / form)
    torch.save(model.state_dict(), file)
    assert_equal_states(model, source)
    file.write_bytes(b"")
    assert_equal_states(model, source)
    assert model(torch.ones(1, 600)).isfinite().all()


class CountsBuilds(nn.Linear):
    """Counts how often it is built."""

    built = 0

    def __init__(self):
        CountsBuilds.built += 1
        super().__init__(2, 2)


class Fails(nn.Module):
    """Has a bug."""

    def __init__(self):
        super().__init__()
        raise TypeError("a bug of its author")


def test_a_model_is_built_once_and_errors_of_the_callers_code_pass(tmp_path):
    model, _, _ = load_model(save(CountsBuilds(), tmp_path / "x.ckpt", config=config_for(CountsBuilds)))
    assert CountsBuilds.built == 2  # one of them here
    with pytest.raises(TypeError, match="a bug of its author"):
        load_model(save(nn.Linear(2, 2), tmp_path / "y.ckpt", config=config_for(Fails)))


def test_what_a_strangers_config_breaks_in_our_code_is_one_line(tmp_path):
    config = {"model": {"target": "torch.nn.Linear", "params": {"in_features": -1, "out_features": 2}}}
    file = save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=config)
    with pytest.raises(ValueError, match=r"^the model of .*x\.ckpt cannot .*\(RuntimeError: ") as caught:
        load_model(file)
    assert len(str(caught.value).splitlines()) == 1


def test_the_class_can_be_demanded(tmp_path):
    file = save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=CONFIG)
    assert type(load_model(file, nn.Linear)[0]) is nn.Linear
    assert type(load_model(file, cls=nn.Module)[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"x\.ckpt holds a torch.*Linear, not a torch.*Conv2d"):
        load_model(file, cls=nn.Conv2d)


def test_nothing_but_models_is_built(tmp_path):
    config = {"model": {"target": "torch.optim.lr_scheduler.LambdaLR", "params": {}}}
    with pytest.raises(ValueError, match="LambdaLR in the config of .*x.ckpt is not a torch module"):
        load_model(save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=config))


def test_the_data_section_is_that_of_the_run_directory(tmp_path):
    """Checkpoints carry no folders of the machine that made them; the run's own YAML files do."""
    run = tmp_path / "run"
    (tmp_path / "photos").mkdir()
    data = {"params": {"folder": str(tmp_path / "photos")}}
    write_checkpoint({"state_dict": nn.Linear(3, 2).state_dict(), "config": {**CONFIG, "data": data}},
                     run / "checkpoints" / "last.ckpt")
    assert load_model(run)[1].data.params.folder == "photos"
    (run / "configs").mkdir()
    OmegaConf.save(OmegaConf.create({"data": data}), run / "configs" / "2026-project.yaml")
    assert load_model(run)[1].data.params.folder == str(tmp_path / "photos")


# --- exporting


def test_export_reads_back_bit_equal(tmp_path):
    source = WithBuffers()
    source.count += 2
    folder = save_exported(source, config_for(WithBuffers, width=4), tmp_path / "a" / "b", step=123)
    assert sorted(file.name for file in folder.iterdir()) == EXPORTED
    model, config, step = load_model(folder)
    assert_equal_states(model, source)
    assert model.twin is model.weight
    assert step == 123 and config.model.params.width == 4


def test_export_over_the_file_that_a_model_is_mapped_from(tmp_path):
    folder = save_exported(nn.Linear(3, 2), CONFIG, tmp_path)
    model, config, _ = load_model(folder, mmap=True)
    weight = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    save_exported(model, config, folder)
    assert torch.equal(model.weight, weight + 1)
    assert torch.equal(load_model(folder)[0].weight, weight + 1)


def test_writing_over_a_checkpoint_leaves_mapped_models_alone(tmp_path):
    first, second, path = nn.Linear(500, 500), nn.Linear(500, 500), tmp_path / "run" / "last.ckpt"
    write_checkpoint({"state_dict": first.state_dict(), "config": CONFIG}, path)
    config = {"model": {"target": "torch.nn.Linear", "params": {"in_features": 500, "out_features": 500}}}
    model, _, _ = load_model(path, config=config, mmap=True)
    write_checkpoint({"state_dict": second.state_dict(), "config": CONFIG}, path)
    assert_equal_states(model, first)
    assert_equal_states(load_model(path, config=config)[0], second)
    with pytest.raises(AttributeError):  # cannot be pickled: the file stays as it was
        write_checkpoint({"state_dict": {}, "function": lambda: None}, path)
    assert_equal_states(load_model(path, config=config)[0], second)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("mmap", [False, True])
def test_training_a_loaded_model_leaves_the_file_alone(tmp_path, mmap):
    file = save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=CONFIG)
    before = file.read_bytes()
    model, _, _ = load_model(file, mmap=mmap)
    with torch.no_grad():
        model.weight.zero_()
    assert file.read_bytes() == before
    assert load_model(file)[0].weight.abs().sum() > 0


def test_export_needs_a_model_section_and_leaves_nothing_behind(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no section `model`"):
        save_exported(nn.Linear(3, 2), {"data": {}}, tmp_path)

    def full(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(ckpt, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_exported(nn.Linear(3, 2), CONFIG, tmp_path)
    assert list(tmp_path.iterdir()) == []
