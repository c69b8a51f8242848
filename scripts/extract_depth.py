#!/usr/bin/env python
"""Depth maps of a folder of images: scripts/extract_depth.py photos/ -o depth/ --model Intel/dpt-large

The model is one of the `transformers` library: a name on the hub, or a folder. A map is an RGBA PNG, whose
four bytes a pixel are a float32 (taming.data.depth), with the size and the name of its image, in the model's
own unit and direction. What is there already is kept: start the command again after an interruption.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from taming.data.extraction import depth_estimate, depth_pixels, extract, load_depth_model, map_names
from taming.util import exit_status, pick_device


def parse(argv: list[str] | None) -> argparse.Namespace:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    add = parser.add_argument
    add("folder", type=Path, help="is searched for images at any depth")
    add("-o", "--outdir", type=Path, required=True, help="folder for the maps")
    add("--model", required=True, help="name on the hub, or a folder")
    add("--offline", action="store_true", help="do not ask the hub: the model was fetched before")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load the model, and make what is missing."""
    names, device = map_names(options.folder, options.outdir), pick_device(options.device)
    estimate = depth_estimate(load_depth_model(options.model, device, offline=options.offline), device)
    count = {"made": 0, "kept": 0, "bad": 0}
    with tqdm(total=len(names), unit="image") as bar:
        for outcome, reason in extract(names, estimate, depth_pixels):
            count[outcome] += 1
            bar.update()
            if reason:
                bar.write(f"skipped: {reason}", file=sys.stderr)
    print("{made} depth maps made, {kept} were there, {bad} images skipped".format(**count))


if __name__ == "__main__":
    sys.exit(main())
