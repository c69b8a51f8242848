"""Print completions of commands and options for a shell: `taming --print-completion bash`.

    taming --print-completion bash > ~/.local/share/bash-completion/completions/taming
    taming --print-completion zsh > ~/.zfunc/_taming      (with fpath+=~/.zfunc before compinit in ~/.zshrc)

Needs the package shtab.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

from taming.cli import COMMANDS
from taming.cli.options import one_of, path
from taming.cli.parser import Parser, build_parser

SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: Parser) -> None:
    """Add the options of this command."""
    parser.add_argument("shell", help="bash, zsh or tcsh", **one_of(*SHELLS))


def run(options: argparse.Namespace) -> None:
    """Print the completions."""
    try:
        import shtab
    except ImportError as error:
        raise ValueError(f"completions need the package shtab ({error}): pip install shtab") from error
    print(shtab.complete(parser_of_all(shtab.FILE), options.shell))


def parser_of_all(complete_file: Any) -> argparse.ArgumentParser:
    """Return a parser with all commands; `complete_file` is how shells complete the values that are paths."""
    parser = argparse.ArgumentParser(prog="taming")
    parsers = parser.add_subparsers(dest="command")
    for name, what in COMMANDS.items():
        module = importlib.import_module(f"taming.cli.{name.replace('-', '_')}")
        own = module.build_parser() if hasattr(module, "main") else build_parser(module)
        for action in own._actions:
            if action.type in (path, Path) or "base" in action.dest:
                setattr(action, "complete", complete_file)  # noqa: B010  # what shtab looks for
        parsers.add_parser(name, help=what, parents=[own], conflict_handler="resolve")
    return parser
