"""What the tables of trained models share: their options, runs that go on after a stop, and what is written.

A table has rows, each of which is trained by the training command and measured as `taming evaluate` does.
Runs and results are kept in a folder: a second start trains and measures only what is missing.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts import machine
from taming.cli import evaluate
from taming.cli.parser import Parser, build_parser
from taming.training.command import main as train
from taming.util import atomic_write

RESULTS = Path(__file__).parent / "results"


def options_parser(table: str, description: str | None, rows: str, images: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all tables; `rows` and `images` are help texts."""
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_is)
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=rows)
    add("--threads", type=int, default=1, help="of torch; default: 1")
    add("-n", "--num-images", type=int, default=2048, help=f"{images}; default: 2048")
    add("--folder", type=Path, help=f"of the runs; default: logs/{table}_<budget>")
    add("--out", type=Path, help="the JSON file; the table and the sheet are put beside it; default: "
        f"benchmarks/results/<date>_{table}.json")
    return parser


def add_budget(parser: argparse.ArgumentParser, whose: str) -> None:
    """Add the options of a budget of time or of batches, either of which is needed."""
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help=f"of the processor, for the training steps of {whose}")
    budget.add_argument("--steps", type=int, help=f"batches of {whose}, in place of --minutes")


def budget_name(options: argparse.Namespace) -> str:
    """Return the budget as names of folders have it: 10min, 1000steps."""
    return f"{options.minutes:g}min" if options.minutes else f"{options.steps}steps"


def read_options(
    parser: argparse.ArgumentParser, argv: Sequence[str], known: Collection[str]
) -> argparse.Namespace:
    """Return the options, whose rows are known, and set the threads."""
    options = parser.parse_args(argv)
    if unknown := set(options.rows) - set(known):
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    torch.set_num_threads(options.threads)
    return options


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the settings beside the runs; end the command where those of another table are there."""
    file = folder / "settings.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{folder} holds runs with other settings ({file}): name another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(file, settings)


def kept(file: Path, measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return what a file holds, or measure it and keep that; None where the measuring was stopped."""
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    if (measured := measure()) is not None:
        _write_json(file, measured)
    return measured


def run_named(folder: Path, name: str) -> Path | None:
    """Return the run directory of that name, <time>_<name>: `*_aug` would find that of conv_aug as well."""
    return next((run for run in sorted(folder.glob(f"*_{name}")) if run.name.split("_", 1)[1] == name), None)


def trained(name: str, folder: Path, start: list[str]) -> Path | None:
    """Return a run that is trained to its end: begun by the words `start`, or gone on with.

    None where it was stopped by a signal.
    """
    run = run_named(folder, name)
    begun = run is not None and (run / "checkpoints" / "last.ckpt").exists()
    if status := train(["-t", "-r", str(run), "--gpus", "0"] if begun else start):
        if status == 130:
            return None
        sys.exit(f"the row {name} failed: see above")
    run = run_named(folder, name)
    assert run is not None  # it has just been trained
    return run


def cpu_minutes(checkpoint: dict[str, Any]) -> float:
    """Return the minutes of the processor that a run with a `Budget` spent."""
    states = checkpoint["callbacks"].items()
    return round(next(state["seconds"] for key, state in states if "Budget" in key) / 60, 3)


def evaluated(run: Path, *words: str) -> list[dict[str, Any]]:
    """Return the results of `taming evaluate RUN WORDS`, on the CPU."""
    parser = build_parser(evaluate, "benchmarks")
    assert isinstance(parser, Parser)
    wanted = parser.read([str(run), "--device", "cpu", *words])
    results = evaluate.evaluate_run(evaluate.load_subject(run, device="cpu"), wanted)
    return [json.loads(result.to_json()) for result in results if result is not None]


def unseen(count: int) -> str:
    """Return the word that makes as many landscapes for validation."""
    return f"data.params.validation.params.length={count}"


def write(
    table: str, out: Path | None, argv: Sequence[str], measured: dict[str, Any],
    markdown: Callable[[str], str], save_sheet: Callable[[Path], None],
) -> None:
    """Print the table; write it, all numbers and the sheet.

    Args:
        table: name of the module.
        out: the JSON file; None: in `RESULTS`, by the time.
        argv: words of the command.
        measured: all numbers, of the JSON file.
        markdown: makes the table, given the command.
        save_sheet: writes the sheet to a path.
    """
    out = out or RESULTS / f"{time.strftime('%Y-%m-%d_%H-%M')}_{table}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.{table} {shlex.join(argv)}".rstrip()
    text = markdown(command)
    print(f"\n{text}")
    date = time.strftime("%Y-%m-%d %H:%M")
    content = {"command": command, "date": date, "machine": machine(), **measured}
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    save_sheet(out.with_suffix(".png"))
    print(f"written to {out}, .md and .png")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
