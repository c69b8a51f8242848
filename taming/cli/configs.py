"""List the configurations that `--base NAME` finds, or print one.

    taming configs                          all of them, with what each is for
    taming configs demo                     those whose name contains a word
    taming configs demo/vqgan               one of them, as YAML
    taming configs demo/vqgan > mine.yaml   ... to be changed

Those in the folder `configs` here come before those of the same name that come with the package.
"""

import argparse

from taming.config import config_names, find_config
from taming.parameters import did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("name", nargs="?", default="", help="a configuration, or a part of a name")


def run(options: argparse.Namespace) -> None:
    """Print a file, or the names and the first lines of all that match."""
    name, names = options.name.removesuffix(".yaml").removeprefix("configs/"), config_names()
    if name in names:
        print(find_config(name).read_text(encoding="utf-8"), end="")
        return
    found = [each for each in names if name in each]
    if not found:
        near = did_you_mean(name, names)
        raise ValueError(f"no configuration is called {name}{near}; `taming configs` lists all")
    width = max(map(len, found))
    for each in found:
        print(f"{each:{width}}  {summary(find_config(each).read_text(encoding='utf-8'))}")


def summary(text: str) -> str:
    """Return the first sentence of the comment that a YAML file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.strip("# "))
    return " ".join(lines).split(". ")[0].removesuffix(".")
