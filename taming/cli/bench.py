"""Measure speed and memory beside the way of 2021 and beside what the machine can do.

    taming bench --list
    taming bench stage1 decode
    taming bench --quick               small sizes, to see that it runs

The measurements are in the folder `benchmarks` of the source, which is not part of the installed package.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import taming
from taming.cli.parser import Parser, exit_status

ROOT = Path(taming.__file__).resolve().parents[1]


def build_parser(prog: str | None = None) -> Parser:
    """Return a parser of the names of parts; all options are those of `python -m benchmarks`."""
    parser = Parser(__doc__, prog)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure; default: all")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run `python -m benchmarks` with these words; return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        return exit_status(_missing)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.call([sys.executable, "-m", "benchmarks", *words], env=environment)


def _missing() -> None:
    raise ValueError(
        f"there is no folder benchmarks in {ROOT}: run this command in a checkout of the source, installed "
        "with `pip install -e .`"
    )
