"""What notebooks of 2021 did, word for word: OmegaConf, a class, a state dict, encode and decode."""

import pytest
import torch
from omegaconf import OmegaConf

from taming.checkpoint import read_checkpoint
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
    """A file as in 2021: LPIPS among the weights, the trainer's counters beside them."""
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
