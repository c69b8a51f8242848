"""The training command on tiny models: run directories, exact resumption, interruptions, first stages."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from taming.checkpoint import load_model, read_checkpoint, save_exported
from taming.training.callbacks import LastCheckpoint
from taming.training.command import main
from tests.tiny import BATCHES, curves, resume, train, trouble, write_transformer, write_vqgan

STEPS = 6  # one epoch and a half
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Repeat sums bit by bit, and stay quick on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    """An uninterrupted run of the first stage, and its YAML."""
    folder = tmp_path_factory.mktemp("vqgan")
    yaml = write_vqgan(folder)
    return yaml, train(yaml, folder / "logs", "whole", "--max_steps", STEPS)


@pytest.fixture(scope="module")
def transformer(vqgan, tmp_path_factory):
    """An uninterrupted run of the second stage, and its YAML."""
    folder = tmp_path_factory.mktemp("transformer")
    yaml = write_transformer(folder, vqgan[1])
    return yaml, train(yaml, folder / "logs", "whole", "--max_steps", STEPS)


def test_run_directory_holds_what_a_run_is(vqgan):
    run = vqgan[1]
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "configs", "images", "metrics.csv", "tensorboard"
    ]
    assert [path.name.split("-")[-1] for path in sorted((run / "configs").iterdir())] == [
        "lightning.yaml", "project.yaml"
    ]
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints[-1] == "last.ckpt"
    assert [name.split("=")[1][:6] for name in checkpoints[:-1]] == ["000000", "000001"]  # the best
    images = {path.name for path in (run / "images" / "train").iterdir()}
    assert images == {f"sheet_{batch:06d}.png" for batch in (1, 2, 3, 6)}
    rows = [row for row in curves(run) if "train/rec_loss" in row]
    assert [int(row["step"]) for row in rows] == list(range(STEPS))
    assert ["train/d_weight" in row for row in rows] == [False] * 2 + [True] * 4  # disc_start: 2


def test_checkpoint_holds_config_and_batches(vqgan):
    checkpoint = read_checkpoint(vqgan[1] / "checkpoints" / "last.ckpt")
    assert checkpoint["batches_seen"] == STEPS
    assert checkpoint["global_step"] == 2 * STEPS - 2  # Lightning's: one per optimizer, the second from 2 on
    assert checkpoint["config"]["model"]["params"]["n_embed"] == 8


def assert_same(whole, interrupted, extra=()):
    """Every row of the curves is the same, but for validations after the steps `extra`."""
    found = [row for row in curves(interrupted) if "train/" in str(row) or int(row["step"]) not in extra]
    assert found == curves(whole)


@pytest.mark.parametrize(("words", "status", "extra"), [
    (["--max_steps", 3], 0, [2]),  # told to stop amid an epoch
    (["--max_steps", BATCHES], 0, []),  # at its end
    ([*trouble(kind="SIGINT", at=3)], 130, []),
    ([*trouble(kind="SIGTERM", at=BATCHES + 1)], 143, []),
    ([*trouble(kind="SIGINT", validation=1)], 130, []),
    ([*trouble(kind="nan", at=4)], 1, []),
], ids=["mid-epoch", "epoch end", "Ctrl-C", "SIGTERM", "Ctrl-C in validation", "NaN"])
def test_resumed_vqgan_repeats_the_uninterrupted_run(vqgan, tmp_path, words, status, extra):
    words = ["--max_steps", STEPS, *words]
    run = train(vqgan[0], tmp_path, "part", *words, status=status)
    resume(run, "--max_steps", STEPS)
    assert_same(vqgan[1], run, extra)
    last, wanted = (read_checkpoint(path / "checkpoints" / "last.ckpt") for path in (run, vqgan[1]))
    assert last["batches_seen"] == STEPS
    assert all(torch.equal(last["state_dict"][key], value) for key, value in wanted["state_dict"].items())


@pytest.mark.parametrize("words", [
    ["--max_steps", 3], [*trouble(kind="SIGINT", at=4)], [*trouble(kind="SIGINT", at=6)],
], ids=["mid-epoch", "Ctrl-C", "Ctrl-C after validation"])
def test_resumed_transformer_repeats_the_uninterrupted_run(transformer, tmp_path, words):
    status = 130 if "--allow" in words else 0
    run = train(transformer[0], tmp_path, "part", "--max_steps", STEPS, *words, status=status)
    resume(run, "--max_steps", STEPS)
    assert_same(transformer[1], run, extra=() if status else [2])


@pytest.mark.parametrize("at", [6, 7])
def test_resumed_amid_accumulated_batches(transformer, tmp_path, at):
    words = ["--accumulate_grad_batches", 3, "--max_steps", 4]  # groups of 3 and 1 in each epoch of 4
    whole = train(transformer[0], tmp_path, "whole", *words)
    assert len([row for row in curves(whole) if "train/loss" in row]) == 2 * BATCHES
    run = train(transformer[0], tmp_path, "part", *words, *trouble(kind="SIGINT", at=at), status=130)
    resume(run)
    assert_same(whole, run)


def test_two_runs_of_one_second_do_not_share_a_directory(vqgan, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("taming.training.command.time.strftime", lambda _: "2026-01-01T00-00-00")
    run = train(vqgan[0], tmp_path, "twin", "--max_steps", 1)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    train(vqgan[0], tmp_path, "twin", "--max_steps", 1, status=1)
    assert f"error: {run} exists already: a run of that name" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_signal_saves_and_training_goes_on(vqgan, tmp_path, monkeypatch):
    saved, save = [], LastCheckpoint.save

    def noted(self, trainer, pl_module):
        saved.append(pl_module.batches_seen)
        save(self, trainer, pl_module)

    monkeypatch.setattr(LastCheckpoint, "save", noted)
    run = train(vqgan[0], tmp_path, "part", "--max_steps", STEPS, *trouble(kind="SIGUSR1", at=3))
    assert saved[:2] == [1, 2]  # the first batch, always; and before the batch at whose start it came
    assert_same(vqgan[1], run)


def test_error_saves_the_state_before_it_and_keeps_its_traceback(vqgan, tmp_path, capfd):
    with pytest.raises(RuntimeError, match="something unforeseen"):
        train(vqgan[0], tmp_path, "part", "--max_steps", STEPS, *trouble(kind="error", at=3))
    run = next(tmp_path.glob("*_part"))
    assert f"failed after 2 batches; resume with\n  python main.py -t -r {run}" in capfd.readouterr().out
    resume(run)
    assert_same(vqgan[1], run)


def test_nan_is_named_and_the_weights_before_it_are_kept(vqgan, tmp_path, capfd):
    run = train(vqgan[0], tmp_path, "part", "--max_steps", STEPS, *trouble(kind="nan", at=4), status=1)
    message = capfd.readouterr().err
    assert "train/rec_loss = nan" in message and "at batch 3 of epoch 0" in message
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["batches_seen"] == 3
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.slow
def test_killed_process_resumes_from_the_last_periodic_checkpoint(vqgan, tmp_path):
    words = ["--max_steps", STEPS, "lightning.modelcheckpoint.params.every_n_train_steps=2"]
    command = [sys.executable, "main.py", "-b", vqgan[0], "-t", "-l", tmp_path, "-n", "part", *words]
    command += trouble(kind="die", at=4)
    result = subprocess.run([*map(str, command)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == -signal.SIGKILL
    run = next(tmp_path.glob("*_part"))
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["batches_seen"] == 2
    resume(run)
    wanted = [row for row in curves(vqgan[1]) if "train/rec_loss" in row]
    for row, other in zip((r for r in curves(run) if "train/rec_loss" in r), wanted, strict=True):
        assert float(row["train/rec_loss"]) == pytest.approx(float(other["train/rec_loss"]), abs=1e-4)


def test_test_split_is_evaluated_like_the_validation_split(vqgan, transformer, tmp_path, capsys):
    for run, name in ((vqgan[1], "rec_loss"), (transformer[1], "loss"), (transformer[1], "perplexity")):
        copy = shutil.copytree(run, tmp_path / name)
        data = ["data.params.test.params.size=32",
                "data.params.test.target=taming.data.landscapes.Landscapes",
                "data.params.test.params.length=4", "data.params.test.params.split=validation"]
        assert main(["-r", str(copy), *data]) == 0  # without -t: the checkpoint's weights
        rows = curves(copy)
        assert rows[:-1] == curves(run)
        validated = [row for row in rows if f"val/{name}" in row][-1]
        assert float(rows[-1][f"test/{name}"]) == pytest.approx(float(validated[f"val/{name}"]), rel=1e-5)


def test_finished_run_has_nothing_left_to_train(vqgan, tmp_path, capsys):
    run = shutil.copytree(vqgan[1], tmp_path / vqgan[1].name)
    resume(run)
    assert "nothing left to train after 6 batches" in capsys.readouterr().out
    assert curves(run) == curves(vqgan[1])


def test_without_train_nothing_is_written(vqgan, tmp_path, capsys):
    assert main(["-b", str(vqgan[0]), "-l", str(tmp_path / "logs")]) == 0
    assert main(["-b", str(vqgan[0]), "-t", "--dry-run", "-l", str(tmp_path / "logs")]) == 0
    printed = capsys.readouterr().out
    assert "built; add -t to train" in printed
    assert "8 training images, 4 batches per device and epoch" in printed
    assert re.search(r"a step: [\d.,]+ GFLOP, \S+ s \(median of \d batches on one device\), MFU ", printed)
    assert re.search(r"the whole run: [\d,]+ steps, \d+:\d\d:\d\d at this rate", printed)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(("words", "line"), [
    ([], "learning rate 0.002 = 1 (accumulated batches) x 1 (devices) x 1 (nodes) x 2 (batch size) x 0.001"),
    (["--accumulate_grad_batches", "4"], "learning rate 0.008 = 4 (accumulated batches)"),
    (["--scale_lr", "False"], "learning rate 0.001 (base, not scaled)"),
])
def test_learning_rate_is_printed_with_its_factors(vqgan, capsys, words, line):
    assert main(["-b", str(vqgan[0]), "--dry-run", *words]) == 0
    assert line in capsys.readouterr().out


def test_yaml_of_2021_is_translated(vqgan, tmp_path):
    old = tmp_path / "old.yaml"
    old.write_text("""
