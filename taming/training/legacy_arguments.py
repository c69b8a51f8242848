"""Arguments of the Trainer in 2020 and 2021, translated to those of today.

Command lines and YAML files of that time name arguments that the Trainer has lost since.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning import Trainer

from taming.parameters import did_you_mean

TRAINER_PARAMETERS = {
    name: parameter
    for name, parameter in inspect.signature(Trainer.__init__).parameters.items()
    if name != "self"
}

# What an argument becomes: new arguments, and why (None: nothing to report).
Translation = tuple[dict[str, Any], str | None]


def translate_trainer_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Bring Trainer arguments of any year under their present names, with a note for each change.

    The input stays as it is. Where an old and a present name say different things, the present one wins.

    Raises:
        ValueError: a name that the Trainer never had, or a value that cannot be translated.
    """
    translated: dict[str, Any] = {}
    present: dict[str, Any] = {}
    notes = []
    for name, value in arguments.items():
        if name in OLD_ARGUMENTS:
            new, reason = OLD_ARGUMENTS[name](value)
            (present if name in TRAINER_PARAMETERS else translated).update(new)
            if reason is not None:
                became = ", ".join(f"{key}: {item}" for key, item in new.items()) or "ignored"
                notes.append(f"{name}: {value} -> {became}" + (f" ({reason})" if reason else ""))
        elif name in TRAINER_PARAMETERS:
            present[name] = value
        else:
            raise ValueError(f"the Trainer has no argument {name!r}{did_you_mean(name, TRAINER_PARAMETERS)}")
    if translated.get("accelerator") == "gpu" and isinstance(arguments.get("num_processes"), int):
        translated |= _gpus(arguments["gpus"])[0]  # with GPUs, there were as many processes as GPUs
    return {**translated, **present}, notes


# --- translations of old arguments ---


def _renamed(name: str) -> Callable[[Any], Translation]:
    return lambda value: ({}, None) if value is None else ({name: value}, "")


def _ignored(instead: str) -> Callable[[Any], Translation]:
    """Drop an argument; its old "off" values are not worth a note."""
    return lambda value: ({}, None if value is None or value is False else instead)


def _gpus(value: Any) -> Translation:
    """Read the old `gpus`: 2 is any two, -1 all, `0,1` or [0, 1] these two, 0 the CPU, null the default."""
    wrong = ValueError(f"gpus: {value!r} is neither a number (-1: all, 0: none) nor a list (`0,` or `0,1`)")
    if value is None:
        return {}, None
    if isinstance(value, str) and "," in value:
        value = [part for part in value.split(",") if part.strip()]
    try:
        if isinstance(value, list | tuple):
            devices: Any = [int(index) for index in value]
            valid = all(index >= 0 for index in devices)
        else:
            devices = int(value)
            valid = not isinstance(value, bool | float) and devices >= -1
    except (TypeError, ValueError):
        raise wrong from None
    if not valid:
        raise wrong
    if not devices:
        return {"accelerator": "cpu", "devices": 1}, ""
    return {"accelerator": "gpu", "devices": devices}, ""


def _strategy(value: Any) -> Translation:
    """Read a strategy of any year."""
    if value == "ddp_cpu":
        return {"strategy": "ddp", "accelerator": "cpu"}, "processes on the CPU"
    if value in ("dp", "ddp2", "horovod"):
        return {"strategy": "ddp"}, f"{value} is gone; ddp runs a process per GPU, batch_size is that of each"
    return ({}, None) if value is None else ({"strategy": value}, None)


def _accelerator(value: Any) -> Translation:
    """Read an accelerator, an argument that named strategies as well in 2021."""
    if value in ("dp", "ddp", "ddp2", "ddp_cpu", "ddp_spawn", "horovod"):
        new, reason = _strategy(value)
        return new, reason or ""
    return ({}, None) if value is None else ({"accelerator": value}, None)


def _devices(value: Any) -> Translation:
    """Read devices; a list in a string (`0,1` on a command line) becomes a list."""
    if isinstance(value, str) and "," in value:
        return {"devices": _gpus(value)[0]["devices"]}, None
    return ({}, None) if value is None else ({"devices": value}, None)


def _precision(value: Any) -> Translation:
    """Read a precision; the old ones are numbers of bits."""
    names = {"16": "16-mixed", "32": "32-true", "64": "64-true", "bf16": "bf16-mixed"}
    new = names.get(str(value))
    return ({"precision": new}, "") if new else ({"precision": value}, None)


