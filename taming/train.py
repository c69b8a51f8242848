"""The training command behind main.py: configuration, model and data, trainer, fit.

    python main.py --base configs/custom_vqgan.yaml -t --gpus 0,1 model.params.embed_dim=16

A step is a batch everywhere here (see `taming.models.base`).
"""

import csv
import glob
import logging
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities import rank_zero_only

from taming.callbacks import Interrupted, LastCheckpoint, SeededBatches, SetupCallback, StopAfterBatches, WholeFileIO, plain
from taming.checkpoint import config_of, find_checkpoint, read_checkpoint, without_ckpt_paths
from taming.config import allow_targets, instantiate_from_config, load_config
from taming.options import device_count, parse, resolve_trainer_arguments
from taming.util import count_params

STAGES = ("first_stage_config", "cond_stage_config")
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
    """Run the command; returns its exit status: 0, 1 for a user's error, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("taming.checkpoint").setLevel(logging.WARNING)
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
        return train(run, model, data, fit=options.train, test=not options.no_test)
    except (ValueError, FileNotFoundError) as error:
        if debug:
            import pdb

            pdb.post_mortem(error.__traceback__)
        say(f"error: {error}", file=sys.stderr)
        return 1


@rank_zero_only
def say(*words: object, file=None) -> None:
    """Print, in the first process only."""
    print(*words, file=file or sys.stdout, flush=True)


def prepare(options, overrides: dict, dotlist: list[str], notes: list[str]) -> Run:
    """Load the configuration, complete it, and decide on the run directory."""
    now, resume = time.strftime("%Y-%m-%dT%H-%M-%S"), None
    if "LOCAL_RANK" in os.environ:  # a process that the first one started: the same run
        now = os.environ.get("TAMING_START", now)
    os.environ["TAMING_START"] = now
    if options.resume:
        resume = find_checkpoint(options.resume)
        if resume.suffix != ".ckpt":
            raise ValueError(f"{resume} holds weights only: resume from a run directory or a .ckpt file")
        logdir = resume.parent.parent if resume.parent.name == "checkpoints" else resume.parent
        files = sorted((logdir / "configs").glob("*.yaml")) + [Path(base) for base in options.base]
        if not files:
            raise ValueError(f"{logdir / 'configs'} holds no YAML file: name the configuration with --base")
    else:
        if not options.base:
            raise ValueError("no configuration: name at least one with --base configs/....yaml, or resume with -r RUN")
        files = [Path(base) for base in options.base]
        name = options.name or files[0].stem
        logdir = Path(options.logdir) / f"{now}_{name}{options.postfix}"
    config = load_config(files)
    if options.ignore_base_data:
        config.pop("data", None)
    config = OmegaConf.merge(config, load_config([], dotlist))
    for section in ("model", "data"):
        if section not in config:
            raise ValueError(f"{', '.join(map(str, files))}: no section `{section}: {{target: ..., params: ...}}`")
    lightning = config.setdefault("lightning", {})
    arguments, more_notes = resolve_trainer_arguments(plain(lightning.get("trainer", {})), overrides)
    for note in notes + more_notes:
        say(f"note: {note}")
    seed = options.seed if options.seed is not None else lightning.get("seed", DEFAULT_SEED)
    lightning.seed, lightning.trainer = seed, dict(arguments)
    if "DataModuleFromConfig" in str(config.data.get("target")):
        config.data.params.setdefault("seed", seed)
    config.model = without_ckpt_paths(config.model) if resume else fill_stages(config.model)
    batch_arguments = {
        key: arguments.pop(key)
        for key in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "max_steps")
        if key in arguments
    }
    return Run(config, arguments, batch_arguments, logdir, now, resume, seed, options.project)


def fill_stages(model_config: DictConfig) -> DictConfig:
    """Complete the stages of a transformer from their checkpoints, where the configuration only names these.

    A stage is a path, or `params.ckpt_path` with or without target and params; the path is a checkpoint, a
    run directory, an exported folder, or a pattern such as `logs/*_custom_vqgan`, of which the newest match
    counts.
    """
    params = model_config.get("params", {})
    for key in STAGES:
        stage = params.get(key)
        if stage is None or (isinstance(stage, str) and stage.startswith("__")):
            continue
        stage = OmegaConf.create({"params": {"ckpt_path": stage}}) if isinstance(stage, str) else stage
        if OmegaConf.is_missing(stage.get("params") or {}, "ckpt_path"):
            raise ValueError(
                f"model.params.{key} names no checkpoint: add model.params.{key}.params.ckpt_path=logs/RUN, "
                "the run directory of that stage"
            )
        path = (stage.get("params") or {}).get("ckpt_path")
        if path is None:
            continue
        matches = sorted(glob.glob(str(path)), key=os.path.getmtime)
        if not matches:
            raise FileNotFoundError(
                f"model.params.{key}.params.ckpt_path: nothing at {path}. Train that stage first "
                "(python main.py --base configs/custom_vqgan.yaml -t), or name its run directory"
            )
        file = find_checkpoint(matches[-1])
        say(f"{key}: {file}")
        given = plain(stage)
        given["params"]["ckpt_path"] = str(file)
        if "ddconfig" not in given["params"]:
            trained = plain(config_of(read_checkpoint(file), file).model)
            kept = {
                name: value for name, value in trained["params"].items()
                if name not in ("ckpt_path", "ignore_keys", "monitor", "scheduler_config")
            }
            kept["lossconfig"] = {"target": "taming.modules.losses.DummyLoss"}
            given = {"target": given.get("target", trained["target"]), "params": {**kept, **given["params"]}}
        params[key] = given
    return model_config


def build(run: Run, scale_lr: bool) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """The model with its learning rate, and the data with its data sets built."""
    pl.seed_everything(run.seed, verbose=False)
    model = instantiate_from_config(run.config.model)
    data = instantiate_from_config(run.config.data)
    data.prepare_data()
    data.setup()
    algorithm = run.batch_arguments.get("gradient_clip_algorithm", "norm")
    if algorithm not in (None, "norm"):
        raise ValueError(f"gradient_clip_algorithm: {algorithm} is not supported here: gradients are clipped by norm")
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
            f"learning rate {model.learning_rate:.3g} = {model.accumulate_grad_batches} (accumulated batches) x "
            f"{devices} (devices) x {nodes} (nodes) x {data.batch_size} (batch size) x {base:.3g} (base)"
        )
    else:
        say(f"learning rate {model.learning_rate:.3g} (base, not scaled)")
    return model, data


def describe(run: Run, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Print what a run would be: configuration, parameters, steps."""
    say(OmegaConf.to_yaml(run.config, resolve=True))
    for name, part in model.named_children():
        trainable, total = count_params(part)
        if total:
            say(f"{name:20s} {total:>14,} parameters, {trainable:,} trainable")
    devices, nodes = device_count(run.trainer_arguments)
    batches = math.floor(len(data.datasets["train"]) / (data.batch_size * devices * nodes))
    steps = math.ceil(batches / model.accumulate_grad_batches)
    say(f"{len(data.datasets['train']):,} training images, {batches:,} batches per device and epoch, {steps:,} steps")
    say(f"run directory (not made): {run.logdir}")


