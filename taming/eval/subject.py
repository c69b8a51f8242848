"""What is evaluated: a model with the identity of its checkpoint, and the networks that judge it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from taming.checkpoint import find_checkpoint, load_model
from taming.checkpoint.published_weights import sha256_of
from taming.eval.networks import FeatureNetwork, PerceptualDistance
from taming.inference.distributed import own_device
from taming.inference.provenance import model_metadata, run_directory

FOLDER = "evaluation"  # of a run directory, for parts and sheets


@dataclass
class Subject:
    """A model to evaluate.

    Attributes:
        model: the model, in eval mode, on `device`.
        config: its configuration.
        about: name and hash of the checkpoint, the number of batches that it was trained for, and the model.
        run: the run directory or exported folder.
        device: of this process.
    """

    model: Any
    config: DictConfig
    about: dict[str, Any]
    run: Path
    device: torch.device

    @property
    def folder(self) -> Path:
        """The folder for what an evaluation keeps."""
        return self.run / FOLDER


def load_subject(path: Path, *, device: str | None = None) -> Subject:
    """Load a model to evaluate it.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it cannot be loaded.
    """
    file, found = find_checkpoint(path), own_device(device)
    model, config, step = load_model(file, device=found)
    about: dict[str, Any] = {"checkpoint": file.name, "sha256": sha256_of(file), "batches": step}
    about |= {"run": run_directory(file).name, "class": type(model).__name__, **model_metadata(model, config)}
    return Subject(model.eval(), config, about, run_directory(file), found)


def perceptual_about(distance: PerceptualDistance | None) -> Mapping[str, Any] | None:
    """Say which learned distance it is, for protocols."""
    return None if distance is None else {"name": distance.name, "sha256": distance.sha256}


@dataclass(frozen=True)
class Judges:
    """The networks by which images are judged; None leaves out what they measure."""

    network: FeatureNetwork | None
    perceptual: PerceptualDistance | None = None

    def to(self, device: torch.device) -> "Judges":
        """Move the networks to a device."""
        for each in (self.network, self.perceptual):
            if each is not None:
                each.to(device)
        return self
