"""Checkpoints: find, read safely, load with a report, convert, publish."""

from taming.checkpoint.load import (
    LOSS_WEIGHTS,
    PERCEPTUAL_WEIGHTS,
    NoConfigError,
    build_model,
    checkpoint_weights,
    config_of,
    fill_model,
    load_model,
)
from taming.checkpoint.read import find_checkpoint, read_checkpoint
from taming.checkpoint.save import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Config,
    save_exported,
    without_ckpt_paths,
    write_checkpoint,
)
from taming.checkpoint.state_dict import LoadReport, load_weights

__all__ = [
    "CONFIG_NAME", "LOSS_WEIGHTS", "PERCEPTUAL_WEIGHTS", "WEIGHTS_NAME", "Config", "LoadReport",
    "NoConfigError", "build_model", "checkpoint_weights", "config_of", "fill_model", "find_checkpoint",
    "load_model",
    "load_weights", "read_checkpoint", "save_exported", "without_ckpt_paths", "write_checkpoint",
]
