"""The training command behind main.py: configuration, model and data, trainer, fit.

    python main.py --base configs/custom_vqgan.yaml -t --gpus 0,1 model.params.embed_dim=16

A step is a batch everywhere here (see `taming.models.base`).
"""

import logging
import math
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from taming.checkpoint import find_checkpoint, read_checkpoint, without_ckpt_paths
from taming.config import (
    allow_targets,
    find_config,
    instantiate_from_config,
    load_config,
    models_only,
    override_config,
    run_directory,
    storable,
)
from taming.parameters import NonNegativeFloat, PositiveInt, Range, mismatch
from taming.threads import choose_threads
from taming.training.acceleration import accelerate
from taming.training.arguments import parse
from taming.training.callbacks import (
    AtomicCheckpointIO,
    ExactResume,
    Interrupted,
    SeededBatches,
    SetupCallback,
    StopAfterBatches,
    plain,
)
from taming.training.checks import check_agreement, check_loss_files, check_monitors
from taming.training.console import (
    comes_from,
    command_line,
    filter_noise,
    message_for_users,
    rank_zero_print,
    report,
)
from taming.training.cost import measure_cost
from taming.training.distributed import (
    FailTogether,
    OtherProcessFailed,
    check_launch,
    has_lost_another,
    same_environment,
)
from taming.training.legacy_checkpoint import ResumeLegacyRun, batches_seen
from taming.training.loggers import build_loggers
from taming.training.run_dir import TIME_FORMAT, find_run, locked_run_dir, new_run_dir
from taming.training.sections import MODEL_CHECKPOINT, SECTIONS, USUAL_CALLBACKS, complete_sections
from taming.training.sharding import resolve_strategy
from taming.training.stages import fill_stages
from taming.training.sync_batchnorm import SyncBatchNorms
from taming.training.trainer_arguments import (
    describe_devices,
    device_count,
    resolve_trainer_arguments,
    with_devices,
)
from taming.util import count_params

Seed = Annotated[int, Range(0, 2**32 - 1)]
DEFAULT_SEED = 23  # that of 2021


@dataclass
class Run:
    """One start of the command: what to train, where, and from which checkpoint."""

    config: DictConfig  # model, data, lightning; checkpoints carry it
    options: Namespace  # of the command line, see `arguments.parse`
    trainer_arguments: dict[str, Any]  # of pl.Trainer, but for those that are handled here
    batch_arguments: dict[str, Any]  # accumulate_grad_batches, gradient_clip_val, max_steps
    logdir: Path
    now: str
    seed: int
    resume: Path | None = None  # checkpoint to go on from
    resume_with: str | None = None  # another command than main.py that resumes the run
    has_learned: bool = False  # whether this start has trained at least one batch


