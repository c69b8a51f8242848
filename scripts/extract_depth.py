#!/usr/bin/env python
"""Depth maps of a folder of images: scripts/extract_depth.py photos/ -o depth/ --model Intel/dpt-large

The model is one of the `transformers` library: a name on the hub, or a folder. A map is an RGBA PNG, whose
four bytes a pixel are a float32 (taming.data.files.depth), with the size and the name of its image, in
the model's own unit and direction. What is there already is kept: start the command again after an
interruption.
"""

import argparse
import sys

from taming.inference.pseudo_labels import (
    depth_estimate,
    depth_pixels,
    extract_all,
    load_depth_model,
    map_names,
    read_options,
)
from taming.util import exit_status, pick_device


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, read_options(__doc__, argv))


def run(options: argparse.Namespace) -> None:
    """Load the model, and make what is missing."""
    names, device = map_names(options.folder, options.outdir), pick_device(options.device)
    estimate = depth_estimate(load_depth_model(options.model, device, offline=options.offline), device)
    count = extract_all(names, estimate, depth_pixels)
    print("{made} depth maps made, {kept} were there, {bad} images skipped".format(**count))


if __name__ == "__main__":
    sys.exit(main())
