"""The training command behind main.py: configuration, model and data, trainer, fit.

    python main.py --base configs/custom_vqgan.yaml -t --gpus 0,1 model.params.embed_dim=16

A step is a batch everywhere here (see `taming.models.base`).
"""

import glob
import logging
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

from taming.checkpoint import config_of, find_checkpoint, read_checkpoint, without_ckpt_paths
from taming.config import allow_targets, instantiate_from_config, load_config
from taming.models.base import NonFiniteLoss
from taming.training.arguments import device_count, parse, resolve_trainer_arguments
from taming.training.callbacks import (
    AtomicCheckpointIO,
    ExactResume,
    Interrupted,
    NotSaved,
    SeededBatches,
    SetupCallback,
    StopAfterBatches,
    Unhealthy,
    plain,
)
from taming.training.console import message_of_ours, report, say, silence
from taming.training.loggers import build_loggers
from taming.training.sync_batchnorm import SyncBatchNorms
from taming.util import count_params

STAGES = ("first_stage_config", "cond_stage_config")
USUAL_CALLBACKS = {  # null in the section `lightning.callbacks` takes one away
    "image_logger": "taming.training.callbacks.ImageLogger",
    "health": "taming.training.callbacks.Health",
    "progress": "taming.training.callbacks.Progress",
    "last_checkpoint": "taming.training.callbacks.LastCheckpoint",
}
DEFAULT_SEED = 23  # that of 2021


@dataclass
class Run:
    """One start of the command: what to train, where, and from which checkpoint."""

    config: DictConfig  # model, data, lightning; what the checkpoints will carry
    trainer_arguments: dict[str, Any]  # of pl.Trainer, but for what is done by hand here
    batch_arguments: dict[str, Any]  # accumulate_grad_batches, gradient_clip_val, max_steps
    logdir: Path
    now: str
    resume: Path | None
    seed: int
    project: str | None  # of loggers that know projects


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns the exit status: 0; 1 for a user's error, which is one line; 130 after Ctrl-C. Other errors pass.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("taming.checkpoint").setLevel(logging.WARNING)
    silence()
    debug = False
    try:
        options, overrides, dotlist, notes = parse(sys.argv[1:] if argv is None else argv)
        debug = options.debug
        allow_targets(*options.allow)
        run = prepare(options, overrides, dotlist, notes)
        model, data = build(run, scale_lr=options.scale_lr)
        if options.dry_run:
            describe(run, model, data)
            return 0
    except (ValueError, FileNotFoundError) as error:
        return report(error, debug)
    except KeyboardInterrupt:
        return 130
    try:
        status = train(run, model, data, fit=options.train, test=not options.no_test)
    except Exception as error:
        if debug or isinstance(error, NonFiniteLoss | NotSaved | Unhealthy) or message_of_ours(error):
            return report(error, debug)
        raise
    leave_group()
    return status


