"""First stages of latent diffusion: their YAML files, running averages, interface and training arguments."""

import copy
import logging

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from taming.checkpoint import load_model
from taming.config import ConfigError, instantiate_from_config
from taming.models import vqgan
from taming.models.latent_diffusion import VQModel, VQModelInterface
from taming.modules.diffusionmodules.model import AttnBlock

# What the published files look like, at full size.
FULL_SIZE = """
model:
  base_learning_rate: 4.5e-06
  target: ldm.models.autoencoder.{cls}
  params:
    embed_dim: {channels}
    n_embed: {codes}
    monitor: val/rec_loss
    ddconfig:
      {attn_type}double_z: false
      z_channels: {channels}
      resolution: 256
      in_channels: 3
      out_ch: 3
      ch: 128
      ch_mult: {ch_mult}
      num_res_blocks: 2
      attn_resolutions: {attention}
      dropout: 0.0
    lossconfig: {loss}
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 8
    train: {{target: ldm.data.openimages.FullOpenImagesTrain, params: {{crop_size: 256}}}}
"""
DISC = (
    "{{target: {}.VQLPIPSWithDiscriminator, params: {{disc_conditional: false, disc_in_channels: 3, "
    "disc_start: 0, disc_weight: 0.75, codebook_weight: 1.0{}}}}}"
)
TAMING = DISC.format("taming.modules.losses.vqperceptual", "")
LDM = DISC.format("ldm.modules.losses.vqperceptual", ", n_classes: 8192")
IDENTITY = "{target: torch.nn.Identity}"
PUBLISHED = {
    "vq-f4": ("VQModel", 3, 8192, [1, 2, 4], [], "", TAMING),
    "vq-f4-noattn": ("VQModel", 3, 8192, [1, 2, 4], [], "attn_type: none\n      ", LDM),
    "vq-f4, inside a diffusion model": ("VQModelInterface", 3, 8192, [1, 2, 4], [], "", IDENTITY),
    "vq-f8": ("VQModel", 4, 16384, [1, 2, 2, 4], [32], "", TAMING),
    "vq-f16": ("VQModel", 8, 16384, [1, 1, 2, 2, 4], [16], "", TAMING),
}

SMALL = dict(
    double_z=False, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2],
    num_res_blocks=1, attn_resolutions=[16], dropout=0.0,
)
LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 0, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0},
}
NO_LOSS = {"target": "torch.nn.Identity"}


def config(cls="VQModel", loss=LOSS, **params):
    params = dict(ddconfig=SMALL, lossconfig=loss, n_embed=16, embed_dim=4) | params
    data = {"target": "main.DataModuleFromConfig", "params": {"train": {"target": "ldm.data.gone.Gone"}}}
    return {"model": {"target": f"ldm.models.autoencoder.{cls}", "params": params}, "data": data}


