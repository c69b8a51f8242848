"""Where the curves of a run go: metrics.csv always, TensorBoard if it is installed, others on request.

A resumed run continues them: what an interrupted start had written beyond its checkpoint is dropped.
"""

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities import rank_zero_only

from taming.checkpoint import read_checkpoint
from taming.config import instantiate_from_config

logger = logging.getLogger(__name__)


def build_loggers(
    logdir: Path, config: Mapping[str, Any], *, resume: Path | None = None, project: str | None = None
) -> list[Logger]:
    """CSV always; the one that `config` (`{target, params}`) names, else TensorBoard where it is installed.

    `resume` is the checkpoint that training goes on from; `project` is for loggers that know projects.
    """
    finished, rows = finished_rows(logdir / "metrics.csv", resume)
    loggers: list[Logger] = [csv_logger(logdir, rows)]
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

        purge = {} if finished is None else {"purge_step": finished}  # what a lost continuation had written
        return [*loggers, TensorBoardLogger(str(logdir), name="tensorboard", version="", **purge)]
    except ModuleNotFoundError:
        logger.info("note: no TensorBoard here (pip install tensorboard): curves go to metrics.csv only")
        return loggers


def finished_rows(path: Path, resume: Path | None) -> tuple[int | None, list[dict[str, str]]]:
    """The batches that the checkpoint has finished (None without one), and the curves' rows until then."""
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    if resume is None:
        return None, rows
    loop = read_checkpoint(resume).get("loops", {}).get("fit_loop", {})
    if not loop:
        return None, rows
    finished = loop["epoch_loop.batch_progress"]["total"]["processed"]
    validation = loop["epoch_loop.val_loop.batch_progress"]["total"]
    if validation["ready"] > validation["processed"]:  # due again: see ExactResume
        last = finished - 1
        rows = [row for row in rows if int(row["step"]) != last or any("train/" in key for key in row)]
    return finished, [row for row in rows if int(row["step"]) < finished]


def csv_logger(logdir: Path, rows: list[dict[str, str]]) -> CSVLogger:
    """Curves in logdir/metrics.csv, after the rows that are there already and shall stay."""
    curves = CSVLogger(str(logdir), name="", version="")
    if rows and rank_zero_only.rank == 0:
        curves.experiment.metrics.extend(rows)  # making the experiment has removed the file
        curves.save()
    return curves