def leave_group() -> None:
    """Part from the other processes, which Lightning does for nccl alone.

    The threads of a gloo group that is left would let go of tensors while the interpreter shuts down, which
    now and then aborts a process whose work was done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def prepare(options, overrides: dict, dotlist: list[str], notes: list[str]) -> Run:
    """Load the configuration, complete it, and decide on the run directory."""
    now = time.strftime("%Y-%m-%dT%H-%M-%S")
    if "LOCAL_RANK" in os.environ:  # a process that the first one started: the same run
        now = os.environ.get("TAMING_START", now)
    os.environ["TAMING_START"] = now
    files, logdir, resume = locate(options, now)
    config = load_config(files)
    if options.ignore_base_data:
        config.pop("data", None)
    config = OmegaConf.merge(config, load_config([], dotlist))
    for section in ("model", "data"):
        if not OmegaConf.is_dict(config.get(section)) or "target" not in config[section]:
            names = ", ".join(map(str, files))
            raise ValueError(f"{names}: no section `{section}: {{target: ..., params: ...}}`")
    lightning = config.setdefault("lightning", {})
    arguments, more_notes = resolve_trainer_arguments(plain(lightning.get("trainer") or {}), overrides)
    for note in notes + more_notes:
        say(f"note: {note}")
    seed = options.seed if options.seed is not None else lightning.get("seed", DEFAULT_SEED)
    lightning.seed, lightning.trainer = seed, dict(arguments)
    if "DataModuleFromConfig" in str(config.data.target):
        config.data.setdefault("params", {}).setdefault("seed", seed)
    config.model = without_ckpt_paths(config.model) if resume else fill_stages(config.model)
    by_hand = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "max_steps")
    batch_arguments = {key: arguments.pop(key) for key in by_hand if key in arguments}
    return Run(config, arguments, batch_arguments, logdir, now, resume, seed, options.project)


def locate(options, now: str) -> tuple[list[Path], Path, Path | None]:
    """The YAML files, the run directory, and the checkpoint to go on from."""
    files = [Path(base) for base in options.base]
    if not options.resume:
        if not files:
            raise ValueError("no configuration: name one with --base configs/....yaml, or resume with -r RUN")
        name = options.name or files[0].stem
        return files, Path(options.logdir) / f"{now}_{name}{options.postfix}", None
    resume = find_checkpoint(options.resume)
    if resume.suffix != ".ckpt":
        raise ValueError(f"{resume} holds weights only: resume from a run directory or a .ckpt file")
    logdir = resume.parent.parent if resume.parent.name == "checkpoints" else resume.parent
    files = sorted((logdir / "configs").glob("*.yaml")) + files
    if not files:
        raise ValueError(f"{logdir / 'configs'} holds no YAML file: name the configuration with --base")
    return files, logdir, resume


def fill_stages(model_config: DictConfig) -> DictConfig:
    """Complete the stages of a transformer from their checkpoints, where the configuration only names these.

    A stage is a path, or `params.ckpt_path` with or without target and params; the path is a checkpoint, a
    run directory, an exported folder, or a pattern such as `logs/*_custom_vqgan`, of which the newest match
    counts.
    """
    params = model_config.get("params", {})
    for key in STAGES:
        stage = params.get(key)
        if OmegaConf.is_list(stage):  # several conditions
            params[key] = [complete_stage(f"{key}.{i}", one) for i, one in enumerate(stage)]
        elif stage is not None:
            params[key] = complete_stage(key, stage)
    return model_config


def complete_stage(key: str, stage: DictConfig | str) -> DictConfig | dict | str:
    """One stage, as it is where it names no checkpoint."""
    if isinstance(stage, str) and stage.startswith("__"):
        return stage
    stage = OmegaConf.create({"params": {"ckpt_path": stage}}) if isinstance(stage, str) else stage
    if OmegaConf.is_missing(stage.get("params") or {}, "ckpt_path"):
        raise ValueError(
            f"model.params.{key} names no checkpoint: add model.params.{key}.params.ckpt_path=logs/RUN, "
            "the run directory of that stage"
        )
    path = (stage.get("params") or {}).get("ckpt_path")
    return stage if path is None else fill_stage(key, plain(stage), str(path))


def fill_stage(key: str, stage: dict, path: str) -> dict:
    """A stage with the file of its checkpoint and, where they are not given, that one's target and params."""
    matches = [path] if os.path.exists(path) else sorted(glob.glob(path), key=os.path.getmtime)
    if not matches:
        raise FileNotFoundError(
            f"model.params.{key}.params.ckpt_path: nothing at {path}. Train that stage "
            f"first{training_of(path)}, or name its run directory"
        )
    file = find_checkpoint(matches[-1])
    say(f"{key}: {file}")
    given = {**stage["params"], "ckpt_path": str(file)}
    if "target" in stage and "ddconfig" in given:
        return {**stage, "params": given}
    trained = plain(config_of(read_checkpoint(file), file).model)
    of_training = ("ckpt_path", "ignore_keys", "monitor", "scheduler_config")
    kept = {name: value for name, value in trained.get("params", {}).items() if name not in of_training}
    if "lossconfig" in kept:
        kept["lossconfig"] = {"target": "taming.modules.losses.DummyLoss"}
    return {"target": stage.get("target", trained["target"]), "params": {**kept, **given}}


def training_of(path: str) -> str:
    """The command that trains what a pattern such as logs/*_custom_vqgan is of, in brackets, or nothing."""
    name = Path(path).name.strip("*_")
    files = sorted(Path("configs").rglob(f"{name}.yaml")) if name else []
    return f" (python main.py --base {files[0]} -t)" if files else ""


