"""Make depth maps of a folder of images.

    taming extract-depth photos/ -o depth/ --model Intel/dpt-large

The model is one of the `transformers` library: a name on the hub, or a folder. A map is an RGBA PNG whose
four bytes per pixel are a float32 (taming.data.files.depth), with the size and the name of its image, in the
unit and direction of the model. Existing maps are kept: start the command again after an interruption.
"""

import argparse

from taming.cli.options import add_extraction_options
from taming.inference.pseudo_labels import (
    depth_estimate,
    depth_pixels,
    extract_all,
    load_depth_model,
    map_names,
)
from taming.util import pick_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_extraction_options(parser)


def run(options: argparse.Namespace) -> None:
    """Load the model, and make the maps that are missing."""
    names, device = map_names(options.folder, options.outdir), pick_device(options.device)
    estimate = depth_estimate(load_depth_model(options.model, device, offline=options.offline), device)
    count = extract_all(names, estimate, depth_pixels)
    print("{made} depth maps made, {kept} were there, {bad} images skipped".format(**count))
