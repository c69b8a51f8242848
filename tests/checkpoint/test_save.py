"""What checkpoints and exports carry, and what happens to them on a full disk."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from taming import __version__
from taming.checkpoint import load_model, read_checkpoint, save_exported, write_checkpoint
from taming.checkpoint.convert import convert
from taming.config import allow_targets
from tests.checkpoint.test_load import CONFIG, save


def paths_in(value) -> list[str]:
    """List the texts and keys in nested containers that are absolute paths."""
    if isinstance(value, dict):
        return [found for item in value.items() for found in paths_in(list(item))]
    if isinstance(value, list | tuple):
        return [found for item in value for found in paths_in(item)]
    return [value] if isinstance(value, str) and value.startswith("/") else []


# ---- paths


def test_checkpoints_carry_no_paths_of_the_machine(tmp_path):
    run = tmp_path / "logs" / "run"
    file = run / "checkpoints" / "last.ckpt"
    (tmp_path / "photos").mkdir()
    best = str(run / "checkpoints" / "epoch=1.ckpt")
    content = {
        "state_dict": nn.Linear(3, 2).state_dict(),
        "callbacks": {"ModelCheckpoint": {
            "best_model_path": best, "dirpath": str(run / "checkpoints"), "best_k_models": {best: 0.5},
            "last_model_path": "", "elsewhere": str(tmp_path / "photos" / "a.png"),
        }},
        "config": {**CONFIG, "data": {"folder": str(tmp_path / "photos"), "id": "/m/01g317", "root": "/"}},
        "texts": ["val/rec_loss", "a b", "https://host/a", "~/a"],
    }
    write_checkpoint(content, file)
    written = torch.load(file, weights_only=True)
    assert str(tmp_path).encode() not in file.read_bytes()
    assert written["callbacks"]["ModelCheckpoint"] == {
        "best_model_path": "run:checkpoints/epoch=1.ckpt", "dirpath": "run:checkpoints",
        "best_k_models": {"run:checkpoints/epoch=1.ckpt": 0.5}, "last_model_path": "", "elsewhere": "a.png",
    }
    assert written["config"]["data"] == {"folder": "photos", "id": "/m/01g317", "root": "/"}
    assert written["texts"] == content["texts"]
    assert content["callbacks"]["ModelCheckpoint"]["best_model_path"] == best  # the content stays as it was


def test_a_run_that_was_moved_finds_its_files(tmp_path):
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "run"
    paths = {"best": str(run / "checkpoints" / "a.ckpt"), "models": {str(run / "b"): 1}, "run": str(run)}
    run.mkdir()
    content = {"state_dict": {"a": torch.ones(1)}, "callbacks": paths}
    write_checkpoint(content, run / "checkpoints" / "last.ckpt")
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["callbacks"] == paths
    moved.parent.mkdir()
    run.rename(moved)
    found = read_checkpoint(moved / "checkpoints" / "last.ckpt")["callbacks"]
    assert found == {"best": f"{moved}/checkpoints/a.ckpt", "models": {f"{moved}/b": 1}, "run": str(moved)}


def test_exports_carry_no_paths_of_the_machine(tmp_path):
    data = {"folder": str(tmp_path), "files": [str(tmp_path / "a"), "photos/a"], "ckpt_path": str(tmp_path)}
    folder = save_exported(nn.Linear(3, 2), {**CONFIG, "data": data}, tmp_path / "export")
    for name in ("config.yaml", "config.json", "README.md"):
        assert str(tmp_path.parent) not in (folder / name).read_text(), name
    assert load_model(folder)[1].data == {"folder": tmp_path.name, "files": ["a", "photos/a"]}


def test_converting_strips_paths_as_well(tmp_path):
    config = {**CONFIG, "data": {"folder": str(tmp_path)}}
    file = save(nn.Linear(3, 2), tmp_path / "old.ckpt", config=config)
    convert(file, tmp_path / "new.ckpt")
    assert not paths_in(torch.load(tmp_path / "new.ckpt", weights_only=True)["config"])
    convert(file, tmp_path / "folder")
    assert not paths_in(yaml.safe_load((tmp_path / "folder" / "config.yaml").read_text()))


# ---- the environment


def test_values_of_the_environment_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("TAMING_SECRET", "s3cr3t")
    allow_targets("oc.env")
    data = {"key": "${oc.env:TAMING_SECRET}", "same": "${data.key}", "n": "${model.target}"}
    config = {**CONFIG, "data": data}
    folder = save_exported(nn.Linear(3, 2), config, tmp_path / "export")
    file = save(nn.Linear(3, 2), tmp_path / "x.ckpt", config=config)
    convert(file, tmp_path / "y.ckpt")
    for written in (*folder.iterdir(), tmp_path / "y.ckpt"):
        assert b"s3cr3t" not in written.read_bytes(), written
    assert "${oc.env:TAMING_SECRET}" in (folder / "config.yaml").read_text()
    assert load_model(folder)[1].data.n == "torch.nn.Linear"


# ---- the card


def test_an_export_has_a_card_and_a_config_for_the_hub(tmp_path):
    folder = save_exported(nn.Linear(3, 2), CONFIG, tmp_path)
    described = json.loads((folder / "config.json").read_text())
    assert described == {"library_name": "taming", "taming_version": __version__, **CONFIG}
    _, head, body = (folder / "README.md").read_text().split("---\n")
    head = yaml.safe_load(head)
    assert head["library_name"] == "taming" and "taming" in head["tags"]
    assert body.startswith("\n# Linear\n") and "8 parameters" in body
    code = body.split("```python\n")[1].split("```")[0]
    code = code.replace("this folder, or owner/name on the model hub", str(folder))
    names: dict = {}
    exec(code, names)
    assert names["model"].weight.shape == (2, 3) and names["step"] == 0


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("my words")
    save_exported(nn.Linear(3, 2), CONFIG, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my words"


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20)
    except OSError as error:
        pytest.skip(f"cannot mount a disk: {error}")
    if done.returncode:
        pytest.skip("needs the right to mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=20)


def test_a_full_disk_is_named_and_the_old_file_stays(small_disk, tmp_path):
    layers = {"target": "torch.nn.Linear", "params": {"in_features": 600, "out_features": 600}}  # 1.4 MB
    large = save(nn.Linear(600, 600), tmp_path / "large.ckpt", config={"model": layers})
    small = save(nn.Linear(3, 2), tmp_path / "small.ckpt", config=CONFIG)
    for target in ("x.ckpt", "folder"):
        convert(small, small_disk / target)
        before = {file: file.read_bytes() for file in small_disk.rglob("*") if file.is_file()}
        with pytest.raises(OSError) as caught:
            convert(large, small_disk / target)
        assert caught.value.errno == errno.ENOSPC and caught.value.strerror == os.strerror(errno.ENOSPC)
        assert Path(caught.value.filename) in before
        assert {file: file.read_bytes() for file in small_disk.rglob("*") if file.is_file()} == before
        assert load_model(small_disk / target)[0].weight.shape == (2, 3)


@pytest.mark.parametrize("target", ["x.ckpt", "folder"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path, target):
    (tmp_path / "x.ckpt").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").mkdir()
    with pytest.raises(OSError) as caught:
        if target == "folder":
            save_exported(nn.Linear(3, 2), CONFIG, tmp_path / "folder")
        else:
            write_checkpoint({"state_dict": {}}, tmp_path / "x.ckpt")
    assert str(tmp_path / target) in caught.value.filename
    assert not list(tmp_path.rglob("*.part"))
