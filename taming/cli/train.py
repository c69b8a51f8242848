"""Train a tokenizer or a transformer from YAML files, or resume a run: the command of main.py."""

from collections.abc import Sequence

from taming.training import command
from taming.training.arguments import build_parser

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; return its exit status."""
    return command.main(None if argv is None else list(argv), prog=prog or "taming train")
