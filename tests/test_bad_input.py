"""A user's mistake is one line that names it, exit status 1, and no run directory."""

import pytest
import torch
from PIL import Image

from taming.training.command import main
from tests.tiny import write_transformer, write_vqgan


@pytest.mark.parametrize(("words", "message"), [
    (["model.params.nembed=3"], "does not accept 'nembed' (did you mean n_embed"),
    (["model.target=os.system"], "target 'os.system' is not allowed"),
    (["model.params.image_key=picture"], "the training data has no 'picture', only 'class_label', 'image'"),
    (["data.params.train.params.size=33"], "images of 33x33 pixels are no multiple of f = 4: crop to 32x32"),
    (["data.params.batch_size=9"], "the training set holds 8: lower batch_size to at most 8"),
    (["model.params.ckpt_path=nowhere/last.ckpt"], "no checkpoint at nowhere/last.ckpt"),
    (["-r", "nowhere"], "no checkpoint at nowhere"),
    (["--max_stepz", "3"], "unknown option '--max_stepz' (did you mean --max_steps"),
    (["--gradient_clip_algorithm", "value"], "gradient_clip_algorithm: value"),
    (["model.base_learning_rate=null"], "model.base_learning_rate is missing"),
    (["model.params.lossconfig.params.disc_loss=wgan"], "disc_loss: 'wgan' is unknown"),
])
def test_mistake_with_the_first_stage(tmp_path, capsys, words, message):
    status = main(["-b", str(write_vqgan(tmp_path)), "-t", "-l", str(tmp_path / "logs"), *words])
    assert_refused(status, capsys.readouterr().err, message, tmp_path)


@pytest.mark.parametrize(("first_stage", "message"), [
    ("nowhere/*", "no checkpoint at nowhere/*. Train that stage first, or name its run directory"),
    ("nowhere/*_landscapes_vqgan*",
     "stage first (python main.py --base configs/landscapes/landscapes_vqgan.yaml -t), or name"),
    ("???", "first_stage_config names no checkpoint"),
])
def test_mistake_with_the_second_stage(tmp_path, capsys, first_stage, message):
    yaml = write_transformer(tmp_path, first_stage)
    status = main(["-b", str(yaml), "-t", "-l", str(tmp_path / "logs")])
    assert_refused(status, capsys.readouterr().err, message, tmp_path)


def test_checkpoint_of_another_model(tmp_path, capsys):
    torch.save({"state_dict": {"transformer.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    words = ["-b", str(write_vqgan(tmp_path)), "-t", "-l", str(tmp_path / "logs")]
    status = main([*words, f"model.params.ckpt_path={tmp_path / 'other.ckpt'}"])
    message = capsys.readouterr().err
    assert_refused(status, message, "do not fit VQModel; nothing was loaded", tmp_path)
    assert "unexpected in the file: 1 (transformer.weight)" in message


def test_list_of_missing_files(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("nowhere/a.png\nnowhere/b.png\n")
    words = ["-b", str(write_vqgan(tmp_path)), "-t", "-l", str(tmp_path / "logs"), "--ignore_base_data"]
    data = ["data.target=main.DataModuleFromConfig", "data.params.batch_size=1",
            "data.params.train.target=taming.data.custom.CustomTrain", "data.params.train.params.size=32",
            f"data.params.train.params.training_images_list_file={tmp_path / 'list.txt'}"]
    status = main([*words, *data])
    assert_refused(status, capsys.readouterr().err, "nowhere/a.png", tmp_path)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_data_that_turn_out_bad_amid_training(tmp_path, capsys, workers):
    """One line, too, where a loader process has met them."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32)).save(images / f"{number}.png")
    for number in (3, 5):
        (images / f"{number}.png").write_bytes(b"")
    words = ["-b", str(write_vqgan(tmp_path)), "-t", "-l", str(tmp_path / "logs"), "--ignore_base_data"]
    data = ["data.target=main.DataModuleFromConfig", "data.params.batch_size=2",
            f"data.params.num_workers={workers}", "data.params.train.target=taming.data.custom.CustomTrain",
            "data.params.train.params.size=32", f"data.params.train.params.folder={images}"]
    status = main([*words, *data])
    error = capsys.readouterr().err
    assert status == 1 and "Traceback" not in error
    assert "error: 2 of 8 images cannot be read so far, more than max_bad_fraction=0.01 allows; " in error
    assert f"cannot read image {images / '3.png'}" in error


def assert_refused(status, error, message, folder):
    assert status == 1
    assert error.startswith("error: ") and message in error
    assert "Traceback" not in error
    assert not (folder / "logs").exists()
