"""Metadata of generated images: with which model, data and options they were made.

Images of other origin are told from these, so that none is taken for another or replaced by it. Nothing in
the metadata depends on where files lie: a run that was moved, or is named by another path, is the same run.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from taming.checkpoint import without_ckpt_paths
from taming.images import is_complete_png, is_own_png, save_png
from taming.sampling import SamplingOptions

SAMPLED = 8  # values of each tensor; training changes all of them, and reading gigabytes would take a while
SPEED_ONLY = ("batch_size", "num_workers")  # parameters of the data that change no item


def model_metadata(model: nn.Module, config: DictConfig) -> dict[str, str]:
    """Identify a model by its configuration and its weights, as they were read."""
    weights = {
        name: tensor.reshape(-1)[:SAMPLED].tolist() for name, tensor in model.state_dict().items()
        if ".loss." not in name  # may be absent from the checkpoint: they are random numbers then
    }
    return {"model": digest(_text(without_ckpt_paths(config).model), weights)}


def run_directory(checkpoint: Path) -> Path:
    """Return the run directory or exported folder that holds a checkpoint file."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder


def options_metadata(options: SamplingOptions) -> dict[str, str]:
    """Say how images are sampled, with an entry for each option."""
    return {field.name: str(getattr(options, field.name)) for field in dataclasses.fields(options)}


def data_metadata(section: DictConfig, split: str) -> dict[str, str]:
    """Identify data by the section `data` of a configuration and the split."""
    copy = OmegaConf.create({"data": OmegaConf.to_container(section, resolve=True)}).data
    for name in SPEED_ONLY:
        (copy.get("params") or {}).pop(name, None)
    return {"data": digest(_text(copy)), "split": split}


def is_generated(path: Path, metadata: Mapping[str, str]) -> bool:
    """Tell whether the image with these metadata is at `path`; a file that breaks off does not count.

    Raises:
        ValueError: another file is there.
    """
    if not is_complete_png(path):
        check_replaceable(path)
        return False
    with Image.open(path) as image:
        found = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    found.pop("Software", None)
    defaults = options_metadata(SamplingOptions())  # of options that are newer than the image
    found = {key: value for key, value in defaults.items() if key in metadata} | found
    keys = [key for key in dict.fromkeys((*metadata, *found)) if found.get(key) != metadata.get(key)]
    if keys:
        other = ", ".join(f"{key} {found.get(key, 'unknown')}" for key in keys)
        raise ValueError(f"{path} was generated with {other}: delete it, or choose another --outdir")
    return True


def check_replaceable(path: Path) -> None:
    """Raise ValueError if a file is at `path` that was not written here, which must not be replaced."""
    if path.exists() and not is_own_png(path):
        raise ValueError(
            f"{path} exists and is not marked as written by taming: choose another place, or delete it"
        )


def save_image(image: Tensor, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """Write an image (C, H, W) in [-1, 1] with metadata as a PNG file; replace no file of other origin.

    Raises:
        ValueError: such a file is there.
    """
    check_replaceable(path)
    return save_png(image, path, dict(metadata or {}))


def _text(config: DictConfig) -> str:
    return OmegaConf.to_yaml(config, resolve=True, sort_keys=True)


def digest(*parts: object) -> str:
    """Return 12 hexadecimal digits that identify values by their `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
