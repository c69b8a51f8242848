"""Both stages in the smallest size that trains, runs of main() on them, and callbacks that get in the way."""

import atexit
import csv
import errno
import io
import os
import signal
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback

from taming.data.files.images import read_image
from taming.training.command import main

BATCHES = 4  # per epoch

DATA = """
data:
  target: main.DataModuleFromConfig
  params:
    batch_size: 2
    num_workers: 0
    train: {target: taming.data.landscapes.Landscapes, params: {size: 32, length: 8, split: train}}
    validation: {target: taming.data.landscapes.Landscapes, params: {size: 32, length: 4, split: validation}}
lightning:
  trainer:
    {num_sanity_val_steps: 0, log_every_n_steps: 1, enable_progress_bar: false, enable_model_summary: false}
  callbacks: {image_logger: {params: {batch_frequency: 3, max_images: 2}}}
"""

VQGAN = """
model:
  base_learning_rate: 1.0e-3
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 4
    n_embed: 8
    monitor: val/rec_loss
    ddconfig:
      {double_z: false, z_channels: 32, resolution: 32, in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1, 1, 1],
       num_res_blocks: 1, attn_resolutions: [], dropout: 0.1}
    lossconfig:
      target: taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator
      params: {perceptual_weight: 0.0, disc_start: 2, disc_num_layers: 1, disc_ndf: 8, use_actnorm: true}
    scheduler_config:
      target: taming.lr_scheduler.LambdaWarmUpCosineScheduler
      params: {warm_up_steps: 2, max_decay_steps: 20, lr_start: 0.1, lr_max: 1.0, lr_min: 0.1}
"""

TRANSFORMER = """
model:
  base_learning_rate: 1.0e-3
  target: taming.models.cond_transformer.Net2NetTransformer
  params:
    monitor: val/loss
    first_stage_key: image
    cond_stage_key: class_label
    pkeep: 0.8
    first_stage_config: {params: {ckpt_path: "???"}}
    cond_stage_config: {target: taming.modules.util.Labelator, params: {n_classes: 16}}
    transformer_config:
      target: taming.modules.transformer.mingpt.GPT
      params:
        {vocab_size: 16, block_size: 64, n_layer: 1, n_head: 2, n_embd: 16, embd_pdrop: 0.1, resid_pdrop: 0.1}
"""


def write_vqgan(folder: Path) -> Path:
    """Write the YAML of a VQGAN and its data, and return its name."""
    path = folder / "vqgan.yaml"
    path.write_text(VQGAN + DATA)
    return path


def write_transformer(folder: Path, first_stage: str | Path) -> Path:
    """Write the YAML of a transformer over the first stage at that path, and return its name."""
    path = folder / "transformer.yaml"
    config = OmegaConf.create(TRANSFORMER + DATA)
    config.model.params.first_stage_config.params.ckpt_path = str(first_stage)
    OmegaConf.save(config, path)
    return path


def train(yaml: Path, logs: Path, name: str, *words: str | int, status: int = 0) -> Path:
    """Train by the command and return the run directory."""
    assert main(["-b", str(yaml), "-t", "-l", str(logs), "-n", name, *map(str, words)]) == status
    return next(logs.glob(f"*_{name}"))


def resume(run: Path, *words: str | int) -> None:
    """Resume a run by the command."""
    assert main(["-t", "-r", str(run), "--allow", "tests", *map(str, words)]) == 0


def curves(run: Path) -> list[dict[str, str]]:
    """Read the rows of metrics.csv, without times, which no two runs share."""
    with open(run / "metrics.csv", newline="") as file:
        return [
            {key: value for key, value in row.items() if value and not key.startswith("perf/")}
            for row in csv.DictReader(file)
        ]


def trouble(**params: object) -> list[str]:
    """Words of a command line that add the callback `Trouble`."""
    words = [f"lightning.callbacks.trouble.params.{key}={value}" for key, value in params.items()]
    return ["--allow", "tests", "lightning.callbacks.trouble.target=tests.tiny.Trouble", *words]


class Trouble(Callback):
    """Something that happens once, in the training batch `at` or the validation `validation`, from 1 on.

    `kind` is a signal's name, "error", "file" (one that cannot be read), "nan" or "die". It happens in all
    processes, or in that of number `rank`. A resumed run is left alone.
    """

    def __init__(self, kind: str, at: int = 0, validation: int = 0, rank: int | None = None):
        self.kind, self.at, self.validation, self.rank, self._validations = kind, at, validation, rank, 0

    def on_train_start(self, trainer, pl_module):
        self._active = pl_module.batches_seen == 0 and self.rank in (None, trainer.global_rank)

    def _happen(self, batch):
        if self.kind == "nan":
            batch["image"].fill_(torch.nan)
        elif self.kind == "error":
            raise RuntimeError("something unforeseen")
        elif self.kind == "file":
            read_image(__file__)
        elif self.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), getattr(signal, self.kind))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self._active and trainer.fit_loop.epoch_loop.batch_progress.total.processed + 1 == self.at:
            self._happen(batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._validations += batch_idx == 0
        if self._active and self._validations == self.validation and batch_idx == 0:
            self._happen(batch)


class FullDisk(io.RawIOBase):
    """A file on a disk that is full."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class SlowDisk(Callback):
    """Let each checkpoint take `seconds` to write, half of its bytes before them and half after."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def setup(self, trainer, pl_module, stage):
        torch.save = self.save

    def save(self, content, file, save=torch.save):
        data = io.BytesIO()
        save(content, data)
        whole = data.getvalue()
        file.write(whole[: len(whole) // 2])
        file.flush()
        time.sleep(self.seconds)
        file.write(whole[len(whole) // 2 :])


class BadGradient(Callback):
    """A NaN in one gradient of batch `at`, from 1 on, though its loss is finite."""

    def __init__(self, at: int):
        self.at = at

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.batches_seen + 1 == self.at and optimizer is trainer.optimizers[0]:
            pl_module.encoder.conv_in.weight.grad[0, 0] = torch.nan


class Record(Callback):
    """Write what each process has: gradients of the first step, weights at the end, a group at its exit."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        file = self.folder / f"gradients_{trainer.world_size}_{trainer.global_rank}.pt"
        if not file.exists():
            parameters = pl_module.named_parameters()
            torch.save({name: p.grad.clone() for name, p in parameters if p.grad is not None}, file)

    def on_train_end(self, trainer, pl_module):
        codes = {key: value for key, value in trainer.callback_metrics.items() if "codebook" in key}
        state = {**pl_module.state_dict(), **codes}
        torch.save(state, self.folder / f"weights_{trainer.world_size}_{trainer.global_rank}.pt")
        if (averages := pl_module.averages) is not None:
            file = f"averages_{trainer.world_size}_{trainer.global_rank}.pt"
            torch.save(averages.weights, self.folder / file)
        group = weakref.ref(dist.group.WORLD) if dist.is_initialized() else lambda: None
        left = self.folder / f"group_{trainer.world_size}_{trainer.global_rank}.txt"
        atexit.register(lambda: left.write_text(str(group())))
