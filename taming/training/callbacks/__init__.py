"""Callbacks of the training command: run directory, checkpoints, images, progress, throughput, health,
budgets, evaluation.

All of them count batches, and write below the trainer's `default_root_dir` only, the run directory, since a
YAML file may name any of them. A model here is a `taming.models.base.ImageModel`: it has `batches_seen` and
`log_images`.
"""

from taming.training.callbacks.budget import Budget
from taming.training.callbacks.evaluation import Evaluation
from taming.training.callbacks.health import Health, Unhealthy
from taming.training.callbacks.images import ImageLogger
from taming.training.callbacks.progress import Progress
from taming.training.callbacks.run import SeededBatches, SetupCallback, StopAfterBatches, plain
from taming.training.callbacks.saving import (
    AtomicCheckpointIO,
    ExactResume,
    Interrupted,
    LastCheckpoint,
    NotSaved,
)
from taming.training.callbacks.throughput import Throughput

__all__ = [
    "AtomicCheckpointIO",
    "Budget",
    "Evaluation",
    "ExactResume",
    "Health",
    "ImageLogger",
    "Interrupted",
    "LastCheckpoint",
    "NotSaved",
    "Progress",
    "SeededBatches",
    "SetupCallback",
    "StopAfterBatches",
    "Throughput",
    "Unhealthy",
    "plain",
]
