"""What a picture's note says of the model and the data it was drawn with, so that others are told from them.

Nothing here depends on where files lie: the same run moved, or named by another path, is the same.
"""

import dataclasses
import hashlib
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from taming.checkpoint import without_ckpt_paths
from taming.data.files.images import read_image
from taming.sampling import SamplingOptions

SAMPLED = 8  # values of each tensor; training changes all of them, and reading gigabytes would take a while
SPEED_ONLY = ("batch_size", "num_workers")  # parameters of the data that change no item


def model_note(model: nn.Module, config: DictConfig) -> dict[str, str]:
    """Which model it is, from its configuration and its weights, as they were read."""
    weights = {
        name: tensor.reshape(-1)[:SAMPLED].tolist() for name, tensor in model.state_dict().items()
        if ".loss." not in name  # may be absent from the checkpoint: they are random numbers then
    }
    return {"model": _digest(_text(without_ckpt_paths(config).model), weights)}


def options_note(options: SamplingOptions) -> dict[str, str]:
    """Return how images are sampled, one entry for each option."""
    return {field.name: str(getattr(options, field.name)) for field in dataclasses.fields(options)}


def data_note(section: DictConfig, split: str) -> dict[str, str]:
    """Which data they are, from the section `data` of a configuration."""
    section = OmegaConf.create(OmegaConf.to_container(section, resolve=True))
    for name in SPEED_ONLY:
        (section.get("params") or {}).pop(name, None)
    return {"data": _digest(_text(section)), "split": split}


def mask_note(mask: Path | None) -> dict[str, str]:
    """Which mask it is, from its pixels; raises ValueError where it cannot be read."""
    pixels = None if mask is None else read_image(mask)
    return {"mask": "None" if pixels is None else _digest(pixels.shape, pixels.tobytes())}


def _text(config: DictConfig) -> str:
    return OmegaConf.to_yaml(config, resolve=True, sort_keys=True)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