def with_averages(model):
    """The state dict that the model had in 2022, and what its averages are: each weight times 0.5."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    averages = {name: parameter.detach() * 0.5 for name, parameter in model.named_parameters()}
    short = {f"model_ema.{name.replace('.', '')}": value for name, value in averages.items()}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    frozen = {"loss.perceptual_loss.net.slice1.0.weight": torch.ones(1)}
    return state | short | counters | frozen, averages


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_build_at_full_size(name):
    fields = ("cls", "channels", "codes", "ch_mult", "attention", "attn_type", "loss")
    text = FULL_SIZE.format(**dict(zip(fields, PUBLISHED[name], strict=True)))
    with torch.device("meta"):
        model = instantiate_from_config(OmegaConf.create(text).model)
    cls, channels, codes, ch_mult, *_ = PUBLISHED[name]
    assert type(model) is {"VQModel": VQModel, "VQModelInterface": VQModelInterface}[cls]
    assert model.quantize.embedding.weight.shape == (codes, channels)
    assert model.factor == 2 ** (len(ch_mult) - 1)
    attention = [module for module in model.modules() if isinstance(module, AttnBlock)]
    assert bool(attention) == ("noattn" not in name)


def test_attention_left_out_leaves_no_keys_and_other_kinds_are_refused():
    model = VQModel({**SMALL, "attn_type": "none"}, NO_LOSS, 16, 4)
    assert not [key for key in model.state_dict() if "attn" in key]
    assert model.eval()(torch.zeros(1, 3, 32, 48))[0].shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="attn_type: 'linear' is unknown"):
        VQModel({**SMALL, "attn_type": "linear"}, NO_LOSS, 16, 4)


@pytest.mark.parametrize("loss", [LOSS, NO_LOSS])
@pytest.mark.parametrize("cls", ["VQModel", "VQModelInterface"])
def test_averages_are_what_is_loaded(tmp_path, caplog, cls, loss):
    state, averages = with_averages(VQModel(SMALL, LOSS, 16, 4))
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    with caplog.at_level(logging.INFO):
        model, _, step = load_model(tmp_path / "model.ckpt", config=config(cls, loss))
    assert step == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, averages[name]), name
    assert f"{len(averages)} weights are their running averages" in caplog.text
    expected = "not in the model" if loss is NO_LOSS else "ignored: 1 (loss.perceptual_loss"
    assert expected in caplog.text
    assert f"loaded {len(model.state_dict())} tensors" in caplog.text
    folder = model.save_pretrained(tmp_path / "saved")
    assert torch.equal(type(model).from_pretrained(folder).quant_conv.bias, averages["quant_conv.bias"])


def test_without_averages_the_weights_are_loaded(tmp_path):
    source = VQModel(SMALL, LOSS, 16, 4)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.ckpt")
    model, _, _ = load_model(tmp_path / "model.ckpt", config=config(use_ema=True))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_averages_are_found_inside_a_larger_model():
    state, averages = with_averages(VQModel(SMALL, NO_LOSS, 16, 4))
    outer = torch.nn.Module()
    outer.first_stage_model = VQModelInterface(4, SMALL, NO_LOSS, 16)
    del state["loss.perceptual_loss.net.slice1.0.weight"]
    outer.load_state_dict({f"first_stage_model.{key}": value for key, value in state.items()})
    assert torch.equal(outer.first_stage_model.quant_conv.weight, averages["quant_conv.weight"])


def test_averages_of_another_model_are_reported_and_nothing_is_loaded(tmp_path):
    state, _ = with_averages(VQModel(SMALL, LOSS, 16, 4))
    state["model_ema.somethingelseweight"] = torch.ones(1)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"unexpected in the file: 1 \(model_ema.somethingelseweight\)"):
        load_model(tmp_path / "model.ckpt", config=config())
    del state["model_ema.somethingelseweight"], state["model_ema.quant_convbias"]
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    model = VQModel(SMALL, LOSS, 16, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="model_ema has averages, but none of quant_conv.bias"):
        model.init_from_ckpt(tmp_path / "model.ckpt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_interface_quantizes_when_it_decodes():
    plain = VQModel(SMALL, NO_LOSS, 16, 4).eval()
    interface = VQModelInterface(4, SMALL, NO_LOSS, 16).eval()
    interface.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        quant, loss, (_, _, indices) = plain.encode(x)
        latent, want = interface.encode(x), plain.decode(quant)
        assert latent.shape == (2, 4, 16, 16) and not torch.equal(latent, quant)
        assert torch.equal(latent, plain.encode_to_prequant(x))
        assert torch.equal(interface.decode(latent), want)
        assert torch.equal(interface.decode(quant, force_not_quantize=True), want)
        assert not torch.equal(interface.decode(latent, force_not_quantize=True), want)
        assert torch.equal(interface(x)[0], want) and torch.equal(interface(x)[1], loss)
        assert torch.equal(interface(x, return_pred_indices=True)[2], indices)
        assert torch.equal(plain(x, return_pred_indices=True)[2], indices)
        code = indices.view(2, 16, 16)
        torch.testing.assert_close(interface.decode_code(code), plain.decode_code(code))
    with pytest.raises(ValueError, match="train it as VQModel"):
        interface.configure_optimizers()


def fit(model, steps):
    data = [{"image": torch.rand(1, 32, 32, 3) * 2 - 1}] * steps
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=None))
    return trainer


def test_it_trains_with_its_own_rate_for_the_generator_and_averages():
    model = VQModel(SMALL, LOSS, 16, 4, lr_g_factor=0.5, use_ema=True)
    model.learning_rate = 1e-3
    trainer = fit(model, 2)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers]
    assert rates == [pytest.approx(5e-4), pytest.approx(1e-3)] and model.batches_seen == 2
    assert model.averages.decay == 0.9999 and model.averages.updates == 2
    assert not torch.equal(model.averages.weights["decoder.conv_out.bias"], model.decoder.conv_out.bias)
    model = VQModel(SMALL, NO_LOSS, 16, 4)
    assert model.averages is None
    model.learning_rate = 1e-3
    with pytest.raises(ValueError, match="built with Identity, which has nothing to train"):
        fit(model, 1)


def test_training_batches_are_resized():
    model = VQModel(SMALL, NO_LOSS, 16, 4, batch_resize_range=[16, 48])
    batch, sizes = {"image": torch.rand(1, 32, 32, 3)}, []
    for model.batches_seen in range(40):
        sizes.append(tuple(model.get_input(batch, "image").shape[2:]))
    assert set(sizes[:5]) == {(48, 48)}
    assert set(sizes[5:]) == {(16, 16), (32, 32), (48, 48)}
    assert model.eval().get_input(batch, "image").shape == (1, 3, 32, 32)


def test_its_loss_takes_what_its_configs_say():
    target = "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    params = {**LOSS["params"], "n_classes": 16, "pixel_loss": "l2"}
    loss = instantiate_from_config({"target": target, "params": params})
    assert loss.n_classes == 16 and loss.disc_factor == 1.0 and loss.pixel_loss is F.mse_loss
    for argument, says in (("pixel_loss", "is unknown"), ("perceptual_loss", "is unknown")):
        with pytest.raises(ValueError, match=f"{argument}: 'dists' {says}"):
            instantiate_from_config({"target": target, "params": {"disc_start": 0, argument: "dists"}})
    with pytest.raises(ConfigError, match="n_clases"):
        instantiate_from_config({"target": target, "params": {"disc_start": 0, "n_clases": 3}})


def test_it_is_a_vqgan_that_can_be_copied():
    model = VQModel(SMALL, NO_LOSS, 16, 4).eval()
    assert isinstance(model, vqgan.VQModel)
    other, (state, averages) = copy.deepcopy(model), with_averages(model)
    del state["loss.perceptual_loss.net.slice1.0.weight"]
    other.load_state_dict(state)
    assert torch.equal(other.quant_conv.weight, averages["quant_conv.weight"])
    assert not torch.equal(model.quant_conv.weight, other.quant_conv.weight)
