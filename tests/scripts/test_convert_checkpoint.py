"""The command over taming.checkpoint.convert, by its two names of 2021: options, output and errors."""

import pytest
import torch
from safetensors.torch import load_file

from scripts.convert_checkpoint import main as convert
from scripts.extract_submodel import main as extract
from taming.checkpoint import load_model, save_exported
from taming.config import instantiate_from_config
from tests.scripts.test_reconstruct import STAGE

GPT = {"vocab_size": 16, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 8}
MODEL = {
    "target": "taming.models.cond_transformer.Net2NetTransformer",
    "params": {
        "first_stage_config": STAGE, "cond_stage_config": "__is_unconditional__",
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": GPT},
    },
}


@pytest.fixture
def folder(tmp_path):
    return save_exported(instantiate_from_config(MODEL), {"model": MODEL}, tmp_path / "export", step=5)


def test_there_and_back(folder, tmp_path, capsys):
    assert convert([str(folder), str(tmp_path / "x.ckpt")]) == 0
    assert f"written: {tmp_path / 'x.ckpt'} (1.2 MB)" in capsys.readouterr().out
    assert convert([str(tmp_path / "x.ckpt"), str(tmp_path / "again")]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert load_model(tmp_path / "again")[2] == 5


def test_a_part_by_default_by_option_and_as_in_2021(folder, tmp_path, capsys):
    for words, key in (
        ([], "quant_conv.weight"), (["--prefix", "transformer"], "tok_emb.weight"),
        (["transformer"], "tok_emb.weight"),
    ):
        assert extract([str(folder), str(tmp_path / "part.ckpt"), *words]) == 0
        assert key in torch.load(tmp_path / "part.ckpt")["state_dict"]
    assert "written: transformer to" in capsys.readouterr().out
    words = [str(folder), str(tmp_path / "part.ckpt"), "transformer", "--prefix", "first_stage_model"]
    assert extract(words) == 1
    assert "two parts are named: first_stage_model and transformer" in capsys.readouterr().err


@pytest.mark.parametrize("command", [convert, extract])
def test_errors_are_one_line(command, folder, tmp_path, capsys):
    assert command([str(tmp_path / "nowhere"), str(tmp_path / "x.ckpt")]) == 1
    assert command([str(folder), str(folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "error"]
    assert "nowhere" in lines[0] and "is what is read" in lines[1]


@pytest.mark.parametrize("command", [convert, extract])
def test_help_shows_how(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "taming convert" in text and "model.safetensors" in text and "--config YAML" in text
