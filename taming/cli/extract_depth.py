"""Make depth maps of a folder of images.

    taming extract-depth photos/ -o depth/ --model Intel/dpt-large

The model is one of the `transformers` library: a name on the hub, or a folder. A map is an RGBA PNG whose
four bytes per pixel are a float32 (taming.data.files.depth), with the size and the name of its image, in the
unit and direction of the model. Existing maps are kept: start the command again after an interruption.
"""

import argparse

from taming.cli.options import add_extraction_options as add_arguments
from taming.inference import pseudo_labels
from taming.util import pick_device

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> None:
    """Load the model, and make the depth maps that are missing."""
    names = pseudo_labels.map_names(options.folder, options.outdir)
    device = pick_device(options.device)
    model = pseudo_labels.load_depth_model(options.model, device, offline=options.offline)
    estimate = pseudo_labels.depth_estimate(model, device)
    count = pseudo_labels.extract_all(names, estimate, pseudo_labels.depth_pixels)
    print("{made} depth maps made, {kept} were there, {bad} images skipped".format(**count))
