"""Where the curves of a run go: metrics.csv always, TensorBoard if it is installed, others on request.

A resumed run continues them: what an interrupted start had written beyond its checkpoint is dropped. A disk
that is full costs curves, not the run: what could not be written to metrics.csv is written later.
"""

import csv
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from taming.checkpoint import read_checkpoint
from taming.config import instantiate_from_config
from taming.util import atomic_write

logger = logging.getLogger(__name__)

Row = dict[str, Any]  # a value by the name of each curve, and "step"


def build_loggers(
    logdir: Path, config: Mapping[str, Any], *, resume: Path | None = None, project: str | None = None
) -> list[Logger]:
    """Return the CSV logger, and the one that `config` (`{target, params}`) names, else TensorBoard.

    `resume` is the checkpoint that training goes on from; `project` is for loggers that know projects.
    """
    finished, rows = finished_rows(logdir / "metrics.csv", resume)
    loggers: list[Logger] = [MetricsFile(logdir / "metrics.csv", rows)]
    target = str(config.get("target", ""))
    if "TestTube" in target:
        logger.info("note: the TestTubeLogger is gone; metrics.csv and TensorBoard have the curves")
    elif target:
        params = {"save_dir": str(logdir), **config.get("params", {})}
        if project:
            params.setdefault("project", project)
        return [*loggers, instantiate_from_config({"target": target, "params": params})]
    try:
        from pytorch_lightning.loggers import TensorBoardLogger

        # what a lost continuation had written
        purge: dict[str, Any] = {} if finished is None else {"purge_step": finished}
        return [*loggers, TensorBoardLogger(str(logdir), name="tensorboard", version="", **purge)]
    except ModuleNotFoundError:
        logger.info("note: no TensorBoard here (pip install tensorboard): curves go to metrics.csv only")
        return loggers


def finished_rows(path: Path, resume: Path | None) -> tuple[int | None, list[Row]]:
    """Return how many batches a checkpoint has finished (None without one), and the curves until then.

    A row that a kill left incomplete is not among them.
    """
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
        rows = [row for row in rows if None not in row and str(row.get("step", "")).isdecimal()]
    if resume is None:
        return None, rows
    loop = read_checkpoint(resume, tensors=()).get("loops", {}).get("fit_loop", {})
    if not loop:
        return None, rows
    finished = loop["epoch_loop.batch_progress"]["total"]["processed"]
    validation = loop["epoch_loop.val_loop.batch_progress"]["total"]
    if validation["ready"] > validation["processed"]:  # due again: see ExactResume
        last = finished - 1
        rows = [row for row in rows if int(row["step"]) != last or any("train/" in key for key in row)]
    return finished, [row for row in rows if int(row["step"]) < finished]


class MetricsFile(Logger):
    """Curves in a CSV file with a column for each and a row for each time that some were logged.

    Rows are appended; the file is written again, as a whole, only where a new curve needs a column.
    They are written every `every_n_rows` rows and with each checkpoint.

    Args:
        path: the file.
        rows: what it is to hold at the start, instead of what it holds.
        every_n_rows: rows that may be kept in memory.
    """

    def __init__(self, path: Path, rows: Sequence[Row] = (), every_n_rows: int = 100):
        super().__init__()
        self.path, self.every_n_rows = path, every_n_rows
        self._columns: list[str] = []  # of the file
        self._waiting = list(rows)  # to be written
        self._replace = True  # what the file holds

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run directory and the checkpoints hold the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {key: value.item() if torch.is_tensor(value) else value for key, value in metrics.items()}
        self._waiting.append({**values, "step": step})
        if len(self._waiting) >= self.every_n_rows:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that wait; where that is impossible, warn and keep them for the next time."""
        if not self._waiting:
            return
        try:
            self._write()
        except OSError as error:
            logger.warning("curves wait: %s: %s", self.path, error.strerror or error)
        else:
            self._waiting = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _write(self) -> None:
        new = sorted({key for row in self._waiting for key in row}.difference(self._columns))
        if not new and not self._replace:
            size = self.path.stat().st_size
            try:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self._columns).writerows(self._waiting)
            except OSError:
                with self.path.open("r+") as file:
                    file.truncate(size)  # no half row
                raise
            return
        rows: list[Row] = []
        if not self._replace:
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        columns = sorted([*self._columns, *new])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows([*rows, *self._waiting])
        self._columns, self._replace = columns, False