def _accumulation(value: Any) -> Translation:
    """Read a number of batches; a schedule by epoch, as the Trainer once took, is an error."""
    if value is None:
        return {}, None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"accumulate_grad_batches: {value!r} must be a number of batches, 1 or more")
    return {"accumulate_grad_batches": value}, None


OLD_ARGUMENTS: dict[str, Callable[[Any], Translation]] = {
    "gpus": _gpus,
    "accelerator": _accelerator,
    "distributed_backend": lambda value: (_accelerator(value)[0], None if value is None else ""),
    "strategy": _strategy,
    "devices": _devices,
    "precision": _precision,
    "accumulate_grad_batches": _accumulation,
    "num_processes": lambda value: ({"devices": value}, "") if value not in (None, 1) else ({}, None),
    "nb_gpu_nodes": _renamed("num_nodes"),
    "max_nb_epochs": _renamed("max_epochs"),
    "min_nb_epochs": _renamed("min_epochs"),
    "checkpoint_callback": _renamed("enable_checkpointing"),
    "replace_sampler_ddp": _renamed("use_distributed_sampler"),
    "row_log_interval": _renamed("log_every_n_steps"),
    "train_percent_check": _renamed("limit_train_batches"),
    "val_percent_check": _renamed("limit_val_batches"),
    "test_percent_check": _renamed("limit_test_batches"),
    "overfit_pct": _renamed("overfit_batches"),
    "reload_dataloaders_every_epoch": lambda value: (
        ({"reload_dataloaders_every_n_epochs": 1}, "") if value else ({}, None)
    ),
    "profiler": lambda value: (
        ({"profiler": "simple"}, "") if value is True else ({"profiler": value or None}, None)
    ),
    "progress_bar_refresh_rate": lambda value: (
        ({"enable_progress_bar": False}, "") if value == 0 else _ignored("the bar sets its own pace")(value)
    ),
    "weights_summary": lambda value: (
        ({"enable_model_summary": False}, "") if value is None else ({}, "the summary shows the top level")
    ),
    "resume_from_checkpoint": _ignored("resume with -r RUN on the command line"),
    "logger": lambda value: (
        ({}, None if value in (None, True) else "metrics.csv is always written; lightning.logger adds others")
    ),
    "callbacks": _ignored("the section lightning.callbacks says which"),
    "default_root_dir": _ignored("the run directory is made under --logdir"),
    "weights_save_path": _ignored("checkpoints lie in the run directory"),
    "auto_select_gpus": _ignored("name the GPUs: --gpus 0,1"),
    "auto_lr_find": _ignored("set model.base_learning_rate"),
    "auto_scale_batch_size": _ignored("set data.params.batch_size"),
    "tpu_cores": _ignored("for TPUs: accelerator: tpu and devices"),
    "amp_backend": _ignored("mixed precision is PyTorch's own"),
    "amp_level": _ignored("precision: 16-mixed or bf16-mixed says it all"),
    "automatic_optimization": _ignored("each model decides"),
    "flush_logs_every_n_steps": _ignored("each logger decides when it writes"),
    "log_save_interval": _ignored("each logger decides when it writes"),
    "log_gpu_memory": _ignored("add the callback pytorch_lightning.callbacks.DeviceStatsMonitor"),
    "move_metrics_to_cpu": _ignored("metrics stay where they are computed"),
    "multiple_trainloader_mode": _ignored("there is one training loader"),
    "prepare_data_per_node": _ignored("data sets are read, never downloaded, on every node"),
    "process_position": _ignored("there is one progress bar"),
    "stochastic_weight_avg": _ignored("averaging is a callback: lightning.callbacks"),
    "terminate_on_nan": _ignored("a loss that is not a number always stops the run"),
    "track_grad_norm": lambda value: ({}, None if value in (None, -1) else "train/grad_norm is logged"),
    "truncated_bptt_steps": _ignored("nothing here is recurrent"),
}

# Old arguments that may stand alone on a command line, for True.
OLD_SWITCHES = frozenset((
    "auto_lr_find", "auto_scale_batch_size", "auto_select_gpus", "automatic_optimization",
    "checkpoint_callback", "move_metrics_to_cpu", "prepare_data_per_node", "reload_dataloaders_every_epoch",
    "replace_sampler_ddp", "stochastic_weight_avg", "terminate_on_nan",
))
