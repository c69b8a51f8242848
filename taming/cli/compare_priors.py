"""Train priors of equal size on the same codes, and compare them: a GPT and PixelSNAIL, for instance.

    taming compare-priors tables/landscapes_priors -o compared/
    taming compare-priors tables/landscapes_priors comparison.steps=200 -o quick/

The table has the negative log-likelihood of validation codes at equal steps and at equal training time, as
Table 1 of Esser et al. 2021, with standard errors over seeds. The folder gets table.md, result.json with the
protocol, curves.csv, and the state of each run: a second start with the same configuration goes on.
"""

import argparse
from pathlib import Path

from taming.cli.options import add_allow, add_device, add_outdir, check_folder
from taming.config import find_config, load_config, run_directory
from taming.util import pick_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a YAML file, or the name of a configuration of the package")
    add("changes", metavar="KEY=VALUE", nargs="*", help="other values for keys of the configuration")
    add_outdir(parser, "folder for the results", required=True)
    add_device(parser)
    add_allow(parser)


def run(options: argparse.Namespace) -> None:
    """Train what is not there yet, and print the table."""
    from taming.training.compare_priors import TABLE, compare_priors

    file, outdir = find_config(options.config), check_folder(options.outdir)
    config = load_config(file, options.changes)
    with run_directory(outdir):
        compare_priors(config, str(file), Path(outdir), pick_device(options.device))
    print((outdir / TABLE).read_text(encoding="utf-8"), end="")