def train(run: Run, model: pl.LightningModule, data: pl.LightningDataModule, *, fit: bool, test: bool) -> int:
    """Fit, or go on fitting, and test; returns the exit status."""
    trainer = build_trainer(run, model)
    say(f"run directory: {run.logdir}")
    if fit:
        try:
            trainer.fit(model, data, ckpt_path=None if run.resume is None else str(run.resume))
        except (Interrupted, KeyboardInterrupt):
            say(f"stopped after {model.batches_seen} batches; resume with\n  python main.py -t -r {run.logdir}")
            return 130
        except BaseException:
            if model.batches_seen:
                say(f"failed after {model.batches_seen} batches; resume with\n  python main.py -t -r {run.logdir}")
            raise
        say(f"trained for {model.batches_seen} batches: {run.logdir}")
    if test and "test" in getattr(data, "datasets", {}):
        trainer.test(model, data)
    return 0


def build_trainer(run: Run, model: pl.LightningModule) -> pl.Trainer:
    """The Trainer with its loggers and callbacks; what counts batches is left to these."""
    arguments = dict(run.trainer_arguments)
    if math.prod(device_count(arguments)) > 1:
        arguments.setdefault("strategy", "ddp")
    max_steps = run.batch_arguments.get("max_steps")
    if max_steps not in (None, -1):
        arguments.setdefault("max_epochs", -1)
    callbacks = build_callbacks(run, model)
    if max_steps not in (None, -1):
        callbacks.append(StopAfterBatches(int(max_steps)))
    arguments["plugins"] = [*(arguments.get("plugins") or []), WholeFileIO()]
    arguments = {"log_every_n_steps": 10, **arguments, "use_distributed_sampler": False}
    return pl.Trainer(
        logger=build_loggers(run), callbacks=callbacks, default_root_dir=str(run.logdir), **arguments
    )


