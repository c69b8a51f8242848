"""Plain ddp, two processes on the CPU: both hold the same weights, and gradients are averaged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taming.modules.vqvae.quantize import EMAVectorQuantizer
from tests.ranks import on_two_ranks
from tests.tiny import write_transformer, write_vqgan

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(yaml, folder, devices, *words):
    """Train in processes of their own, and return what each wrote: gradients and weights."""
    command = [sys.executable, "main.py", "-b", yaml, "-t", "-l", folder / "logs", "-n", f"run{devices}"]
    command += ["--accelerator", "cpu", "--devices", devices, "--allow", "tests", *words]
    command += ["lightning.callbacks.record.target=tests.tiny.Record",
                f"lightning.callbacks.record.params.folder={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert len(list((folder / "logs").glob(f"*_run{devices}"))) == 1
    for rank in range(devices):
        assert (folder / f"group_{devices}_{rank}.txt").read_text() == "None"  # and no thread of it
    return [
        [torch.load(folder / f"{what}_{devices}_{rank}.pt", weights_only=True) for rank in range(devices)]
        for what in ("gradients", "weights")
    ]


def assert_equal_on_both(weights):
    first, second = weights
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_both_stages(tmp_path):
    words = ["model.params.ddconfig.dropout=0.0", "model.params.lossconfig.params.disc_start=2"]
    two = run(write_vqgan(tmp_path), tmp_path, 2, "--max_steps", 4, "data.params.batch_size=1", *words)
    assert_equal_on_both(two[1])  # the discriminator's part of it, which starts amid the run, too
    one = run(write_vqgan(tmp_path), tmp_path, 1, "--max_steps", 1, *words)
    for key, gradient in one[0][0].items():
        assert torch.allclose(two[0][0][key], gradient, atol=1e-5, rtol=1e-3), key

    folder = tmp_path / "second"
    folder.mkdir()
    yaml = write_transformer(folder, tmp_path / "logs" / "*_run2")
    assert_equal_on_both(run(yaml, folder, 2, "--max_steps", 2)[1])


def learn(rank, latents):
    """One of two processes: half of each batch, and the codebook that follows."""
    return running_means(latents.chunk(2, dim=1)[rank]).state_dict()


def running_means(latents):
    torch.manual_seed(0)
    quantizer = EMAVectorQuantizer(6, 4, beta=0.25, decay=0.8)
    for batch in latents:
        quantizer(batch)
    return quantizer


def test_running_means_follow_the_latents_of_all_processes(tmp_path):
    latents = torch.randn(5, 4, 4, 3, 3)  # batches of 4 maps
    want = running_means(latents).state_dict()
    for got in on_two_ranks(learn, tmp_path, latents):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not torch.equal(want["embedding.weight"], running_means(latents[:1]).embedding.weight)
