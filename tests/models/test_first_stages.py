"""Every first stage beside the VQGAN: through the command, stopped, and resumed to the same numbers."""

import pytest
import torch

from taming.checkpoint import load_model, read_checkpoint
from tests.ranks import main_on_ranks
from tests.tiny import DATA, curves, resume, train

STEPS = 6  # one epoch and a half
VQ_NETWORKS = "{in_channels: 3, out_ch: 3, resolution: 32, ch: 16, num_res_blocks: 1, res_ch: 8}"
MODELS = {
    "vqvae.VQVAE": f"""
    {{n_embed: 8, embed_dim: 4, monitor: val/rec_loss, kmeans_steps: 2, revive_after: 2,
     ddconfig: {VQ_NETWORKS}}}""",
    "vqvae2.VQVAE2": f"""
    {{n_embed: 8, embed_dim: 4, monitor: val/rec_loss, revive_after: 2, ddconfig: {VQ_NETWORKS}}}""",
    "two_level.TwoLevelVQModel": """
    {n_embed: 8, embed_dim: 4, monitor: val/rec_loss, kmeans_steps: 2, decay: 0.9,
     ddconfig:
       {double_z: false, z_channels: 16, resolution: 32, in_channels: 3, out_ch: 3, ch: 16,
        ch_mult: [1, 1, 1], num_res_blocks: 1, attn_resolutions: [], dropout: 0.1, num_groups: 4},
     lossconfig:
       {target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator,
        params: {perceptual_weight: 0.0, disc_start: 2, disc_num_layers: 1, disc_ndf: 8}}}""",
    "vae.GaussianVAE": """
    {monitor: val/loss, likelihood: disc_logistic, kl_warmup: 4, free_bits: 0.1,
     ddconfig: {in_channels: 3, resolution: 32, latent_dim: 4, ch: 4}}""",
    "autoencoder_kl.AutoencoderKL": """
    {embed_dim: 4, monitor: val/rec_loss,
     ddconfig:
       {double_z: true, z_channels: 4, resolution: 32, in_channels: 3, out_ch: 3, ch: 16, ch_mult: [1, 1],
        num_res_blocks: 1, attn_resolutions: [], dropout: 0.1, num_groups: 4},
     lossconfig:
       {target: ldm.modules.losses.LPIPSWithDiscriminator,
        params: {perceptual_weight: 0.0, disc_start: 2, disc_num_layers: 1, disc_ndf: 8}}}""",
}


def write(name, folder):
    """Write the YAML of a model and its data, and return its name."""
    yaml = folder / "model.yaml"
    model = f"base_learning_rate: 1.0e-3, target: taming.models.{name}, params: {MODELS[name]}"
    yaml.write_text(f"model: {{{model}}}\n{DATA}")
    return yaml


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_keep_the_same_weights(name, tmp_path):
    """Gradients and codebooks are those of both; the discriminator waits for its third batch."""
    words = ["-b", write(name, tmp_path), "-t", "-l", tmp_path / "logs", "--max_steps", 3]
    record = "lightning.callbacks.record"
    words += [f"{record}.target=tests.tiny.Record", f"{record}.params.folder={tmp_path}"]
    words += ["data.params.batch_size=2"]
    main_on_ranks(2, *words)
    first, second = (torch.load(tmp_path / f"weights_2_{rank}.pt", weights_only=True) for rank in (0, 1))
    statistics = ("running_mean", "running_var")  # of batch normalization, each process its own
    keys = [key for key in first if not key.endswith(statistics)]
    assert len(keys) > 20 and all(torch.equal(first[key], second[key]) for key in keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_repeats_the_uninterrupted_one(name, tmp_path):
    yaml = write(name, tmp_path)
    whole = train(yaml, tmp_path, "whole", "--max_steps", STEPS)
    part = train(yaml, tmp_path, "part", "--max_steps", 3)
    resume(part, "--max_steps", STEPS)
    rows = [row for row in curves(part) if "train/" in str(row) or row["step"] != "2"]  # validated at its end
    assert rows == curves(whole) and len([row for row in rows if "train/lr" in row]) == STEPS
    states = [read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (whole, part)]
    assert states[0]["batches_seen"] == states[1]["batches_seen"] == STEPS
    assert all(torch.equal(states[1]["state_dict"][key], v) for key, v in states[0]["state_dict"].items())
    assert {path.name for path in (whole / "images" / "train").iterdir()} >= {"sheet_000001.png"}
    model, _, step = load_model(whole)
    assert step == STEPS and model.reconstruct(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
