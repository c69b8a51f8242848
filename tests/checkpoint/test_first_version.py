"""Runs that the first version of the library made: they load, resume, and give its numbers."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from taming.checkpoint import load_model, read_checkpoint
from taming.training.command import main

RUNS = Path(__file__).parents[3] / "shared" / "first_version"
pytestmark = pytest.mark.skipif(not RUNS.is_dir(), reason=f"needs the runs in {RUNS}")


@pytest.fixture(scope="module")
def expected():
    return load_file(RUNS / "expected.safetensors")


def test_the_vqgan_gives_its_codes_and_images(expected):
    model, _, step = load_model(RUNS / "vq")
    assert step == 12
    with torch.no_grad():
        codes = model.encode(expected["x"])[2][2].view(2, 8, 8)
        images = model(expected["x"])[0]
    assert torch.equal(codes, expected["indices"])
    torch.testing.assert_close(images, expected["rec"], atol=1e-5, rtol=0)


def test_the_transformer_gives_its_tokens_and_logits(expected):
    model, _, step = load_model(RUNS / "tr")
    assert step == 12
    generator = torch.Generator().manual_seed(5)
    torch.rand(2, 3, 32, 32, generator=generator)
    maps = one_hot(torch.randint(0, 10, (2, 32, 32), generator=generator), 10).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        _, tokens = model.encode_to_c([torch.tensor([3, 9]), maps])
        assert torch.equal(tokens, expected["cond_tokens"])
        nothing = torch.zeros(2, 0, dtype=torch.long)
        greedy = model.sample(nothing, tokens, 64, sample=False)
        assert torch.equal(greedy, expected["greedy"])
        logits, _ = model.transformer(torch.cat((tokens, greedy[:, :-1]), dim=1))
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vq", "tr"])
def test_the_runs_go_on(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "logs" / name
    shutil.copytree(RUNS / name, run)
    for folder in (run, *run.rglob("*")):
        folder.chmod(0o755 if folder.is_dir() else 0o644)
    before = read_checkpoint(run / "checkpoints" / "last.ckpt", tensors=("state_dict",))["state_dict"]
    assert main(["-t", "-r", str(run), "--max_steps", "14", "--no-test"]) == 0
    after = read_checkpoint(run / "checkpoints" / "last.ckpt", tensors=("state_dict",))
    assert after["batches_seen"] == 14 and after["state_dict"].keys() == before.keys()
    changed = [key for key, value in after["state_dict"].items() if not torch.equal(value, before[key])]
    assert changed and not any(key.startswith("first_stage_model.") for key in changed)