def build_callbacks(run: Run, model: pl.LightningModule) -> list[Callback]:
    """The usual callbacks, changed and extended by the sections `callbacks` and `modelcheckpoint`."""
    lightning = run.config.lightning
    checkpoints = run.logdir / "checkpoints"
    best = plain(lightning.get("modelcheckpoint", {}))
    params = {"dirpath": str(checkpoints), "save_top_k": 3, **best.get("params", {}), "save_last": None}
    every = params.pop("every_n_train_steps", None)  # Lightning counts optimizer steps, two a batch
    params.setdefault("monitor", model.monitor)
    wanted = {"image_logger": {"target": "taming.callbacks.ImageLogger", "params": {}}}
    wanted = plain(OmegaConf.merge(wanted, lightning.get("callbacks", {})))
    callbacks: list[Callback] = [
        SetupCallback(run.logdir, run.now, plain(run.config)), SeededBatches(run.seed),
        *(instantiate_from_config(config) for config in wanted.values()),
    ]
    if run.trainer_arguments.get("enable_progress_bar", True):
        callbacks.append(TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 20))
    if not run.trainer_arguments.get("enable_checkpointing", True):
        return callbacks
    if params["monitor"] is not None:
        name = params["monitor"].split("/")[-1]
        params.setdefault("filename", f"epoch={{epoch:06d}}-{name}={{{params['monitor']}:.4f}}")
        params.setdefault("auto_insert_metric_name", False)
        target = best.get("target", "pytorch_lightning.callbacks.ModelCheckpoint")
        callbacks.append(instantiate_from_config({"target": target, "params": params}))
    callbacks.append(LastCheckpoint(checkpoints / "last.ckpt", every_n_batches=every))
    return callbacks


def build_loggers(run: Run) -> list[Logger]:
    """CSV always; the section `logger` in place of TensorBoard, which is the default where it is
    installed."""
    loggers: list[Logger] = [csv_logger(run.logdir, run.resume)]
    config = plain(run.config.lightning.get("logger", {}))
    if config.get("target"):
        params = {"save_dir": str(run.logdir), **config.get("params", {})}
        if run.project:
            params.setdefault("project", run.project)
        return [*loggers, instantiate_from_config({"target": config["target"], "params": params})]
    try:
        from pytorch_lightning.loggers import TensorBoardLogger

        return [*loggers, TensorBoardLogger(str(run.logdir), name="tensorboard", version="")]
    except ModuleNotFoundError:
        say("note: no TensorBoard here (pip install tensorboard): curves go to metrics.csv only")
        return loggers


def csv_logger(logdir: Path, resume: Path | None) -> CSVLogger:
    """Curves in logdir/metrics.csv; a resumed run keeps the rows from before its checkpoint."""
    path, rows = logdir / "metrics.csv", []
    if resume is not None and path.exists() and rank_zero_only.rank == 0:
        loops = read_checkpoint(resume).get("loops", {}).get("fit_loop", {})
        reached = loops.get("epoch_loop.state_dict", {}).get("_batches_that_stepped", math.inf)
        with path.open(newline="") as file:
            rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
        rows = [row for row in rows if int(row["step"]) <= reached]
    logger = CSVLogger(str(logdir), name="", version="")
    if rows:
        path.unlink()  # the logger would delete it, with a warning, when it is first used
        logger.experiment.metrics.extend(rows)
    return logger


