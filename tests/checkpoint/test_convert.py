"""Checkpoints from file to folder and back, and parts of models: the same weights, or a refusal."""

import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from taming.checkpoint import load_model, read_checkpoint
from taming.checkpoint.convert import convert, extract
from taming.config import instantiate_from_config
from taming.models.vqgan import VQModel

LEGACY = Path(__file__).parents[1] / "golden" / "legacy_lightning_1_0.ckpt"
NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}


def ddconfig(z_channels=16):
    return {
        "double_z": False, "z_channels": z_channels, "resolution": 32, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
    }


LEGACY_MODEL = {
    "target": "taming.models.vqgan.VQModel",
    "params": {"ddconfig": ddconfig(), "lossconfig": NO_LOSS, "n_embed": 48, "embed_dim": 8},
}
STAGE = {
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "ckpt_path": "gone/last.ckpt", "ddconfig": "${model.dd}", "lossconfig": NO_LOSS, "n_embed": 16,
        "embed_dim": 4,
    },
}
GPT = {
    "target": "taming.modules.transformer.mingpt.GPT",
    "params": {"vocab_size": 16, "block_size": 127, "n_layer": 1, "n_head": 2, "n_embd": 8},
}


def transformer(cond: object = "__is_first_stage__") -> dict:
    params = {"first_stage_config": STAGE, "cond_stage_config": cond, "transformer_config": GPT}
    target = "taming.models.cond_transformer.Net2NetTransformer"
    return {"model": {"dd": ddconfig(8), "target": target, "params": params}, "data": {"target": "gone.Data"}}


@pytest.fixture
def whole(tmp_path):
    """A transformer's checkpoint with its config inside, and its weights."""
    config = OmegaConf.create(transformer())
    del config.model.params.first_stage_config.params.ckpt_path
    state = instantiate_from_config(config.model).state_dict()
    plain = OmegaConf.to_container(OmegaConf.create(transformer()))
    torch.save({"state_dict": state, "config": plain, "batches_seen": 9}, tmp_path / "whole.ckpt")
    return tmp_path / "whole.ckpt", state


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_file_of_2021_to_a_folder_and_back(tmp_path, caplog):
    config = OmegaConf.create({"model": LEGACY_MODEL, "data": {"target": "gone.Data"}})
    OmegaConf.save(config, tmp_path / "x.yaml")
    with caplog.at_level(logging.INFO, logger="taming.checkpoint"):
        written = convert(LEGACY, tmp_path / "vqgan", tmp_path / "x.yaml")
    assert written == [tmp_path / "vqgan/model.safetensors", tmp_path / "vqgan/config.yaml"]
    assert "ignored" in caplog.text and "loss.perceptual_loss" in caplog.text
    raw = read_checkpoint(LEGACY)["state_dict"]
    kept = {key: value for key, value in raw.items() if not key.startswith("loss.")}
    model, config, step = load_model(tmp_path / "vqgan")
    assert_equal(dict(model.state_dict()), kept)
    assert step == 12345 and config.data.target == "gone.Data"

    assert convert(tmp_path / "vqgan", tmp_path / "back.ckpt") == [tmp_path / "back.ckpt"]
    content = torch.load(tmp_path / "back.ckpt")
    assert set(content) == {"state_dict", "config", "batches_seen"}
    assert_equal(content["state_dict"], kept)
    assert content["batches_seen"] == 12345 and content["config"]["model"] == LEGACY_MODEL
    back, _, step = load_model(tmp_path / "back.ckpt")
    assert_equal(dict(back.state_dict()), kept)
    assert step == 12345
    size = sum(value.nbytes for value in kept.values())
    assert (tmp_path / "back.ckpt").stat().st_size < 1.5 * size  # each tensor is there once


def test_a_file_of_2021_needs_no_config(tmp_path):
    """Names and shapes tell what it is, but for the size of images, which places the attention."""
    convert(LEGACY, tmp_path / "vqgan")
    model, config, _ = load_model(tmp_path / "vqgan")
    raw = read_checkpoint(LEGACY)["state_dict"]
    assert_equal(dict(model.state_dict()), {k: v for k, v in raw.items() if not k.startswith("loss.")})
    found = OmegaConf.to_container(config.model.params)
    assert (found["n_embed"], found["embed_dim"], config.model.target) == (48, 8, LEGACY_MODEL["target"])
    sizes = ddconfig() | {"resolution": 256, "attn_resolutions": [64]}
    assert {key: found["ddconfig"][key] for key in sizes} == sizes


