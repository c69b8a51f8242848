"""The commands: `taming COMMAND ...`, or `python -m taming COMMAND ...`; in scripts/ by their names of 2021.

A command is a module here and a line in COMMANDS. The module has a docstring, which is its help; a function
`add_arguments(parser)`; and a function `run(options)`, which raises ValueError for what the user has to
change. This file imports the standard library only, so that a list of commands takes no time.
"""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from taming.cli.environment import needs_packages

COMMANDS = {
    "train": "train a tokenizer or a transformer from YAML files, or resume a run",
    "sample": "generate images with a transformer: of classes, or without a condition",
    "sample-dataset": "generate images for the conditions of a data set, or complete its images",
    "scenes": "generate images for layouts of objects or joints, at any resolution",
    "panorama": "generate one large image, or complete one",
    "encode": "encode a data set once, to train priors from its codes",
    "reconstruct": "encode and decode images with a tokenizer, and measure what is lost",
    "evaluate": "say how good images are: of a run, or in a folder",
    "compare": "put evaluations of several runs side by side",
    "table": "evaluate the rows of a table: several models or ways of sampling",
    "statistics": "write the statistics of a set of images, to evaluate against",
    "compare-priors": "train priors of equal size on the same codes, and compare their likelihoods",
    "page": "serve a web page to paint conditions and generate images on",
    "demo": "train both stages on built-in landscapes and generate images, in minutes",
    "convert": "convert a checkpoint to safetensors and YAML, or back, or take a part out of it",
    "shards": "pack a folder of images into tar shards",
    "preview": "show images and conditions of a data set on one sheet",
    "extract-depth": "make depth maps of a folder of images",
    "extract-segmentation": "make label maps of a folder of images",
    "bench": "measure speed and memory, beside the way of 2021 and what the machine can do",
    "configs": "list the configurations that come with the package, or print one",
}

Command = Callable[[Sequence[str] | None], int]  # from the words of a command line to an exit status


def main(argv: Sequence[str] | None = None) -> int:
    """Run `taming`; return the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(importlib.import_module("taming").__version__)
        return 0
    if name.replace("_", "-") == "--print-completion":
        return command("completion", "taming --print-completion")(rest)
    name = name.replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "there are: " + ", ".join(COMMANDS)
        print(f"error: there is no command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    return command(name, f"taming {name}")(rest)


def command(name: str, prog: str | None = None, **defaults: Any) -> Command:
    """Return a command; its module is imported when it is called.

    Args:
        name: the module here, with hyphens for underscores.
        prog: the name in help texts.
        **defaults: other values for what is not given on the command line.
    """

    def call(argv: Sequence[str] | None = None) -> int:
        with needs_packages():
            module = importlib.import_module(f"taming.cli.{name.replace('-', '_')}")
            from taming.cli.parser import execute
        return execute(module, argv, prog, defaults)

    return call


def script(name: str, module: str, **defaults: Any) -> Command:
    """Return a command for a file of scripts/, and run it if that file is the program (`__main__`)."""
    found = command(name, Path(sys.argv[0]).name, **defaults)
    if module == "__main__":
        sys.exit(found(None))
    return found


def overview() -> str:
    """Describe all commands in a few lines."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return (
        f"usage: taming COMMAND ...\n\n{lines}\n\n`taming COMMAND --help` lists the options of a command; in "
        "them hyphens and underscores are the same.\n`taming --print-completion bash` (or zsh) prints "
        "completions for the shell, `taming --version` the version."
    )
