"""Train a tokenizer or a transformer from YAML files, or resume a run: the command of main.py."""

from taming.training.arguments import build_parser
from taming.training.command import main

__all__ = ["build_parser", "main"]
