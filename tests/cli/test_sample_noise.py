"""Samples of models that turn noise into images, and what is said of those that cannot."""

import pytest
import torch
from PIL import Image

from taming.checkpoint import load_model, save_exported
from taming.cli import command
from taming.config import instantiate_from_config
from taming.images import load_png, to_uint8
from taming.sampling import image_generators

main = command("sample")
VAE = {"target": "taming.models.vae.GaussianVAE", "params": {
    "ddconfig": {"in_channels": 3, "resolution": 16, "latent_dim": 4, "ch": 4, "norm": "batch"},
}}
TRANSGAN = {"target": "taming.models.transgan.TransGAN", "params": {
    "generator": {"resolution": 16, "dim": 32, "depths": [1, 1, 1], "latent_dim": 8, "heads": 2},
    "discriminator": {"resolution": 16, "dim": 8, "depth": 1, "heads": 2, "patch_size": 4},
}}
KL = {"target": "taming.models.autoencoder_kl.AutoencoderKL", "params": {
    "embed_dim": 4, "lossconfig": {"target": "taming.modules.losses.DummyLoss"}, "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8,
        "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "num_groups": 4,
    },
}}


def export(folder, model):
    torch.manual_seed(0)
    return save_exported(instantiate_from_config(model), {"model": model}, folder, step=7)


@pytest.mark.parametrize("config", [VAE, TRANSGAN], ids=["VAE", "TransGAN"])
def test_images_of_noise_are_those_of_their_seeds(config, tmp_path, capsys):
    run, out = export(tmp_path / "run", config), tmp_path / "out"
    words = ["-r", str(run), "-o", str(out), "-n", "5", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--batch-size", "2", "--grid"]) == 0
    assert "5 samples" in capsys.readouterr().out
    model = load_model(run)[0]
    wanted = torch.cat([model.eval().sample(1, each) for each in image_generators(3, range(5))])
    for i, image in enumerate(wanted):
        assert torch.equal(to_uint8(load_png(out / f"sample_{i:06d}.png")), to_uint8(image))
    with Image.open(out / "sample_000004.png") as png:
        assert png.info["seed"] == "3" and png.info["step"] == "7" and "top_k" not in png.info
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (3 * 18 + 2, 2 * 18 + 2)
    assert main(words) == 0
    assert "5 of them there already" in capsys.readouterr().out
    assert main([*words[:-4], "--seed", "4"]) == 1  # another seed is another image
    assert "was generated with seed 3" in capsys.readouterr().err
    assert main(["-r", str(run), "-n", "1"]) == 0  # beside the run
    assert (run / "samples" / "seed_0" / "7" / "sample_000000.png").exists()


@pytest.mark.parametrize(("config", "words", "message"), [
    (VAE, ["--top-k", "5"], "top_k is for transformers: GaussianVAE makes each image of noise at once"),
    (TRANSGAN, ["--precision", "bf16"], "precision is for transformers"),
    (TRANSGAN, ["--classes", "3"], "--classes 3: TransGAN has no condition; leave it out"),
    (KL, [], "AutoencoderKL: it has no prior over its latents, and only gives back images; see `taming"),
])
def test_what_cannot_be_is_said_in_one_line(config, words, message, tmp_path, capsys):
    run = export(tmp_path / "run", config)
    assert main(["-r", str(run), "-o", str(tmp_path / "out"), *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()
