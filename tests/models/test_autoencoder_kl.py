"""The KL autoencoder: latent diffusion's configs, keys and loss; training; bad input."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from taming.checkpoint import load_model
from taming.config import instantiate_from_config
from taming.models.autoencoder_kl import AutoencoderKL
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.losses.latent_diffusion import LPIPSWithDiscriminator
from taming.modules.vae.gaussian import DiagonalGaussian

# What the published files look like, at full size: channels, ch_mult, attention, and weights where known.
PUBLISHED = {
    "kl-f4": (3, [1, 2, 4], [], None),
    "kl-f8, Stable Diffusion": (4, [1, 2, 4, 4], [], 83_653_863),
    "kl-f16": (16, [1, 1, 2, 2, 4], [16], None),
}
LDM = """
model:
  base_learning_rate: 4.5e-6
  target: ldm.models.autoencoder.AutoencoderKL
  params:
    monitor: val/rec_loss
    embed_dim: {channels}
    lossconfig: {loss}
    ddconfig:
      {{double_z: true, z_channels: {channels}, resolution: 256, in_channels: 3, out_ch: 3, ch: 128,
        ch_mult: {ch_mult}, num_res_blocks: 2, attn_resolutions: {attention}, dropout: 0.0}}
"""
LOSSES = (
    "{target: ldm.modules.losses.LPIPSWithDiscriminator, params: {disc_start: 50001, kl_weight: 0.000001, "
    "disc_weight: 0.5}}",
    "{target: torch.nn.Identity}",  # inside Stable Diffusion
)
SMALL = dict(
    double_z=True, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=8, ch_mult=[1, 2],
    num_res_blocks=1, attn_resolutions=[], dropout=0.0, num_groups=4,
)
NO_LOSS = {"target": "torch.nn.Identity"}


def small(loss=NO_LOSS, channels=3, **params):
    ddconfig = {**SMALL, "in_channels": channels, "out_ch": channels}
    return AutoencoderKL(**{"ddconfig": ddconfig, "lossconfig": loss, "embed_dim": 5} | params)


def images(n=2, size=(16, 16), channels=3):
    return torch.rand(n, channels, *size) * 2 - 1


@pytest.mark.parametrize("loss", LOSSES, ids=["trained", "used"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_build(name, loss):
    channels, ch_mult, attention, count = PUBLISHED[name]
    config = OmegaConf.create(LDM.format(channels=channels, ch_mult=ch_mult, attention=attention, loss=loss))
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    assert type(model) is AutoencoderKL and model.factor == 2 ** (len(ch_mult) - 1)
    networks = [p for key, p in model.named_parameters() if not key.startswith("loss.")]
    assert count in (None, sum(p.numel() for p in networks))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes["quant_conv.weight"] == (2 * channels, 2 * channels, 1, 1)
    assert shapes["post_quant_conv.weight"] == (channels, channels, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (2 * channels, 512, 3, 3)
    assert shapes["decoder.conv_in.weight"] == (512, channels, 3, 3)
    keys = {"encoder.down.0.block.0.norm1.weight", "decoder.mid.attn_1.q.weight",
            "decoder.up.1.upsample.conv.bias", "encoder.mid.block_2.conv2.bias", "decoder.norm_out.weight"}
    assert keys <= set(shapes) and ("loss.logvar" in shapes) == ("LPIPS" in loss)


def test_files_of_both_projects_load(tmp_path):
    model = small().eval()
    config = {"model": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
        "ddconfig": SMALL, "lossconfig": NO_LOSS, "embed_dim": 5}}}
    state = model.state_dict()
    others = {"model.diffusion_model.out.weight": torch.zeros(3), "cond_stage_model.x": torch.zeros(2)}
    files = {
        "plain": {**state, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(4)},
        "whole": {**{f"first_stage_model.{key}": value for key, value in state.items()}, **others},
    }
    x = images()
    for name, content in files.items():
        torch.save({"state_dict": content, "global_step": 7}, tmp_path / f"{name}.ckpt")
        loaded, _, step = load_model(tmp_path / f"{name}.ckpt", AutoencoderKL, config=config)
        assert step == 7 and torch.equal(loaded.reconstruct(x), model.reconstruct(x)), name


# ---- the loss


def loss(**params):
    return LPIPSWithDiscriminator(**{"perceptual_weight": 0.0, "disc_num_layers": 1} | params)


def test_the_loss_is_a_sum_over_pixels_with_a_learned_variance():
    x, rec = images(), images().requires_grad_()
    posterior = DiagonalGaussian(torch.randn(2, 8, 4, 4))
    ours = loss(disc_start=10, kl_weight=0.3, logvar_init=0.7, pixelloss_weight=2.0)
    total, log = ours(x, rec, posterior, 0, 0)
    distance = 2.0 * (x - rec).abs()
    nll = (distance / math.exp(0.7) + 0.7).sum() / 2
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum() / 2
    torch.testing.assert_close(total, nll + 0.3 * kl)
    assert {key: value.item() for key, value in log.items() if key != "train/disc_factor"} == pytest.approx({
        "train/total_loss": total.item(), "train/nll_loss": nll.item(), "train/kl_loss": kl.item(),
        "train/rec_loss": distance.mean().item(), "train/p_loss": 0.0, "train/logvar": 0.7,
    }, rel=1e-5)
    total.backward()  # the best s is the logarithm of the mean distance, where this is 0
    slope = (1 - distance.detach() / math.exp(0.7)).sum() / 2
    assert ours.logvar.grad.item() == pytest.approx(slope.item(), rel=1e-4)


def test_the_adversarial_term_is_that_of_the_vqgan():
    model = small({"target": "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator", "params": dict(
        disc_start=3, perceptual_weight=0.0, disc_num_layers=1, disc_ndf=4)})
    assert type(model.loss) is LPIPSWithDiscriminator
    x = images()
    rec, posterior = model(x)
    early = model.loss(x, rec, posterior, 0, 2, last_layer=model.get_last_layer())[1]
    assert "train/g_loss" not in early and model.loss(x, rec, posterior, 1, 2)[1] == {}
    late = model.loss(x, rec, posterior, 0, 3, last_layer=model.get_last_layer())[1]
    assert late["train/d_weight"] > 0 and late["train/g_loss"].isfinite()
    with torch.no_grad():
        logs = [model.loss(x, rec, posterior, network, 9)[1] for network in (0, 1)]
    names = {name.split("/")[1] for log in logs for name in log}
    assert names == set(model.loss.terms) and "quant_loss" not in names


@pytest.mark.parametrize("learn_logvar", [True, False])
def test_what_is_trained(learn_logvar):
    model = small({"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": dict(
        disc_start=0, perceptual_weight=0.0, disc_num_layers=1, disc_ndf=4)}, learn_logvar=learn_logvar)
    model.learning_rate = 1e-3
    (generator, discriminator), _ = model.configure_optimizers()
    trained = {id(p) for group in generator.param_groups for p in group["params"]}
    assert (id(model.loss.logvar) in trained) == learn_logvar == model.loss.logvar.requires_grad
    assert trained >= {id(p) for p in (*model.encoder.parameters(), *model.post_quant_conv.parameters())}
    assert not trained & {id(p) for p in model.loss.discriminator.parameters()}


# ---- the model


def test_latents_of_any_size_and_a_reconstruction_that_stays():
    model = small().eval()
    x = images(size=(16, 24))
    posterior = model.encode(x)
    assert posterior.mean.shape == (2, 5, 8, 12)
    assert torch.equal(model.reconstruct(x), model.reconstruct(x)) and model.reconstruct(x).shape == x.shape
    torch.testing.assert_close(model.reconstruct(x), model.decode(posterior.mode()))
    assert not torch.equal(model(x)[0], model(x)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(x).mean, posterior.mean)
    with torch.no_grad():
        whole = model.decode(posterior.mean)
        model.decode_memory = 10_000
        torch.testing.assert_close(model.decode(posterior.mean), whole, atol=1e-5, rtol=1e-5)


def test_bad_input_is_named():
    model = small()
    with pytest.raises(ValueError, match="1 channels a pixel .* takes 3"):
        model.encode(images(channels=1))
    for shape in ((2, 4, 8, 8), (2, 5, 64)):
        with pytest.raises(ValueError, match=r"latents are \(B, 5, h, w\), embed_dim; got"):
            model.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="17x16 pixels are not a multiple of f = 2: crop to 16x16"):
        model.get_images({"image": torch.zeros(1, 17, 16, 3)})
    with pytest.raises(ValueError, match="the images have 1 channels, but ddconfig.in_channels is 3"):
        model.check_batch({"image": torch.zeros(1, 16, 16, 1)})
    with pytest.raises(ValueError, match="double_z must be True"):
        small(ddconfig={**SMALL, "double_z": False})
    first = {"target": "taming.models.autoencoder_kl.AutoencoderKL", "params": dict(
        ddconfig=SMALL, lossconfig=NO_LOSS, embed_dim=5)}
    gpt = {"target": "taming.modules.transformer.mingpt.GPT", "params": dict(
        vocab_size=8, block_size=64, n_layer=1, n_head=1, n_embd=8)}
    with pytest.raises(ValueError, match="AutoencoderKL is not a Tokenizer"):
        Net2NetTransformer(gpt, first, "__is_unconditional__")