lightning:
  trainer: {gpus: 0, max_steps: 1, weights_summary: top, progress_bar_refresh_rate: 5}
  logger: {target: pytorch_lightning.loggers.TestTubeLogger, params: {name: testtube}}
  modelcheckpoint: {params: {save_top_k: 1, period: 1}}
  callbacks: {image_logger: {target: main.ImageLogger, params: {batch_frequency: 1, max_images: 1}}}
""")
    words = ["-b", str(vqgan[0]), str(old), "-t", "-l", str(tmp_path), "-n", "old", "-f", "_fix", "-s", "5"]
    assert main([*words, "model.params.n_embed=4"]) == 0
    run = next(tmp_path.glob("*_old_fix"))
    assert (run / "images" / "train" / "sheet_000001.png").exists()
    config = read_checkpoint(run / "checkpoints" / "last.ckpt")["config"]
    assert config["model"]["params"]["n_embed"] == 4  # what is said on the command line wins
    assert config["lightning"]["seed"] == config["data"]["params"]["seed"] == 5


@pytest.mark.parametrize("kind", ["file", "pattern", "exported"])
def test_first_stage_is_found(vqgan, tmp_path, capsys, kind):
    run = vqgan[1]
    place = {"file": run / "checkpoints" / "last.ckpt", "pattern": f"{run.parent}/*_whole"}.get(kind)
    if kind == "exported":
        model, config, step = load_model(run)
        place = save_exported(model, config, tmp_path / "exported", step)
    assert main(["-b", str(write_transformer(tmp_path, place)), "--dry-run"]) == 0
    file = tmp_path / "exported/model.safetensors" if kind == "exported" else run / "checkpoints/last.ckpt"
    assert f"first_stage_config: {file}" in capsys.readouterr().out


def test_transformer_needs_no_first_stage_once_trained(transformer, vqgan, tmp_path):
    hidden = vqgan[1].rename(vqgan[1].with_name("hidden"))
    try:
        model, config, step = load_model(transformer[1])
    finally:
        hidden.rename(vqgan[1])
    assert step == STEPS
    weight = load_model(vqgan[1])[0].state_dict()["encoder.conv_in.weight"]
    assert torch.equal(model.state_dict()["first_stage_model.encoder.conv_in.weight"], weight)


# ---- starting, failing, resuming


@pytest.mark.parametrize("words", [["lightning=null"], ["lightning={}"], ["lightning.trainer=null"], [
    "lightning.callbacks=null", "lightning.logger=null", "lightning.modelcheckpoint=null"]], ids=" ".join)
def test_sections_that_are_null(tmp_path, words):
    config = OmegaConf.load(write_vqgan(tmp_path))
    for word in words:
        key = word.partition("=")[0].split(".")
        parent = config if len(key) == 1 else config[key[0]]
        parent[key[-1]] = None if word.endswith("null") else {}
    OmegaConf.save(config, tmp_path / "null.yaml")
    words = ["--max_steps", 1, "--num_sanity_val_steps", 0]
    run = train(tmp_path / "null.yaml", tmp_path / "logs", "null", *words)
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["batches_seen"] == 1


@pytest.mark.parametrize(("kind", "at", "status"), [("nan", 1, 1), ("SIGINT", 1, 130), ("error", 1, None)])
def test_a_start_that_learned_nothing_leaves_no_run_directory(vqgan, tmp_path, kind, at, status):
    words = ["-b", str(vqgan[0]), "-t", "-l", str(tmp_path / "logs"), *trouble(kind=kind, at=at)]
    if status is None:
        with pytest.raises(RuntimeError, match="something unforeseen"):  # of another package: a traceback
            main(words)
    else:
        assert main(words) == status
    kept = list((tmp_path / "logs").glob("*")) if (tmp_path / "logs").exists() else []
    assert [run.name for run in kept if not (run / "checkpoints/last.ckpt").exists()] == []


def test_what_is_printed_after_a_failure_can_be_pasted(vqgan, tmp_path, capsys):
    words = ["--max_steps", STEPS, *trouble(kind="nan", at=3)]
    run = train(vqgan[0], tmp_path / "my logs", "first try & more", *words, status=1)
    printed = capsys.readouterr().out
    line = next(line.strip() for line in printed.splitlines() if line.strip().startswith("python main.py"))
    python, program, *pasted = shlex.split(line)
    assert (python, program) == ("python", "main.py") and str(run) in pasted and "--allow" in pasted
    assert main(pasted) == 0
    assert_same(vqgan[1], run)


def test_the_first_line_names_the_device(vqgan, capsys):
    assert main(["-b", str(vqgan[0]), "--gpus", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "device: CPU (1 threads)" and "note: gpus: 0 -> accelerator: cpu" in lines[1]


def test_devices_that_were_not_asked_for_are_not_stored(vqgan):
    """A run that began on a CPU because there was no GPU goes on with one where there is one."""
    trainer = read_checkpoint(vqgan[1] / "checkpoints" / "last.ckpt")["config"]["lightning"]["trainer"]
    assert "accelerator" not in trainer and "devices" not in trainer and trainer["max_steps"] == STEPS


def test_a_dry_run_builds_loggers_and_callbacks_and_writes_nothing(vqgan, tmp_path, capsys):
    run = shutil.copytree(vqgan[1], tmp_path / vqgan[1].name)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["-t", "-r", str(run), "--dry-run"]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    missing = "lightning.logger.target=pytorch_lightning.loggers.WandbLogger"
    assert main(["-t", "-r", str(run), "--dry-run", missing]) == 1
    assert "wandb" in capsys.readouterr().err


def test_home_is_expanded_wherever_a_path_is_read(vqgan, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    shutil.copy(vqgan[0], home / "vq.yaml")
    (home / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (40, 40)).save(home / "images" / f"{i}.png")
    config = OmegaConf.load(home / "vq.yaml")
    for split, name in (("train", "Train"), ("validation", "Test")):
        params = {"size": 32, "folder": "~/images"}
        config.data.params[split] = {"target": f"taming.data.custom.Custom{name}", "params": params}
    OmegaConf.save(config, home / "vq.yaml")
    words = ["-b", "~/vq.yaml", "-t", "--max_steps", "1", "--logdir=~/logs"]
    assert main([*words, f"model.params.ckpt_path={vqgan[1]}"]) == 0
    run = next((home / "logs").iterdir())
    assert main(["-t", "-r", f"~/logs/{run.name}", "--max_steps", "2"]) == 0
    assert main([*words, "-n", "second", f"model.params.ckpt_path=~/logs/{run.name}"]) == 0
    assert main(["-b", str(write_transformer(tmp_path, "~/logs/*_vq")), "--dry-run"]) == 0
    assert not (tmp_path / "~").exists()
    assert "~/images" in next((run / "configs").glob("*-project.yaml")).read_text(), "as it was written"


@pytest.mark.slow
def test_two_resumes_of_one_run(vqgan, tmp_path):
    run = shutil.copytree(vqgan[1], tmp_path / vqgan[1].name)
    command = [sys.executable, "main.py", "-t", "-r", run, "--max_steps", "150"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert sum("trained for 150 batches" in text for text in said) == 1
    assert sum(f"error: the run {run} is in use by process" in text for text in said) == 1
    steps = [int(row["step"]) for row in curves(run) if "train/rec_loss" in row]
    assert steps == sorted(set(steps))