def test_a_checkpoint_loses_the_paths_of_others(whole, tmp_path):
    file, state = whole
    convert(file, tmp_path / "copy.ckpt")
    content = torch.load(tmp_path / "copy.ckpt")
    assert "ckpt_path" not in str(content["config"]) and content["batches_seen"] == 9
    assert_equal(content["state_dict"], dict(state))
    assert content["config"]["model"]["params"]["first_stage_config"]["params"]["ddconfig"] == ddconfig(8)


@pytest.mark.parametrize("form", ["folder", "file.ckpt"])
@pytest.mark.parametrize("name", ["first_stage_model", "cond_stage_model", "transformer"])
def test_a_part_is_a_model_of_its_own(whole, tmp_path, name, form):
    file, state = whole
    extract(file, tmp_path / form, name)
    model, config, _ = load_model(tmp_path / form)
    assert config.model.target == (GPT if name == "transformer" else STAGE)["target"]
    assert "ckpt_path" not in config.model.params
    expected = {key.split(".", 1)[1]: v for key, v in state.items() if key.startswith(name + ".")}
    assert_equal(dict(model.state_dict()), expected)
    if name != "transformer":
        assert_equal(dict(VQModel.from_pretrained(tmp_path / form).state_dict()), expected)


def test_a_part_without_a_config_goes_into_a_file_only(whole, tmp_path):
    file, state = whole
    torch.save({"state_dict": state}, tmp_path / "bare.ckpt")
    extract(tmp_path / "bare.ckpt", tmp_path / "part.ckpt", "first_stage_model.")
    content = torch.load(tmp_path / "part.ckpt")
    assert list(content) == ["state_dict"]
    assert torch.equal(content["state_dict"]["quant_conv.bias"], state["first_stage_model.quant_conv.bias"])
    with pytest.raises(ValueError, match=r"no config for transformer .*--config.*\.ckpt"):
        extract(tmp_path / "bare.ckpt", tmp_path / "part", "transformer")
    assert not (tmp_path / "part").exists()
    extract(tmp_path / "bare.ckpt", tmp_path / "part", "first_stage_model", config=transformer())
    assert type(load_model(tmp_path / "part")[0]) is VQModel
    extract(file, tmp_path / "encoder.ckpt", "first_stage_model.encoder")
    assert set(torch.load(tmp_path / "encoder.ckpt")) == {"state_dict"}


def test_a_part_of_a_model_that_is_not_here(tmp_path):
    """A latent diffusion model cannot be built here, but its first stage can."""
    stage = {**STAGE, "params": {**STAGE["params"], "ddconfig": ddconfig(8)}}
    stage["target"] = "ldm.models.autoencoder.VQModelInterface"
    params = {"first_stage_config": stage, "unet_config": {"target": "ldm.modules.UNet"}}
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}
    weights = VQModel(ddconfig(8), NO_LOSS, 16, 4).state_dict()
    state = {f"first_stage_model.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": {**state, "betas": torch.ones(3)}, "config": config}, tmp_path / "ldm.ckpt")
    extract(tmp_path / "ldm.ckpt", tmp_path / "stage", "first_stage_model")
    model, _, _ = load_model(tmp_path / "stage")
    assert type(model).__name__ == "VQModelInterface"
    assert_equal(dict(model.state_dict()), dict(weights))
    with pytest.raises(ValueError, match=r"ldm\.models\.diffusion\.ddpm"):
        convert(tmp_path / "ldm.ckpt", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_what_is_not_there_is_named(whole, tmp_path):
    with pytest.raises(ValueError, match="no part 'decoder'; there are: first_stage_model, cond_stage_model"):
        extract(whole[0], tmp_path / "part.ckpt", "decoder")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert("nowhere.ckpt", tmp_path / "x")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"no config for .*no published model .*1 \(a \(2,\)\)"):
        convert(tmp_path / "other.ckpt", tmp_path / "x")
    wrong = {"model": {**LEGACY_MODEL, "params": {**LEGACY_MODEL["params"], "n_embed": 64}}}
    for target in ("x", "x.ckpt"):
        with pytest.raises(ValueError, match=r"quantize\.embedding\.weight: file \(48, 8\), model \(64, 8\)"):
            convert(LEGACY, tmp_path / target, wrong)
        assert not (tmp_path / target).exists()


def test_places_that_cannot_be_written_to(whole, tmp_path):
    file, _ = whole
    before = file.read_bytes()
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "taken").write_text("text")
    for target, message in (
        (file, "is what is read"), ("folder.ckpt", "it is a folder"), ("x.safetensors", "name a folder"),
        ("taken", "name a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(file, tmp_path / target)
        with pytest.raises(ValueError, match=message):
            extract(file, tmp_path / target, "first_stage_model")
    assert file.read_bytes() == before and (tmp_path / "taken").read_text() == "text"
