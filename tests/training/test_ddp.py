"""Several processes on the CPU: they learn what one learns from the joined batch, and end together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taming.modules.vqvae.quantize import EMAVectorQuantizer
from tests.ranks import main_on_ranks, on_two_ranks
from tests.tiny import trouble, write_transformer, write_vqgan

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def recording(folder):
    """Words of a command line that let each process write its gradients and weights into a folder."""
    folder.mkdir(exist_ok=True)
    return ["lightning.callbacks.record.target=tests.tiny.Record",
            f"lightning.callbacks.record.params.folder={folder}"]


def recorded(what, folder, devices):
    return [
        torch.load(folder / f"{what}_{devices}_{rank}.pt", weights_only=True) for rank in range(devices)
    ]


def assert_equal_on_all(weights):
    first, *others = weights
    for other in others:
        assert first.keys() == other.keys()
        for key in first:
            assert torch.equal(first[key], other[key]), key


def run(yaml, folder, devices, *words):
    """Train by main.py, which starts the other processes itself."""
    command = [sys.executable, "main.py", "-b", yaml, "-t", "-l", folder / "logs", "-n", f"run{devices}"]
    command += ["--accelerator", "cpu", "--devices", devices, "--allow", "tests", *recording(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert len(list((folder / "logs").glob(f"*_run{devices}"))) == 1
    for rank in range(devices):
        assert (folder / f"group_{devices}_{rank}.txt").read_text() == "None"  # and no thread of it


def test_both_stages(tmp_path):
    words = ["--max_steps", 4, "data.params.batch_size=1", "model.params.lossconfig.params.disc_start=2"]
    run(write_vqgan(tmp_path), tmp_path, 2, *words)
    assert_equal_on_all(recorded("weights", tmp_path, 2))  # the discriminator's too, which starts in the run

    folder = tmp_path / "second"
    folder.mkdir()
    yaml = write_transformer(folder, tmp_path / "logs" / "*_run2")
    main_on_ranks(2, "-b", yaml, "-t", "-l", folder / "logs", "--max_steps", 2, *recording(folder))
    assert_equal_on_all(recorded("weights", folder, 2))


ACTNORM = "model.params.lossconfig.params.use_actnorm"
LECAM = "model.params.lossconfig.params.lecam_weight=0.5"  # its means are those of all processes
NORMS = {"ActNorm": [f"{ACTNORM}=true", LECAM], "BatchNorm": [f"{ACTNORM}=false", "--sync_batchnorm", "True"]}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("devices", [2, 4])
def test_gradients_are_those_of_the_joined_batch(tmp_path, devices, norm):
    """Of both networks, with the adaptive weight, in the first batch that the discriminator sees.

    Its own gradient is a difference, of real and generated images, in which float32 leaves 2e-5; see
    `test_sync_batchnorm` for the same in float64.
    """
    words = ["-b", write_vqgan(tmp_path), "-t", "-l", tmp_path / "logs", "--max_steps", 1, "--no-test"]
    words += [*NORMS[norm], *recording(tmp_path / "record"), "model.params.ddconfig.dropout=0.0"]
    words += ["model.params.lossconfig.params.disc_start=0", "lightning.trainer.limit_val_batches=0"]
    main_on_ranks(devices, *words, "-n", "several", f"data.params.batch_size={4 // devices}")
    main_on_ranks(1, *words, "-n", "one", "data.params.batch_size=4")
    (wanted,) = recorded("gradients", tmp_path / "record", 1)
    several = recorded("gradients", tmp_path / "record", devices)
    assert_equal_on_all(several)
    for network, tolerance in (("encoder", 1e-5), ("decoder", 1e-5), ("quant", 1e-5), ("loss", 5e-5)):
        keys = [key for key in wanted if key.startswith(network)]
        one, mean = (torch.cat([each[key].flatten() for key in keys]) for each in (wanted, several[0]))
        assert 0 < one.norm() and (mean - one).norm() < tolerance * one.norm(), network


@pytest.mark.parametrize(("kind", "rank", "at", "first"), [
    ("file", 1, 1, f"error: cannot read image {ROOT / 'tests' / 'tiny.py'}"),
    ("error", 0, 3, "process 1 of 2 failed: RuntimeError: something unforeseen"),
], ids=["second", "first"])
def test_a_process_that_fails_says_why_and_ends_the_others(tmp_path, kind, rank, at, first):
    words = [*trouble(kind=kind, at=at, rank=rank), "--devices", 2, "--accelerator", "cpu"]
    command = [sys.executable, "main.py", "-b", write_vqgan(tmp_path), "-t", "-l", tmp_path / "logs", *words]
    result = subprocess.run(
        [*map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=120,
    )
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if "fail" in line or "rror" in line]
    assert said[0].startswith(first)
    if rank:
        assert said[-1] == "error: another process failed, and printed its error"
        assert "[rank0]" not in result.stderr
    saved = list(tmp_path.glob("logs/*/checkpoints/last.ckpt"))
    assert ("resume with" in result.stdout) == (at == 3) == bool(saved)  # from nothing that is not there


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


def begin(rank, latents):
    """One of two processes, with random numbers of its own: where codebooks begin in its half of a batch."""
    torch.manual_seed(rank)
    books = [EMAVectorQuantizer(size, 4, beta=0.25, kmeans_steps=3) for size in (1, 6)]
    for book in books:
        book(latents.chunk(2)[rank])
    return {str(book.n_e): book.embedding.weight for book in books}


def test_codebooks_begin_on_clusters_of_the_latents_of_all_processes(tmp_path):
    latents = torch.randn(4, 4, 3, 3)
    first, second = on_two_ranks(begin, tmp_path, latents)
    assert torch.equal(first["6"], second["6"]) and len(first["6"].unique(dim=0)) == 6
    torch.testing.assert_close(first["1"], latents.mean((0, 2, 3))[None])  # a single code is their mean
