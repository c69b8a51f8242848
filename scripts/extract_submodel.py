#!/usr/bin/env python
"""Take one part out of a model: the VQGAN inside a transformer's checkpoint, for instance.

    scripts/extract_submodel.py logs/RUN vqgan/                           its first stage, ready to be used
    scripts/extract_submodel.py logs/RUN cond.ckpt --prefix cond_stage_model
    scripts/extract_submodel.py model.ckpt vqgan.ckpt                     weights alone, if there is no config

The part is what the weights' names begin with: first_stage_model, cond_stage_model, transformer. Its config
is cut out of that of the whole, from params.first_stage_config and so on. A folder gets model.safetensors and
config.yaml, after the weights were seen to fit; a .ckpt file gets state_dict, and config if there is one.
"""

import argparse
import logging
import sys
from pathlib import Path

from taming.checkpoint.convert import extract
from taming.config import allow_targets
from taming.util import exit_status

DEFAULT = "first_stage_model"


def parse(argv: list[str] | None) -> argparse.Namespace:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    add = parser.add_argument
    add("source", metavar="IN", help="checkpoint file, run directory, or folder with model.safetensors")
    add("target", metavar="OUT", type=Path, help="a folder, made if it is new; or a file that ends in .ckpt")
    add("submodel", metavar="PART", nargs="?", help="the same as --prefix PART, as in 2021")
    add("--prefix", metavar="PART", help=f"which part; default: {DEFAULT}")
    add("--config", metavar="YAML", help="config of the whole model, if IN does not have it: one file")
    add("--allow", action="append", default=[], metavar="PACKAGE", help="let the config name its classes")
    options = parser.parse_args(argv)
    if options.submodel and options.prefix and options.submodel != options.prefix:
        parser.error(f"two parts are named: {options.submodel} and {options.prefix}")
    options.part = options.prefix or options.submodel or DEFAULT
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Extract, and say what was written."""
    allow_targets(*options.allow)
    for file in extract(options.source, options.target, options.part, options.config):
        print(f"written: {options.part} to {file} ({file.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(main())
