"""What notebooks and projects of 2021 did: a class, a state dict, encode, decode; losses of their own."""

import pytest
import torch
from omegaconf import OmegaConf

from taming.checkpoint import read_checkpoint
from taming.config import ConfigError, find_config, instantiate_from_config
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import GumbelVQ, VQModel

STAGE = """
    embed_dim: 32
    n_embed: 24
    ddconfig:
      double_z: False
      z_channels: 32
      resolution: 64
      in_channels: {channels}
      out_ch: {channels}
      ch: 32
      ch_mult: [1, 1, 1]
      num_res_blocks: 1
      attn_resolutions: [16]
      dropout: 0.0
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params: {{disc_conditional: False, disc_in_channels: {channels}, disc_start: 30001, disc_weight: 0.8}}
"""
VQGAN = "model:\n  base_learning_rate: 4.5e-06\n  target: taming.models.vqgan.VQModel\n  params:"
GUMBEL = """
    kl_weight: 1.0e-08
    temperature_scheduler_config:
      target: taming.lr_scheduler.LambdaWarmUpCosineScheduler
      params: {warm_up_steps: 0, max_decay_steps: 1000001, lr_start: 0.9, lr_max: 0.9, lr_min: 1.0e-06}
"""


def config_file(folder, text):
    path = folder / "model.yaml"
    path.write_text(text)
    return path


