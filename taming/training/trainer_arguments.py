"""What the Trainer is told: the arguments of YAML and command line, joined and checked, and its devices."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pytorch_lightning import Trainer

from taming.parameters import (
    AtLeastMinusOne,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Range,
    find_problem,
    mismatch,
)
from taming.training.legacy_arguments import translate_trainer_arguments

Share = NonNegativeInt | Probability  # so many batches, or a share of them
RANGES = {  # which the Trainer's own annotations do not tell
    "accumulate_grad_batches": PositiveInt,
    "check_val_every_n_epoch": PositiveInt | None,
    "limit_train_batches": Share | None,
    "limit_val_batches": Share | None,
    "limit_test_batches": Share | None,
    "log_every_n_steps": PositiveInt | None,
    "max_epochs": AtLeastMinusOne | None,
    "max_steps": AtLeastMinusOne,
    "min_epochs": NonNegativeInt | None,
    "num_nodes": PositiveInt,
    "num_sanity_val_steps": AtLeastMinusOne | None,
    "overfit_batches": Share,
    "reload_dataloaders_every_n_epochs": NonNegativeInt,
    "val_check_interval": PositiveInt | Annotated[float, Range(0, 1, above=True)] | str | dict | None,
}


def resolve_trainer_arguments(
    from_yaml: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Join the arguments of the YAML with those of the command line (translated already), which win.

    Returns them with a note for each old name.

    Raises:
        ValueError: an unknown argument, or a value of the wrong type or range; what
            translate_trainer_arguments raises.
    """
    arguments, notes = translate_trainer_arguments(from_yaml)
    if "accelerator" in overrides and "devices" not in overrides:
        arguments.pop("devices", None)  # of another kind of device
    arguments |= overrides
    if problem := find_problem(Trainer, arguments):
        raise ValueError(f"the Trainer {problem}")
    for name, annotation in RANGES.items():
        if name in arguments and (wrong := mismatch(arguments[name], annotation)):
            raise ValueError(f"the Trainer does not accept {name}: {arguments[name]!r}; it must be {wrong}")
    return arguments, notes


def with_devices(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with `accelerator` and `devices`.

    Where neither is given it is one GPU if there is one, else the CPU.

    Raises:
        ValueError: GPUs that this machine does not have.
    """
    chosen = dict(arguments)
    if "accelerator" not in chosen:
        present = "gpu" if torch.cuda.is_available() else "cpu"
        chosen["accelerator"] = "auto" if "devices" in chosen else present
        chosen.setdefault("devices", 1)
    chosen.setdefault("devices", 1 if chosen["accelerator"] == "cpu" else "auto")
    _check_gpus(chosen)
    return chosen


def device_count(trainer_arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Count (devices per node, nodes); the devices -1 and "auto" are all that there are."""
    nodes = int(trainer_arguments.get("num_nodes") or 1)
    devices = trainer_arguments.get("devices", "auto")
    if isinstance(devices, list | tuple):
        return len(devices), nodes
    text = str(devices).strip()
    if "," in text:
        return len([part for part in text.split(",") if part.strip()]), nodes
    if text in ("auto", "-1"):
        on_cpu = trainer_arguments.get("accelerator", "auto") == "cpu" or not torch.cuda.is_available()
        return 1 if on_cpu else torch.cuda.device_count(), nodes
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"devices: {devices!r} is neither a number, a list such as [0, 1], nor -1 for all")
    return int(text), nodes


def describe_devices(arguments: Mapping[str, Any]) -> str:
    """One line that names the devices of arguments from `with_devices`."""
    accelerator, (devices, nodes) = arguments["accelerator"], device_count(arguments)
    on_nodes = f" on each of {nodes} nodes" if nodes > 1 else ""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        chosen = arguments["devices"]
        indices = [int(index) for index in chosen] if isinstance(chosen, list) else list(range(devices))
        names = dict.fromkeys(torch.cuda.get_device_name(index) for index in indices)
        numbers = f"GPU{'s' if devices > 1 else ''} {', '.join(map(str, indices))}"
        return f"device: {numbers} ({', '.join(names)}){on_nodes}"
    if accelerator in ("auto", "cpu"):
        processes = f"{devices} processes of " if devices > 1 else ""
        return f"device: CPU ({processes}{torch.get_num_threads()} threads){on_nodes}"
    return f"device: {accelerator}, {devices}{on_nodes}"


def _check_gpus(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for GPUs that are not there."""
    if arguments["accelerator"] not in ("gpu", "cuda"):
        return
    devices = arguments["devices"]
    if not torch.cuda.is_available():
        raise ValueError(
            f"GPUs are asked for (devices: {devices}), but CUDA is not available here: use --gpus 0 or "
            "--accelerator cpu"
        )
    available = torch.cuda.device_count()
    indices = devices if isinstance(devices, list) else range(device_count(arguments)[0])
    if max(indices, default=0) >= available:
        raise ValueError(f"devices: {devices} do not exist: this machine has {available} GPU(s), from 0 on")
