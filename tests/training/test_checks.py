"""What is told before the first batch: the line that is printed helps, which is tried."""

import re
import shlex

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image

from taming.checkpoint import read_checkpoint
from taming.cli import command
from taming.config import find_config, instantiate_from_config, load_config
from taming.training.checks import check_monitors
from taming.training.command import main
from tests.tiny import resume, train, write_transformer, write_vqgan


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    return train(write_vqgan(folder), folder / "logs", "vq", "--max_steps", 1)


def error_of(capsys, *words):
    """Build only, which has to fail; return the line that says why."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    return error.strip()


@pytest.mark.parametrize(("words", "message"), [
    (["model.params.ddconfig.resolution=64"], "train data has images of 32x32 pixels .* is made for 64x64"),
    (["data.params.train.params.size=[32,64]"], "train data has images of 32x64 pixels .* is made for 32x32"),
    (["data.params.train.params.size=33"], "images of 33x33 pixels are not a multiple of f = 4: crop to 32x"),
    (["model.params.ddconfig.in_channels=1"], "images have 3 channels, but ddconfig.in_channels is 1"),
    (["model.params.ddconfig.out_ch=1"], "images have 3 channels, but ddconfig.out_ch is 1"),
    (["model.params.lossconfig.params.disc_in_channels=1"], "lossconfig.params.disc_in_channels is 1"),
])
def test_sizes_and_channels_of_the_first_stage(tmp_path, capsys, words, message):
    yaml = write_vqgan(tmp_path)
    error = error_of(capsys, "-b", yaml, *words)
    assert re.search(message, error)
    if "set " in error:
        cure = re.search(r"set (\S+=\S+?),? *(or|$)", error)[1]
        if "train.params.size" in words[0]:
            words = [*words, words[0].replace("train", "validation")]
        assert main(["-b", str(yaml), *words, *shlex.split(cure)]) == 0


@pytest.mark.parametrize("has_size", [True, False])
def test_the_size_of_a_gan_is_one_key_or_those_of_both_networks(tmp_path, capsys, has_size):
    config = load_config(find_config("transgan/transgan_landscapes"))
    if not has_size:
        OmegaConf.resolve(config)
        del config.size
    OmegaConf.save(config, tmp_path / "gan.yaml")
    words = [f"data.params.{split}.params.size=64" for split in ("train", "validation")]
    words += [f"data.params.{split}.params.length=16" for split in ("train", "validation")]
    error, cure = error_of(capsys, "-b", tmp_path / "gan.yaml", *words), ["size=64"]
    if not has_size:
        cure = [f"model.params.{network}.resolution=64" for network in ("generator", "discriminator")]
    assert "has images of 64x64 pixels (height x width), but the model is made for 32x32" in error
    assert f"set {' and '.join(cure)}" in error
    assert main(["-b", str(tmp_path / "gan.yaml"), *words, *cure]) == 0


def test_images_for_validation_are_looked_at_too(tmp_path, capsys):
    error = error_of(capsys, "-b", write_vqgan(tmp_path), "data.params.validation.params.size=64")
    assert "the validation data has images of 64x64 pixels" in error


@pytest.mark.parametrize(("words", "message"), [
    (["data.params.train.params.size=64"], "made for 32x32: set the size of the data to 32, or train"),
    (["model.params.transformer_config.params.block_size=10"], "block_size to at least 64"),
    (["model.params.transformer_config.params.vocab_size=4"], "vocab_size to at least 8"),
    (["model.params.cond_stage_config.params.n_classes=12"],
     "n_classes is 12, but the data have 16: set model.params.cond_stage_config.params.n_classes=16"),
    (["model.params.cond_stage_key=label"], r"no 'label' \(did you mean class_label\?\), .*: change"),
])
def test_sizes_and_classes_of_the_second_stage(vqgan, tmp_path, capsys, words, message):
    assert re.search(message, error_of(capsys, "-b", write_transformer(tmp_path, vqgan), *words))


def test_length_of_the_sequence_is_derived(vqgan, tmp_path):
    yaml = write_transformer(tmp_path, vqgan)
    config = load_config(yaml)
    del config.model.params.transformer_config.params.block_size
    OmegaConf.save(config, yaml)
    run = train(yaml, tmp_path / "logs", "derived", "--max_steps", 1)
    weights = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert weights["transformer.pos_emb"].shape == (1, 64, 16)  # a class, 64 codes - 1
    resume(run, "--max_steps", 2)


# ---- metrics


@pytest.mark.parametrize(("word", "message"), [
    ("model.params.monitor=rec_loss", r"rec_loss is not a metric of VQModel \(did you mean val/rec_loss\?\)"),
    ("model.params.monitor=val/nothing", "val/nothing is not a metric of VQModel.*; validation logs val/tot"),
    ("lightning.modelcheckpoint.params.monitor=val/psrn", r"did you mean val/psnr"),
    ("lightning.callbacks={stop: {target: pytorch_lightning.callbacks.EarlyStopping, params: "
     "{monitor: val/loss}}}", "val/loss is not a metric of VQModel"),
])
def test_metrics_that_are_not_logged(tmp_path, capsys, word, message):
    assert re.search(message, error_of(capsys, "-b", write_vqgan(tmp_path), word))


def test_metrics_that_are_logged(tmp_path):
    for monitor in ("val/psnr", "val/codebook_usage_percent", "train/rec_loss"):
        assert main(["-b", str(write_vqgan(tmp_path)), f"model.params.monitor={monitor}"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["first", "second", "label maps"])
def test_the_names_are_those_that_validation_logs(vqgan, tmp_path, kind):
    yaml = write_vqgan(tmp_path) if kind != "second" else write_transformer(tmp_path, vqgan)
    words = [] if kind != "label maps" else [
        "model.target=taming.models.vqgan.VQSegmentationModel", "model.params.n_labels=10",
        "model.params.lossconfig={target: taming.modules.losses.segmentation.BCELossWithQuant, params: null}",
        "model.params.ddconfig.in_channels=10", "model.params.ddconfig.out_ch=10",
        "model.params.monitor=val/bce_loss",
        "model.params.image_key=segmentation", "data.params.train.params.keys=[segmentation]",
        "data.params.validation.params.keys=[segmentation]",
    ]
    if kind == "label maps":
        config = load_config(yaml)
        del config.model.params.lossconfig
        OmegaConf.save(config, yaml)
    run = train(yaml, tmp_path / "logs", "run", "--max_epochs", 1, *words)
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    logged = {name.removeprefix("val/") for name in header if name.startswith("val/")}
    model = instantiate_from_config(load_config(sorted((run / "configs").glob("*.yaml"))).model)
    assert logged == set(model.validation_metrics)


class Own(pl.LightningModule):
    def validation_step(self, batch, batch_idx):
        self.log("anything", 1.0)


def test_models_and_callbacks_of_others_may_log_anything():
    from pytorch_lightning.callbacks import EarlyStopping

    class Mine(pl.Callback):
        pass

    with torch.device("meta"):
        model = instantiate_from_config(load_config(find_config("demo/vqgan")).model)
    check_monitors([EarlyStopping("anything")], Own())
    check_monitors([EarlyStopping("anything"), Mine()], model)
    with pytest.raises(ValueError, match="anything is not a metric"):
        check_monitors([EarlyStopping("anything")], model)


def test_without_validation_data_nothing_is_ranked(tmp_path, capsys):
    words = ["--max_epochs", 1, "data.params.validation=null"]
    run = train(write_vqgan(tmp_path), tmp_path / "logs", "run", *words)
    assert "note: no validation data, so no checkpoints are kept by val/rec_loss" in capsys.readouterr().out
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


# ---- one key


@pytest.mark.slow
@pytest.mark.parametrize("size", ["32", "[32,64]"])
def test_one_key_sets_the_size_of_a_shipped_configuration(tmp_path, monkeypatch, capsys, size):
    """Both stages on photos of your own; the second finds the first, and says if its size is another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (90, 80), (10 * i, 100, 200)).save(tmp_path / "photos" / f"{i}.png")
    words = [
        "data.params.train.params.folder=photos", "data.params.batch_size=2", "data.params.num_workers=0",
        "--max_steps", "1", "--num_sanity_val_steps", "0", "--limit_val_batches", "1",
    ]
    small = [f"model.params.ddconfig.{key}={value}" for key, value in {
        "ch": 32, "ch_mult": "[1,1,1]", "num_res_blocks": 1, "z_channels": 32}.items()]
    small += [f"model.params.lossconfig.params.{key}" for key in (
        "perceptual_weight=0", "disc_ndf=8", "disc_num_layers=1")]
    assert main(["-b", "custom_vqgan", "-t", f"size={size}", *words, *small]) == 0
    gpt = [f"model.params.transformer_config.params.{key}" for key in ("n_layer=1", "n_head=2", "n_embd=16")]
    error = error_of(capsys, "-b", "custom_transformer", "-t", *words, *gpt)
    assert f"set size={size}" in error
    assert main(["-b", "custom_transformer", "-t", *words, *gpt, f"size={size}"]) == 0
    run = next((tmp_path / "logs").glob("*_custom_transformer"))
    weights = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    codes = 8 * 8 if size == "32" else 8 * 16
    assert weights["transformer.pos_emb"].shape[1] == codes
    assert main(["-t", "-r", str(run), "--max_steps", "2"]) == 0
    assert command("sample")(["-r", str(run), "-n", "1", "-o", "out"]) == 0
    sample = Image.open(next((tmp_path / "out").rglob("*.png")))
    assert sample.size == ((32, 32) if size == "32" else (64, 32))  # width, height