def build(run: Run, scale_lr: bool) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """The model with its learning rate, and the data with its data sets built; both fit together."""
    pl.seed_everything(run.seed, verbose=False)
    model = instantiate_from_config(run.config.model)
    data = instantiate_from_config(run.config.data)
    data.prepare_data()
    data.setup()
    check_first_item(model, data)
    algorithm = run.batch_arguments.get("gradient_clip_algorithm", "norm")
    if algorithm not in (None, "norm"):
        raise ValueError(f"gradient_clip_algorithm: {algorithm} is unknown here: it is always norm")
    model.accumulate_grad_batches = int(run.batch_arguments.get("accumulate_grad_batches") or 1)
    model.gradient_clip_val = run.batch_arguments.get("gradient_clip_val")
    base = run.config.model.get("base_learning_rate")
    if base is None:
        raise ValueError("model.base_learning_rate is missing: 4.5e-6 is the paper's, times the batch size")
    model.learning_rate = float(base)
    if scale_lr:
        devices, nodes = device_count(run.trainer_arguments)
        model.learning_rate *= model.accumulate_grad_batches * devices * nodes * data.batch_size
        say(
            f"learning rate {model.learning_rate:.3g} = "
            f"{model.accumulate_grad_batches} (accumulated batches) x {devices} (devices) x {nodes} (nodes) "
            f"x {data.batch_size} (batch size) x {float(base):.3g} (base)"
        )
    else:
        say(f"learning rate {model.learning_rate:.3g} (base, not scaled)")
    return model, data


