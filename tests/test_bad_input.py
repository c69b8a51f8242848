"""A user's mistake is one line that names it, exit status 1, and no run directory."""

import io
import re
import shlex
import urllib.error

import pytest
import torch
from PIL import Image

from taming.checkpoint import read_checkpoint
from taming.training.command import main
from tests.tiny import train, write_transformer, write_vqgan


@pytest.mark.parametrize(("words", "message"), [
    (["model.params.nembed=3"], "does not accept 'nembed' (did you mean n_embed"),
    (["model.target=os.system"], "target 'os.system' is not allowed"),
    (["model.params.image_key=picture"], "the training data has no 'picture', only 'class_label', 'image'"),
    (["data.params.train.params.size=33"], "images of 33x33 pixels are not a multiple of f = 4: crop to 32x"),
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
    assert_not_started(status, capsys.readouterr().err, message, tmp_path)


@pytest.mark.parametrize(("first_stage", "message"), [
    ("nowhere/*", "no checkpoint at nowhere/*. Train that stage first, or name its run directory"),
    ("nowhere/*_landscapes_vqgan*",
     "stage first (python main.py --base configs/landscapes/landscapes_vqgan.yaml -t), or name"),
    ("???", "first_stage_config names no checkpoint"),
])
def test_mistake_with_the_second_stage(tmp_path, capsys, first_stage, message):
    yaml = write_transformer(tmp_path, first_stage)
    status = main(["-b", str(yaml), "-t", "-l", str(tmp_path / "logs")])
    assert_not_started(status, capsys.readouterr().err, message, tmp_path)


@pytest.mark.parametrize(("word", "key"), [
    ("model.params.n_embed=0", "n_embed"), ("model.params.n_embed=16.0", "n_embed"),
    ("model.params.n_embed=10000000000000", "n_embed"), ("model.params.embed_dim=-4", "embed_dim"),
    ("model.params.ddconfig=null", "ddconfig"), ("model.params.ddconfig.ch_mult=1,1,1", "ddconfig.ch_mult"),
    ("model.params.ddconfig.ch_mult=[]", "ddconfig.ch_mult"),
    ("model.params.ddconfig.ch_mult.0=2", "ch_mult"),
    ("model.params.ddconfig.attn_resolutions=16", "ddconfig.attn_resolutions"),
    ("model.params.ddconfig.dropout=2", "ddconfig.dropout"), ("model.params.ddconfig.ch=7", "ch"),
    ("model.params.betas=[0.5]", "betas"), ("model.params.revive_after=0", "revive_after"),
    ("model.params.lossconfig.params.disc_start=-5", "disc_start"),
    ("model.params.lossconfig.params.disc_ndf=0", "disc_ndf"),
    ("model.params.lossconfig.params.perceptual_weight=abc", "perceptual_weight"),
    ("model.params.scheduler_config.params.warm_up_steps=many", "warm_up_steps"),
    ("model.base_learning_rate=-1", "model.base_learning_rate"),
    ("model.base_learning_rate=fast", "base_learning"),
    ("data.params.batch_size=4.0", "batch_size"), ("data.params.batch_size=0", "batch_size"),
    ("data.params.num_workers=abc", "num_workers"), ("data.params.train.params.size=big", "size"),
    ("lightning.seed=abc", "lightning.seed"),
    ("lightning.modelcheckpoint.params.save_top_k=abc", "save_top_k"),
    ("lightning.modelcheckpoint.params.every_n_train_steps=0", "every_n"),
    ("lightning.callbacks.image_logger.params.max_images=0", "max_images"),
    ("lightning.logger.target=pytorch_lightning.loggers.WandbLogger", "wandb"),
    ("--precision=fp16", "precision"), ("--accelerator=quantum", "accelerator"), ("--accelerator=tpu", "tpu"),
    ("--strategy=nonsense", "strategy"), ("--strategy=fsdp", "strategy"), ("--profiler=bogus", "profiler"),
    ("--max_time=abc", "abc"), ("--max_steps=-3", "max_steps"), ("--max_epochs=1e1", "max_epochs"),
    ("--val_check_interval=1000", "val_check_interval"), ("--gradient_clip_val=abc", "gradient_clip_val"),
    ("--devices=two", "devices"), ("--num_nodes=0", "num_nodes"),
])
def test_wrong_values_of_the_first_stage(tmp_path, capsys, word, key):
    status = main(["-b", str(write_vqgan(tmp_path)), "-t", "-l", str(tmp_path / "logs"), word])
    assert_not_started(status, capsys.readouterr().err, key, tmp_path)


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    return train(write_vqgan(folder), folder / "logs", "vq", "--max_steps", 1)


@pytest.mark.parametrize(("word", "key"), [
    ("model.params.pkeep=7", "pkeep"), ("model.params.sos_token=-1", "sos_token"),
    ("model.params.weight_decay=-1", "weight_decay"), ("model.params.cond_dropout=1.5", "cond_dropout"),
    ("model.params.null_token=abc", "null_token"),
    ("model.params.first_stage_config.params=null", "first_stage"),
    ("model.params.cond_stage_config=null", "cond_stage_config"),
    ("model.params.transformer_config=null", "transformer_config"),
    *((f"model.params.transformer_config.params.{key}=0", key) for key in ("n_layer", "n_head", "n_embd")),
    ("model.params.transformer_config.params.n_head=3", "n_head"),
    ("model.params.transformer_config.params.attn_pdrop=3", "attn_pdrop"),
    ("model.params.cond_stage_config.params.n_classes=0", "n_classes"),
])
def test_wrong_values_of_the_second_stage(vqgan, tmp_path, capsys, word, key):
    yaml = write_transformer(tmp_path, vqgan)
    status = main(["-b", str(yaml), "-t", "-l", str(tmp_path / "logs"), word])
    assert_not_started(status, capsys.readouterr().err, key, tmp_path)


def test_clipping_below_zero_is_off(tmp_path):
    yaml, runs = write_vqgan(tmp_path), []
    for words in ([], ["--gradient_clip_val", 0], ["--gradient_clip_val", -1]):
        runs.append(train(yaml, tmp_path / "logs", f"clip{len(runs)}", "--max_steps", 1, *words))
    first, *others = (read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in runs)
    for other in others:
        assert all(torch.equal(other[key], value) for key, value in first.items())


def test_variables_of_slurm(tmp_path, capsys, monkeypatch):
    """A job with more tasks than there are devices is told so; one task trains; a shell is not a job."""
    words = ["-b", str(write_vqgan(tmp_path)), "-t", "--max_steps", "1", "-l", str(tmp_path / "logs")]
    job = {"JOB_ID": "1", "NTASKS": "4", "JOB_NAME": "x", "LOCALID": "0", "PROCID": "0", "NODEID": "0",
           "NODELIST": "localhost"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert_not_started(main(words), capsys.readouterr().err, "--ntasks=4", tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert main([*words, "-n", "one"]) == 0
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    assert main([*words, "-n", "shell"]) == 0


# ---- the weights of the perceptual loss


@pytest.fixture
def offline(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)


@pytest.mark.parametrize("words", [["-t"], ["--dry-run"]])
def test_weights_of_lpips_are_looked_for_first(tmp_path, capsys, monkeypatch, offline, words):
    """Before anything is built; and both ways out that are printed are ways out."""
    perceptual = "model.params.lossconfig.params.perceptual_weight=1"
    arguments = ["-b", str(write_vqgan(tmp_path)), "-l", str(tmp_path / "logs"), perceptual, *words]
    monkeypatch.setattr("taming.models.vqgan.VQModel.__init__", None)
    status = main(arguments)
    error = capsys.readouterr().err
    assert_not_started(status, error, "LPIPS needs vgg16-397923af.pth, which is not in", tmp_path)
    monkeypatch.undo()
    remedy = re.search(r"or train without LPIPS: (\S+)", error)[1]
    assert main([*arguments, "--dry-run", remedy]) == 0
    file = tmp_path / "weights.pth"
    file.touch()
    by_path = re.search(r"give its path: (\S+)=FILE", error)[1]
    assert main([*arguments, "--dry-run", f"{by_path}={file}"]) == 0


def test_a_dry_run_asks_the_server_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    asked = []

    def answer(request, timeout):
        asked.append((request.get_method(), request.full_url))
        return io.BytesIO()

    monkeypatch.setattr(torch.hub, "urlopen", answer)
    perceptual = "model.params.lossconfig.params.perceptual_weight=1"
    assert main(["-b", str(write_vqgan(tmp_path)), "--dry-run", perceptual]) == 0
    assert asked == [("HEAD", "https://download.pytorch.org/models/vgg16-397923af.pth")]
    assert not (tmp_path / "torch").exists()


# ---- remedies that are printed


def test_the_training_of_a_missing_stage_can_be_pasted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "my photos"
    photos.mkdir()
    for i in range(20):
        Image.new("RGB", (70, 70)).save(photos / f"{i}.png")
    folder = f"data.params.train.params.folder={photos}"
    assert main(["-b", "custom_transformer", "-t", folder, "size=64"]) == 1
    command = re.search(r"Train that stage first \((.*)\), or name", capsys.readouterr().err)[1]
    python, program, *words = shlex.split(command)
    assert (python, program) == ("python", "main.py") and "size=64" in words
    small = ["model.params.ddconfig.ch=32", "model.params.lossconfig.params.perceptual_weight=0"]
    assert main([*words, *small, "--dry-run"]) == 0


def test_checkpoint_of_another_model(tmp_path, capsys):
    torch.save({"state_dict": {"transformer.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    words = ["-b", str(write_vqgan(tmp_path)), "-t", "-l", str(tmp_path / "logs")]
    status = main([*words, f"model.params.ckpt_path={tmp_path / 'other.ckpt'}"])
    message = capsys.readouterr().err
    assert_not_started(status, message, "do not fit VQModel; nothing was loaded", tmp_path)
    assert "unexpected in the file: 1 (transformer.weight)" in message


def test_list_of_missing_files(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("nowhere/a.png\nnowhere/b.png\n")
    words = ["-b", str(write_vqgan(tmp_path)), "-t", "-l", str(tmp_path / "logs"), "--ignore_base_data"]
    data = ["data.target=main.DataModuleFromConfig", "data.params.batch_size=1",
            "data.params.train.target=taming.data.custom.CustomTrain", "data.params.train.params.size=32",
            f"data.params.train.params.training_images_list_file={tmp_path / 'list.txt'}"]
    status = main([*words, *data])
    assert_not_started(status, capsys.readouterr().err, "nowhere/a.png", tmp_path)


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


def assert_not_started(status, error, message, folder):
    assert status == 1
    assert message in error[error.index("error: "):]
    assert "Traceback" not in error
    assert not (folder / "logs").exists()
