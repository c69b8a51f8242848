"""FSDP2: what sharded processes learn, and that their checkpoints are ordinary ones."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from taming.checkpoint import load_model, read_checkpoint
from taming.training.command import main
from taming.training.sharding import ShardedStrategy, resolve_strategy
from tests import tiny
from tests.ranks import main_on_ranks

slow = pytest.mark.slow
STEPS = 2  # per epoch, of 4 images
WORDS = [
    "data.params.train.params.length=8", "data.params.train.params.cache=true",
    "lightning.callbacks.image_logger.params.batch_frequency=2",
    "model.params.pkeep=1.0", "model.params.transformer_config.params.n_layer=2",
    "model.params.transformer_config.params.embd_pdrop=0.0",
    "model.params.transformer_config.params.resid_pdrop=0.0", "--gradient_clip_val", 0.5, "--no-test",
    "--scale_lr", "False",
]




def first_stage(tmp_path):
    """Train a VQGAN, and return its run."""
    return tiny.train(tiny.write_vqgan(tmp_path), tmp_path, "first", "--max_steps", 1)


def train(yaml, folder, count, epochs, *words):
    """Train by so many processes, sharded if there are several, so that all have 4 images a step."""
    start = ["-r", next(folder.glob("*_run"))] if list(folder.glob("*_run")) else ["-b", yaml, "-n", "run"]
    words = ["-t", "-l", folder, *start, "--max_epochs", epochs, f"data.params.batch_size={4 // count}",
             *WORDS, *words]
    if count == 1:  # a resumed run has the strategy and the devices in its configuration
        words += ["--accelerator", "cpu", "--devices", 1, "--strategy", "auto"]
        assert main([*map(str, words)]) == 0
    else:
        main_on_ranks(count, *words, "--strategy", "fsdp2")
    return next(folder.glob("*_run"))


@slow
def test_four_processes_then_two_then_one_learn_what_one_learns(tmp_path):
    yaml = tiny.write_transformer(tmp_path, first_stage(tmp_path))
    for epochs, count in enumerate((4, 2, 1), start=1):
        run = train(yaml, tmp_path / "sharded", count, epochs)
        if count > 1:  # a whole checkpoint, with the moments of the optimizer
            checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
            (moments,) = checkpoint["optimizer_states"]
            tensors = [*checkpoint["state_dict"].values(),
                       *(x for state in moments["state"].values() for x in state.values())]
            assert not any(isinstance(x, DTensor) for x in tensors)
            assert checkpoint["batches_seen"] == STEPS * epochs
    whole = train(yaml, tmp_path / "whole", 1, 3)
    found, expected = tiny.curves(run), tiny.curves(whole)
    losses = [[float(row["val/loss"]) for row in rows if "val/loss" in row] for rows in (found, expected)]
    assert len(losses[0]) == 3
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    norms = [[float(row["train/grad_norm"]) for row in rows if "train/grad_norm" in row]
             for rows in (found, expected)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-4, atol=0)
    states = [read_checkpoint(each / "checkpoints" / "last.ckpt") for each in (run, whole)]
    torch.testing.assert_close(*(state["state_dict"] for state in states), rtol=0, atol=1e-5)
    moments = [state["optimizer_states"][0]["state"] for state in states]
    torch.testing.assert_close(*moments, rtol=0, atol=1e-6)
    assert (run / "images" / "train").is_dir()  # sampled from whole weights
    load_model(run / "checkpoints" / "last.ckpt")


def test_fsdp_of_lightning_on_a_cpu_is_explained(capsys, tmp_path):
    with pytest.raises(ValueError, match="fsdp needs GPUs.*use --strategy fsdp2"):
        resolve_strategy("fsdp", "cpu")
    assert resolve_strategy("fsdp", "gpu") == "fsdp"
    assert resolve_strategy("ddp", "cpu") == "ddp"
    assert isinstance(resolve_strategy("fsdp2", "cpu"), ShardedStrategy)
    words = ["-b", str(tiny.write_vqgan(tmp_path)), "-t", "-l", str(tmp_path), "--accelerator", "cpu"]
    assert main([*words, "--strategy", "fsdp"]) == 1
    assert "fsdp needs GPUs" in capsys.readouterr().err


def test_a_tokenizer_is_not_sharded(tmp_path, capsys):
    words = ["-b", str(tiny.write_vqgan(tmp_path)), "-t", "-l", str(tmp_path), "--accelerator", "cpu"]
    assert main([*words, "--strategy", "fsdp2"]) == 1
    assert "shards the prior of stage 2, which VQModel has not: use ddp" in capsys.readouterr().err


@slow
@pytest.mark.gpu
def test_on_a_gpu_sharded_weights_learn_what_whole_ones_do(tmp_path):
    yaml = tiny.write_transformer(tmp_path, first_stage(tmp_path))
    losses = []
    for strategy in ("auto", "fsdp2"):
        run = tiny.train(yaml, tmp_path, f"on_{strategy}", "--strategy", strategy, "--gpus", "0,",
                         "--max_steps", 4, *WORDS)
        losses.append([float(row["train/loss"]) for row in tiny.curves(run) if "train/loss" in row])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
