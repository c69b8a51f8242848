#!/usr/bin/env python
"""Convert a checkpoint to safetensors + YAML, or such a folder back to a .ckpt file.

    scripts/convert_checkpoint.py last.ckpt vqgan/ --config model.yaml   a file of 2021 and its YAML
    scripts/convert_checkpoint.py logs/RUN vqgan/                        a run directory, which has its config
    scripts/convert_checkpoint.py vqgan/ vqgan.ckpt                      back: torch.load reads it as it is

The folder holds model.safetensors, in which nothing can hide that runs, and config.yaml. All commands here
take either form, and so do load_model and from_pretrained. The .ckpt has the keys state_dict, config and
batches_seen. What does not fit together is refused by name, and nothing is written then.

States of optimizers are left out, so training does not resume from the result; it can start from its weights.
A file of 2021 may also hold the perceptual network of its loss: that is left out, too, and said.
"""

import argparse
import logging
import sys
from pathlib import Path

from taming.checkpoint.convert import convert
from taming.config import allow_targets
from taming.util import exit_status


def parse(argv: list[str] | None) -> argparse.Namespace:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    add = parser.add_argument
    add("source", metavar="IN", help="checkpoint file, run directory, or folder with model.safetensors")
    add("target", metavar="OUT", type=Path, help="a folder, made if it is new; or a file that ends in .ckpt")
    add("--config", metavar="YAML", help="what the model was trained with, if IN does not have it: one file")
    add("--allow", action="append", default=[], metavar="PACKAGE", help="let the config name its classes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Convert, and say what was written."""
    allow_targets(*options.allow)
    for file in convert(options.source, options.target, options.config):
        print(f"written: {file} ({file.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(main())