def check_first_item(model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Raise unless there is a batch to train on, and images are there and of a size that the model takes."""
    items = getattr(data, "datasets", {}).get("train")
    if not hasattr(items, "__getitem__"):
        return
    if hasattr(data, "drop_last") and len(items):
        data.train_dataloader()  # says so when the images do not fill a batch
    item = items[0]
    wanted = [getattr(model, name, None) for name in ("image_key", "first_stage_key")]
    wanted += getattr(model, "cond_keys", [])
    for key in filter(None, wanted):
        if isinstance(item, dict) and key not in item:
            raise ValueError(
                f"the training data has no {key!r}, only {', '.join(map(repr, sorted(item)))}: change the "
                "model's image_key, first_stage_key or cond_stage_key, or the data set"
            )
    image, stage = wanted[0] or wanted[1], getattr(model, "first_stage_model", model)
    if image and hasattr(stage, "check_size") and np.ndim(item[image]) == 3:
        stage.check_size(*np.shape(item[image])[:2])


def describe(run: Run, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Print what a run would be: configuration, parameters, steps."""
    say(OmegaConf.to_yaml(run.config, resolve=True))
    for name, part in model.named_children():
        trainable, total = count_params(part)
        if total:
            say(f"{name:20s} {total:>14,} parameters, {trainable:,} trainable")
    items = getattr(data, "datasets", {}).get("train")
    if hasattr(items, "__len__"):
        batches = len(items) // (data.batch_size * math.prod(device_count(run.trainer_arguments)))
        steps = math.ceil(batches / model.accumulate_grad_batches)
        say(f"{len(items):,} training images, {batches:,} batches per device and epoch, {steps:,} steps")
    say(f"run directory (not made): {run.logdir}")


def train(run: Run, model: pl.LightningModule, data: pl.LightningDataModule, *, fit: bool, test: bool) -> int:
    """Fit, or go on fitting, and test; returns the exit status."""
    test = test and "test" in getattr(data, "datasets", {})
    if not (fit or test):
        say("built; add -t to train")
        return 0
    if fit and run.resume is None:
        claim(run.logdir)
    trainer = build_trainer(run, model, data, fit)
    checkpoint = None if run.resume is None else str(run.resume)
    if fit:
        status = run_fit(run, trainer, model, data, checkpoint)
        if status:
            return status
    if test:
        trainer.test(model, data, ckpt_path=None if fit else checkpoint, weights_only=True)
    return 0


def run_fit(run: Run, trainer: pl.Trainer, model: pl.LightningModule, data, checkpoint: str | None) -> int:
    """Fit, and say how to go on whatever happens; returns the exit status."""
    say(f"run directory: {run.logdir}")
    hint = f"resume with\n  python main.py -t -r {run.logdir}"
    last = run.logdir / "checkpoints" / "last.ckpt"
    before = read_checkpoint(checkpoint).get("batches_seen", 0) if checkpoint else 0
    try:
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    except (Interrupted, KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the second into the third
        say(f"stopped after {model.batches_seen} batches" + (f"; {hint}" if last.exists() else ""))
        return getattr(stop, "status", 130)
    except BaseException:
        if last.exists():
            say(f"failed after {model.batches_seen} batches; {hint}")
        raise
    if before and model.batches_seen == before:
        say(f"nothing left to train after {before} batches: raise --max_steps or --max_epochs")
    else:
        say(f"trained for {model.batches_seen} batches: {run.logdir}")
    return 0


@rank_zero_only
def claim(logdir: Path) -> None:
    """Make a new run's directory, before anything is written to it."""
    try:
        logdir.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(
            f"{logdir} is there already: a run of that name was started in the same second; start again, or "
            "give the run another name (-n)"
        ) from None


def build_trainer(run: Run, model: pl.LightningModule, data: pl.LightningDataModule, fit: bool) -> pl.Trainer:
    """The Trainer with its loggers and callbacks; what counts batches is left to these."""
    arguments = dict(run.trainer_arguments)
    devices = math.prod(device_count(arguments))
    if devices > 1:
        arguments.setdefault("strategy", "ddp")
    callbacks = build_callbacks(run, model)
    max_steps = run.batch_arguments.get("max_steps")
    if max_steps not in (None, -1):
        arguments.setdefault("max_epochs", -1)
        callbacks.append(StopAfterBatches(int(max_steps)))
    arguments["plugins"] = [*(arguments.get("plugins") or []), AtomicCheckpointIO()]
    if arguments.pop("sync_batchnorm", False) and devices > 1:
        arguments["plugins"].append(SyncBatchNorms())
    if "log_every_n_steps" not in arguments and hasattr(items := data.datasets.get("train"), "__len__"):
        arguments["log_every_n_steps"] = min(10, max(1, len(items) // (data.batch_size * devices)))
    arguments["use_distributed_sampler"] = False
    loggers = build_loggers(
        run.logdir, plain(run.config.lightning.get("logger") or {}),
        resume=run.resume if fit else None, project=run.project,
    )
    return pl.Trainer(logger=loggers, callbacks=callbacks, default_root_dir=str(run.logdir), **arguments)


def build_callbacks(run: Run, model: pl.LightningModule) -> list[Callback]:
    """The usual callbacks, changed and extended by the sections `callbacks` and `modelcheckpoint`."""
    lightning = run.config.lightning
    checkpoints = run.logdir / "checkpoints"
    best = plain(lightning.get("modelcheckpoint", {}))
    params = {"dirpath": str(checkpoints), "save_top_k": 3, **best.get("params", {}), "save_last": None}
    if "period" in params:  # its name in 2021
        params["every_n_epochs"] = params.pop("period")
    every = params.pop("every_n_train_steps", None)  # Lightning counts optimizer steps, two a batch
    params.setdefault("monitor", model.monitor)
    usual: dict[str, Any] = {key: {"target": target, "params": {}} for key, target in USUAL_CALLBACKS.items()}
    usual["last_checkpoint"]["params"]["every_n_batches"] = every
    wanted = plain(OmegaConf.merge(usual, lightning.get("callbacks") or {}))
    if not run.trainer_arguments.get("enable_progress_bar", True):
        wanted["progress"] = None
    if not run.trainer_arguments.get("enable_checkpointing", True):
        wanted["last_checkpoint"] = None
    callbacks: list[Callback] = [
        SetupCallback(run.now, plain(run.config)), SeededBatches(run.seed), ExactResume(),
        *(instantiate_from_config(config) for config in wanted.values() if config is not None),
    ]
    if not run.trainer_arguments.get("enable_checkpointing", True):
        return callbacks
    if params["monitor"] is not None:
        name = params["monitor"].split("/")[-1]
        params.setdefault("filename", f"epoch={{epoch:06d}}-{name}={{{params['monitor']}:.4f}}")
        params.setdefault("auto_insert_metric_name", False)
        target = best.get("target", "pytorch_lightning.callbacks.ModelCheckpoint")
        callbacks.append(instantiate_from_config({"target": target, "params": params}))
    return callbacks
