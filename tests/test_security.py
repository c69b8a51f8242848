"""What configurations of strangers may do: build models when loaded, write below the run when trained."""

import os

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from taming.checkpoint import load_model
from taming.config import (
    ConfigError,
    allow_targets,
    get_obj_from_str,
    instantiate_from_config,
    load_config,
    models_only,
    run_directory,
    storable,
)

NOT_MODELS = [
    "taming.data.shards.TarShards", "taming.data.custom.CustomTrain", "main.DataModuleFromConfig",
    "torchvision.transforms.Resize", "pytorch_lightning.loggers.CSVLogger", "main.ImageLogger",
    "pytorch_lightning.callbacks.ModelCheckpoint", "taming.callbacks.SetupCallback",
    "pytorch_lightning.loggers.TestTubeLogger", "taming.callbacks.LastCheckpoint",
]


@pytest.mark.parametrize("target", NOT_MODELS)
def test_loading_builds_models_only(tmp_path, target):
    place = str(tmp_path / "a")
    params = {"shards": "http://127.0.0.1:1/x", "cache_dir": place, "save_dir": place}
    for config in (
        {"target": target, "params": params},
        {"target": "taming.models.vqgan.VQModel", "params": {
            "ddconfig": dict(double_z=False, z_channels=4, resolution=8, in_channels=3, out_ch=3, ch=32,
                             ch_mult=[1], num_res_blocks=1, attn_resolutions=[], dropout=0.0),
            "lossconfig": {"target": target, "params": params}, "n_embed": 4, "embed_dim": 4}},
    ):
        torch.save({"state_dict": {"a": torch.ones(1)}, "config": {"model": config}}, tmp_path / "x.ckpt")
        with pytest.raises(ConfigError, match="not allowed.*models are loaded from this file"):
            load_model(tmp_path / "x.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]
    with models_only(), pytest.raises(ConfigError, match="not allowed"):
        get_obj_from_str(target)


@pytest.mark.parametrize("target, params", [
    ("pytorch_lightning.loggers.CSVLogger", {"save_dir": "{other}"}),
    ("pytorch_lightning.loggers.CSVLogger", {"save_dir": "{run}", "name": "../other"}),
    ("pytorch_lightning.loggers.CSVLogger", {"save_dir": "logs"}),
    ("pytorch_lightning.loggers.CSVLogger", {"save_dir": "~"}),
    ("pytorch_lightning.loggers.MLFlowLogger", {"tracking_uri": "http://127.0.0.1:1/"}),
    ("pytorch_lightning.callbacks.ModelCheckpoint", {"dirpath": "{run}/../other"}),
    ("pytorch_lightning.callbacks.ModelCheckpoint", {"dirpath": "{run}", "filename": "../../other/x"}),
    ("pytorch_lightning.callbacks.OnExceptionCheckpoint", {"dirpath": "{other}"}),
    ("taming.data.shards.TarShards", {"shards": "a.tar", "cache_dir": "{other}"}),
    ("taming.data.torchvision_sets.CIFAR10", {"root": "{other}", "download": True}),
])
def test_configurations_write_below_the_run_only(tmp_path, target, params):
    places = {"run": str(tmp_path / "run"), "other": str(tmp_path / "other")}
    params = {key: value if value is True else value.format(**places) for key, value in params.items()}
    with run_directory(tmp_path / "run"), pytest.raises(ConfigError, match="lies outside of .*--allow"):
        instantiate_from_config({"target": target, "params": params})
    with pytest.raises(ConfigError, match="lies outside of a run directory"):
        instantiate_from_config({"target": target, "params": params})
    assert list(tmp_path.iterdir()) == []


def test_the_run_and_what_the_caller_allows_may_be_written_to(tmp_path):
    params = {"save_dir": str(tmp_path / "run" / "a")}
    logger = {"target": "pytorch_lightning.loggers.CSVLogger", "params": params}
    with run_directory(tmp_path / "run"):
        assert instantiate_from_config(logger).save_dir == str(tmp_path / "run" / "a")
    allow_targets(f"{tmp_path}/run")
    assert instantiate_from_config(logger).save_dir == str(tmp_path / "run" / "a")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_links_do_not_lead_out_of_the_run(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(tmp_path / "other")
    logger = {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"save_dir": f"{tmp_path}/run/link"}}
    with run_directory(tmp_path / "run"), pytest.raises(ConfigError, match="lies outside"):
        instantiate_from_config(logger)


# ---- resolvers

RESOLVERS = ["${oc.env:SECRET}", "a${oc.env:SECRET}b", "${oc.env:${name}}", "${${oc.env:SECRET}}",
             "${oc.decode:${oc.env:SECRET}}", "${oc.select:x.${oc.env:SECRET}}"]


@pytest.mark.parametrize("text", RESOLVERS)
def test_resolvers_are_off(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "s3cr3t")
    config = {"name": "SECRET", "a": text, "b": "${a}", "model": {
        "target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 2, "dtype": "${b}"}}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "x.yaml")
    for found in (load_config(tmp_path / "x.yaml"), OmegaConf.load(tmp_path / "x.yaml")):
        with pytest.raises(ConfigError, match=r"uses the resolver .*, which is off.*--allow oc") as caught:
            instantiate_from_config(found.model)
        assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t" not in str(storable(load_config(tmp_path / "x.yaml")))
    torch.save({"state_dict": nn.Linear(3, 2).state_dict(), "config": config}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="which is off"):
        load_model(tmp_path / "x.ckpt")


def test_a_resolver_that_the_caller_allows_is_used_and_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTH", "3")
    (tmp_path / "x.yaml").write_text(
        "model: {target: torch.nn.Linear, "
        "params: {in_features: '${oc.decode:${oc.env:WIDTH}}', out_features: 2}}"
    )
    allow_targets("oc.env", "oc.decode")
    config = load_config(tmp_path / "x.yaml")
    assert instantiate_from_config(config.model).weight.shape == (2, 3)
    assert storable(config)["model"]["params"]["in_features"] == "${oc.decode:${oc.env:WIDTH}}"


# ---- references that stand for too much


def bomb(first: str, reference: str) -> str:
    levels = [reference.replace("N", str(i)).replace("M", str(i - 1)) for i in range(1, 10)]
    return "\n".join([first, *(f"a{i}: {level}" for i, level in enumerate(levels, 1))])


@pytest.mark.parametrize("text", [
    bomb("a0: &a0 [x, x, x, x, x, x, x, x, x, x]", "&aN [*aM, *aM, *aM, *aM, *aM, *aM, *aM, *aM, *aM, *aM]"),
    bomb("a0: xxxxxxxxxx", "'" + "${aM}" * 10 + "'"),
    bomb("a0: [x, x, x, x, x, x, x, x]", "['${aM}', '${aM}', '${aM}', '${aM}', '${aM}', '${aM}', '${aM}']"),
    bomb("e: z\na0: {z: xxxxxxxxxx}", "{z: '" + "${aM.${e}}" * 10 + "'}"),
    "a: ${b}\nb: ${a}", "a: {b: '${a}'}", "a: " + "[" * 5000, "a: " + "{b: " * 200 + "1" + "}" * 200,
    "a: " + "${b}" * 400, "a: " + "${" * 60 + "b" + "}" * 60, "a: '" + "x" * 300_000 + "'",
    "b: 1\n" + "\n".join(f"k{i}: ${{b}}" for i in range(1500)),
])
def test_small_files_do_not_become_large_configurations(tmp_path, text):
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ConfigError, match="bomb.yaml") as caught:
        load_config(tmp_path / "bomb.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_shared_lists_in_checkpoints_are_counted(tmp_path):
    shared: list = ["x"]
    for _ in range(14):
        shared = [shared] * 10
    config = {"model": {"target": "torch.nn.Linear"}, "x": shared}
    for content in ({"config": config}, {"callbacks": shared}):
        torch.save({"state_dict": {"a": torch.ones(1)}, **content}, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="stands for more than 1,000,000 values"):
            load_model(tmp_path / "x.ckpt")


@pytest.mark.parametrize("params", [
    {"in_features": 10**9, "out_features": 10**9}, {"in_features": 2**70, "out_features": 1},
    {"in_features": -1, "out_features": 1}, {"in_features": "x", "out_features": 1},
])
def test_models_of_any_size_are_one_line(tmp_path, params):
    config = {"model": {"target": "torch.nn.Linear", "params": params}}
    torch.save({"state_dict": {"a": torch.ones(1)}, "config": config}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be built with its config") as caught:
        load_model(tmp_path / "x.ckpt")
    assert len(str(caught.value).splitlines()) == 1