def main(
    argv: list[str] | None = None, resume_with: str | None = None, prog: str = "main.py"
) -> int:
    """Run the command; `resume_with` is the command that resumes the run, if it is not this one.

    `prog` is the name of the command in the help text.

    Returns the exit status: 0; 1 after an error that is told in one line; 130 after Ctrl-C. After the first
    batch, errors that are not meant for users pass.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("taming.checkpoint").setLevel(logging.WARNING)
    filter_noise()
    options, run = Namespace(allow=[], debug=False), None
    dotlist: list[str] = []
    try:
        options, overrides, dotlist, notes = parse(sys.argv[1:] if argv is None else argv, prog)
        allow_targets(*options.allow)
        with same_environment():
            run = prepare(options, overrides, dotlist, notes)
            run.resume_with = resume_with
            with run_directory(run.logdir):
                status = execute(run)
    except (Interrupted, KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the second into the third
        if isinstance(stop, SystemExit) and run is None:
            raise  # after --help
        return getattr(stop, "status", 130)
    except Exception as error:
        is_bug = (run is not None and run.has_learned) or comes_from(error, options.allow)
        if is_bug and not options.debug and not message_for_users(error):
            raise
        return report(error, options.debug, dotlist)
    leave_group()
    return status


def prepare(options: Namespace, overrides: dict[str, Any], dotlist: list[str], notes: list[str]) -> Run:
    """Load the configuration, complete it, and decide on devices and run directory."""
    now = time.strftime(TIME_FORMAT)
    is_child = "TAMING_START" in os.environ
    if "LOCAL_RANK" in os.environ:  # a process that the first one started: the same run
        now = os.environ.get("TAMING_START", now)
    os.environ["TAMING_START"] = now
    files, logdir, resume = locate(options, now)
    config = load_config(files)
    if options.ignore_base_data:
        config.pop("data", None)
    config = complete_sections(override_config(config, dotlist), ", ".join(map(str, files)))
    given, more_notes = resolve_trainer_arguments(plain(config.lightning.trainer), overrides)
    arguments = with_devices(given)
    if not is_child:
        more_notes += check_launch(*device_count(arguments))
    if arguments["accelerator"] == "cpu" and math.prod(device_count(arguments)) == 1:
        settle_threads(config.lightning)
    rank_zero_print(describe_devices(arguments))
    for note in notes + more_notes:
        rank_zero_print(f"note: {note}")
    config.lightning.trainer = given
    config.lightning.seed = seed = choose_seed(options.seed, config.lightning.get("seed"))
    if "DataModuleFromConfig" in config.data.target:
        config.data.params.setdefault("seed", seed)
    if resume is None:
        fill_stages(config)
    else:
        config.model = without_ckpt_paths(config.model)
    by_hand = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "max_steps")
    batch_arguments = {key: arguments.pop(key) for key in by_hand if key in arguments}
    return Run(config, options, arguments, batch_arguments, logdir, now, seed, resume)


def locate(options: Namespace, now: str) -> tuple[list[Path], Path, Path | None]:
    """Find the YAML files, the run directory, and the checkpoint to go on from."""
    files = [find_config(base) for base in options.base]
    if not options.resume:
        if not files:
            raise ValueError("no configuration: name one with --base configs/....yaml, or resume with -r RUN")
        name = options.name or files[0].stem
        return files, Path(options.logdir).expanduser() / f"{now}_{name}{options.postfix}", None
    resume = find_checkpoint(find_run(options.resume))
    if resume.suffix != ".ckpt":
        raise ValueError(f"{resume} holds weights only: resume from a run directory or a .ckpt file")
    logdir = resume.parent.parent if resume.parent.name == "checkpoints" else resume.parent
    files = sorted((logdir / "configs").glob("*.yaml")) + files
    if not files:
        raise ValueError(f"{logdir / 'configs'} holds no YAML file: name the configuration with --base")
    return files, logdir, resume


def settle_threads(lightning: DictConfig) -> None:
    """Use the threads of `lightning.threads`, or measure how many are fastest and write them there."""
    stored = lightning.get("threads")
    if wrong := mismatch(stored, PositiveInt | None):
        raise ValueError(f"lightning.threads: {stored!r} must be {wrong}")
    if (chosen := choose_threads(stored)) is not None:
        lightning.threads = chosen


def choose_seed(option: int | None, in_config: Any) -> int:
    """The seed of the command line, else that of the configuration, else that of 2021."""
    seed = option if option is not None else in_config if in_config is not None else DEFAULT_SEED
    if wrong := mismatch(seed, Seed):
        raise ValueError(f"lightning.seed: {seed!r} must be {wrong}")
    return seed


def execute(run: Run) -> int:
    """Build everything, and then describe, train or test it, as asked for; return the exit status."""
    options = run.options
    with locked_run_dir(run.logdir) if run.resume and not options.dry_run else nullcontext():
        model, data = build(run)
        if options.dry_run:
            build_trainer(run, model, data)
            describe(run, model, data)
            return 0
        is_new = options.train and not run.resume
        with new_run_dir(run.logdir, keep=lambda: run.has_learned) if is_new else nullcontext():
            trainer = build_trainer(run, model, data)
            if options.train:
                fit(run, trainer, model, data)
        if not options.no_test and "test" in getattr(data, "datasets", {}):
            trainer.test(model, data, ckpt_path=None if options.train else run.resume, weights_only=True)
        elif not options.train:
            rank_zero_print("built; add -t to train")
    return 0


def leave_group() -> None:
    """Leave the group of processes, which Lightning does for nccl alone.

    The threads of a gloo group that still exists would release tensors while the interpreter shuts down,
    which now and then aborts a process whose work was done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def build(run: Run) -> tuple[pl.LightningModule, pl.LightningDataModule]:
    """Build the model, with its learning rate, and the data sets; check that they fit together."""
    pl.seed_everything(run.seed, verbose=False)
    if run.options.train or run.options.dry_run:
        check_loss_files(run.config.model, download=not run.options.dry_run)
    with models_only():
        model = instantiate_from_config(run.config.model)
    set_up_model(model, run.config.model)
    data = instantiate_from_config(run.config.data)
    data.prepare_data()
    data.setup()
    check_agreement(run.config, model, data, has_weights=run.resume is None)
    algorithm = run.batch_arguments.get("gradient_clip_algorithm", "norm")
    if algorithm not in (None, "norm"):
        raise ValueError(f"gradient_clip_algorithm: {algorithm} is not available, only norm")
    model.accumulate_grad_batches = run.batch_arguments.get("accumulate_grad_batches") or 1
    clip = run.batch_arguments.get("gradient_clip_val") or 0
    model.gradient_clip_val = clip if clip > 0 else None
    base = run.config.model.get("base_learning_rate")
    if wrong := mismatch(base, NonNegativeFloat):
        found = "is missing: it" if base is None else f"is {base!r}, but"
        raise ValueError(f"model.base_learning_rate {found} must be {wrong}; the paper's is 4.5e-6")
    accelerate(model, run.config.lightning)
    model.learning_rate = float(base)
    if run.options.scale_lr:
        devices, nodes = device_count(run.trainer_arguments)
        model.learning_rate *= model.accumulate_grad_batches * devices * nodes * data.batch_size
        rank_zero_print(
            f"learning rate {model.learning_rate:.3g} = "
            f"{model.accumulate_grad_batches} (accumulated batches) x {devices} (devices) x {nodes} (nodes) "
            f"x {data.batch_size} (batch size) x {float(base):.3g} (base)"
        )
    else:
        rank_zero_print(f"learning rate {model.learning_rate:.3g} (base, not scaled)")
    return model, data