def old_checkpoint(folder, model):
    """A file as in 2021: LPIPS among the weights, the trainer's counters with them."""
    state = {**model.state_dict(), "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 64, 1, 1)}
    torch.save({"state_dict": state, "global_step": 7, "epoch": 0}, folder / "last.ckpt")
    return folder / "last.ckpt"


def load_vqgan(config, ckpt_path=None, is_gumbel=False):
    """The notebook's own function."""
    model = GumbelVQ(**config.model.params) if is_gumbel else VQModel(**config.model.params)
    if ckpt_path is not None:
        sd = torch.load(ckpt_path, map_location="cpu")["state_dict"]
        missing, unexpected = model.load_state_dict(sd, strict=False)
        assert not missing and not unexpected
    return model.eval()


@pytest.mark.parametrize("is_gumbel", [False, True])
@torch.no_grad()
def test_reconstruction_usage(is_gumbel, tmp_path):
    text = VQGAN + STAGE.format(channels=3) + (GUMBEL if is_gumbel else "")
    config = OmegaConf.load(config_file(tmp_path, text))
    trained = load_vqgan(config, is_gumbel=is_gumbel)
    model = load_vqgan(config, old_checkpoint(tmp_path, trained), is_gumbel)
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    z, _, [_, _, indices] = model.encode(x)
    assert z.shape == (1, 32, 16, 24) and indices.numel() == 16 * 24
    xrec = model.decode(z)
    assert xrec.shape == x.shape and torch.equal(xrec, trained.decode(trained.encode(x)[0]))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 7


NET2NET = """
model:
  base_learning_rate: 4.5e-06
  target: taming.models.cond_transformer.Net2NetTransformer
  params:
    cond_stage_key: depth
    transformer_config:
      target: taming.modules.transformer.mingpt.GPT
      params: {vocab_size: 24, block_size: 512, n_layer: 1, n_head: 2, n_embd: 16}
    first_stage_config:
      target: taming.models.vqgan.VQModel
      params: ${first}
    cond_stage_config:
      target: taming.models.vqgan.VQModel
      params: ${second}
"""


@torch.no_grad()
def test_sliding_window_of_the_first_notebook(tmp_path):
    stages = "".join(
        f"{name}:{STAGE.format(channels=channels)}" for name, channels in (("first", 3), ("second", 1))
    )
    config = OmegaConf.load(config_file(tmp_path, stages + NET2NET))
    model = Net2NetTransformer(**config.model.params).eval()
    c = torch.rand(1, 1, 64, 96) * 2 - 1
    c_code, c_indices = model.encode_to_c(c)
    assert c_code.shape == (1, 32, 16, 24) and c_indices.numel() == 16 * 24
    assert model.cond_stage_model.decode(c_code).shape == c.shape

    idx = torch.randint(24, c_indices.shape).reshape(1, 16, 24)
    cidx = c_indices.reshape(1, 16, 24)
    x_sample = model.decode_to_img(idx.reshape(1, -1), c_code.shape)
    assert x_sample.shape == (1, 3, 64, 96)
    for i, j, local_j in ((0, 0, 0), (3, 11, 8), (15, 23, 15)):
        columns = slice(j - local_j, j - local_j + 16)
        patch = torch.cat((cidx[:, :, columns].reshape(1, -1), idx[:, :, columns].reshape(1, -1)), dim=1)
        logits, _ = model.transformer(patch[:, :-1])
        logits = logits[:, -256:, :].reshape(1, 16, 16, -1)[:, i, local_j, :]
        logits = model.top_k_logits(logits / 1.0, 10)
        probs = torch.nn.functional.softmax(logits, dim=-1)
        idx[:, i, j] = torch.multinomial(probs, num_samples=1)[:, 0]
        assert (probs > 0).sum() == 10


# ---- what projects that build on 2021's code do


@pytest.mark.parametrize("is_gumbel", [False, True])
def test_images_are_optimized_through_a_frozen_decoder(is_gumbel, tmp_path):
    """As guidance by CLIP does: no loss, no encoder, gradients to the latents alone."""
    text = VQGAN + STAGE.format(channels=3) + (GUMBEL if is_gumbel else "")
    config = OmegaConf.load(config_file(tmp_path, text))
    model = load_vqgan(config, is_gumbel=is_gumbel)
    path = old_checkpoint(tmp_path, load_vqgan(config, is_gumbel=is_gumbel))
    model.eval().requires_grad_(False)
    model.init_from_ckpt(path)
    del model.loss
    assert 2 ** (model.decoder.num_resolutions - 1) == 4
    codebook = model.quantize.embed.weight if is_gumbel else model.quantize.embedding.weight
    one_hot = torch.nn.functional.one_hot(torch.randint(24, [8 * 12]), 24).float()
    z = (one_hot @ codebook).view(1, 8, 12, 32).permute(0, 3, 1, 2).clone().requires_grad_(True)
    image = model.decode(z)
    image.square().mean().backward()
    assert image.shape == (1, 3, 32, 48) and z.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


LOSS = """
from taming.modules.losses.vqperceptual import *

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.perceptual_loss = LPIPS(random_trunk=True).eval()
        self.features = self.perceptual_loss.net
        disc = NLayerDiscriminator(input_nc=3, n_layers=2, use_actnorm=False)
        self.discriminator = disc.apply(weights_init)
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self, x, rec, step):
        nll = (torch.abs(x - rec) + self.perceptual_loss(x, rec)) / torch.exp(self.logvar) + self.logvar
        style = F.mse_loss(self.features(x).relu2_2, self.features(rec).relu2_2)
        factor = adopt_weight(1.0, step, threshold=5)
        real, fake = self.discriminator(x), self.discriminator(rec)
        return nll.mean() + style + factor * hinge_d_loss(real, fake), factor * vanilla_d_loss(real, fake)
"""


def test_a_loss_on_the_star_import_of_ours():
    names: dict = {}
    exec(LOSS, names)
    loss = names["Loss"]()
    x, rec = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 3, 32, 32, requires_grad=True)
    early, zero = loss(x, rec, 4)
    late, value = loss(x, rec, 5)
    assert zero.item() == 0 and value.item() > 0 and late > early
    late.backward()
    assert rec.grad.abs().max() > 0 and loss.logvar.grad.abs() > 0
    assert any(key.startswith("features.slice1") for key in loss.state_dict())


@pytest.mark.parametrize("name", ["custom_small_vqgan", "custom_vqgan", "demo/vqgan", "imagenet_vqgan"])
def test_a_model_is_built_from_its_section_of_a_file(name):
    """The section says `${size}`, which stands beside it."""
    config = OmegaConf.load(find_config(name))
    with torch.device("meta"):
        models = [
            instantiate_from_config(config.model), VQModel(**config.model.params),
            instantiate_from_config({"target": config.model.target, "params": config.model.params}),
        ]
        OmegaConf.resolve(config.model)
        models.append(instantiate_from_config(OmegaConf.create(config.model)))
    assert {model.resolution for model in models} == {config.size}


def test_a_section_without_its_file_says_what_to_do():
    config = OmegaConf.load(find_config("custom_vqgan"))
    with pytest.raises(ConfigError, match=r"key 'size' not found.*take it after OmegaConf.resolve\(config\)"):
        instantiate_from_config(OmegaConf.create(config.model))