def set_up_model(model: Any, section: DictConfig) -> None:
    """Freeze parts of the model, and let it average its weights, as its section of the configuration says."""
    if parts := plain(section).get("freeze"):
        model.freeze_parts(parts)
    if "ema_decay" in section:
        model.keep_averages(section.ema_decay, section.get("ema_warmup", True))
    elif "ema_warmup" in section:
        raise ValueError("model.ema_warmup is there, but not model.ema_decay: add it, for instance 0.9999")


def describe(run: Run, model: Any, data: Any) -> None:
    """Print what a run would be: configuration, parameters, steps, and what they cost on this machine."""
    rank_zero_print(OmegaConf.to_yaml(OmegaConf.create(storable(run.config))))
    for name, part in model.named_children():
        trainable, total = count_params(part)
        if total:
            rank_zero_print(f"{name:20s} {total:>14,} parameters, {trainable:,} trainable")
    items: Any = getattr(data, "datasets", {}).get("train")
    if hasattr(items, "__len__"):
        batches = len(items) // (data.batch_size * math.prod(device_count(run.trainer_arguments)))
        steps = math.ceil(batches / model.accumulate_grad_batches)
        rank_zero_print(
            f"{len(items):,} training images, {batches:,} batches per device and epoch, {steps:,} steps"
        )
    if items is not None:
        for line in measure_cost(model, data, run.trainer_arguments, run.batch_arguments.get("max_steps")):
            rank_zero_print(line)
    rank_zero_print(f"run directory (not made): {run.logdir}")


def fit(run: Run, trainer: pl.Trainer, model: Any, data: pl.LightningDataModule) -> None:
    """Train, and say how to go on, however it ends."""
    rank_zero_print(f"run directory: {run.logdir}")
    again = run.resume_with or command_line("-t", "-r", run.logdir, allow=run.options.allow)
    hint = f"resume with\n  {again}"
    last = run.logdir / "checkpoints" / "last.ckpt"
    before = batches_seen(read_checkpoint(run.resume, tensors=())) if run.resume else 0
    try:
        trainer.fit(model, data, ckpt_path=run.resume, weights_only=True)
    except BaseException as error:
        run.has_learned = model.batches_seen > before
        stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
        ended = f"{'stopped' if stopped else 'failed'} after {model.batches_seen} batches"
        if last.exists() or stopped:
            rank_zero_print(f"{ended}; {hint}" if last.exists() else ended)
        if has_lost_another(error):
            raise OtherProcessFailed("another process failed, and printed its error") from error
        raise
    run.has_learned = model.batches_seen > before
    if before and not run.has_learned:
        rank_zero_print(f"nothing left to train after {before} batches: raise --max_steps or --max_epochs")
    else:
        rank_zero_print(f"trained for {model.batches_seen} batches: {run.logdir}")


def build_trainer(run: Run, model: Any, data: Any) -> pl.Trainer:
    """The Trainer with its loggers and callbacks; what counts batches is left to these."""
    arguments = dict(run.trainer_arguments)
    devices = math.prod(device_count(arguments))
    if devices > 1:
        arguments.setdefault("strategy", "ddp")
    if (strategy := arguments.get("strategy")) is not None:
        arguments["strategy"] = resolve_strategy(strategy, str(arguments.get("accelerator")))
    callbacks = build_callbacks(run, model, data)
    max_steps = run.batch_arguments.get("max_steps")
    if max_steps not in (None, -1):
        arguments.setdefault("max_epochs", -1)
        callbacks.append(StopAfterBatches(int(max_steps)))
    arguments["plugins"] = [*(arguments.get("plugins") or []), AtomicCheckpointIO()]
    if arguments.get("sync_batchnorm") and arguments.get("accelerator") == "cpu":  # Lightning's needs GPUs
        arguments["plugins"].append(SyncBatchNorms())
        arguments["sync_batchnorm"] = False
    if "log_every_n_steps" not in arguments and hasattr(items := data.datasets.get("train"), "__len__"):
        arguments["log_every_n_steps"] = min(10, max(1, len(items) // (data.batch_size * devices)))
    arguments["use_distributed_sampler"] = False
    loggers = build_loggers(
        run.logdir, plain(run.config.lightning.get("logger") or {}),
        resume=run.resume if run.options.train else None, project=run.options.project,
    )
    try:
        return pl.Trainer(logger=loggers, callbacks=callbacks, default_root_dir=str(run.logdir), **arguments)
    except Exception as error:
        named = ", ".join(f"{name}: {value}" for name, value in run.trainer_arguments.items())
        error.add_note(f"(the arguments of the Trainer are {named})")
        raise


def build_callbacks(
    run: Run, model: pl.LightningModule, data: pl.LightningDataModule
) -> list[Callback]:
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
    merged: Any = OmegaConf.merge(usual, lightning.get("callbacks") or {})
    wanted = plain(merged)
    if not run.trainer_arguments.get("enable_progress_bar", True):
        wanted["progress"] = None
    if not run.trainer_arguments.get("enable_checkpointing", True):
        wanted["last_checkpoint"] = None
    stored = {name: part for name, part in storable(run.config).items() if name in SECTIONS}
    callbacks: list[Callback] = [
        SetupCallback(run.now, stored), SeededBatches(run.seed), ExactResume(), ResumeLegacyRun(),
        FailTogether(),
        *(instantiate_from_config(config) for config in wanted.values() if config is not None),
    ]
    if not run.trainer_arguments.get("enable_checkpointing", True):
        return callbacks
    if str(params["monitor"]).startswith("val/") and "validation" not in getattr(data, "datasets", params):
        rank_zero_print(f"note: no validation data, so no checkpoints are kept by {params['monitor']}")
    elif params["monitor"] is not None:
        name = params["monitor"].split("/")[-1]
        params.setdefault("filename", f"epoch={{epoch:06d}}-{name}={{{params['monitor']}:.4f}}")
        params.setdefault("auto_insert_metric_name", False)
        target = best.get("target", MODEL_CHECKPOINT)
        callbacks.append(instantiate_from_config({"target": target, "params": params}))
    check_monitors(callbacks, model)
    return callbacks
