#!/usr/bin/env python
"""Pack a folder of images into tar shards: scripts/make_shards.py photos/ -o shards/ --name train

Few large files are read faster than millions of small ones, from network disks above all. The images stay as
they are; their order is mixed. In a configuration:
    train:
      target: taming.data.shards.TarShards
      params: {shards: shards/train-*.tar, size: 256, random_crop: true, flip: true}
"""

import argparse
import sys
from glob import escape
from pathlib import Path

from tqdm import tqdm

from taming.data.shards.writer import pack
from taming.util import exit_status


def parse(argv: list[str] | None) -> argparse.Namespace:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    add = parser.add_argument
    add("folder", type=Path, help="is searched for images at any depth")
    add("-o", "--outdir", type=Path, required=True, help="folder for the shards")
    add("--name", default="train", help="shards are NAME-000000.tar, ...; default: train")
    add("--megabytes", type=float, default=500, help="a shard is closed when it has so many; default: 500")
    add("--samples", type=int, help="or when it has so many images; default: any number")
    add("--classes", action="store_true", help="the folders right below are the classes of the images")
    add("--captions", action="store_true", help="the text of an image is in the .txt file beside it")
    add("--segmentation", type=Path, help="folder of label PNGs, named and placed like the images")
    add("--depth", type=Path, help="folder of depth PNGs, likewise (scripts/extract_depth.py makes them)")
    add("--seed", type=int, default=0, help="of the order; -1: sorted by name; default: 0")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Pack, and say what was written."""
    progress = pack(
        options.folder, options.outdir, name=options.name, max_bytes=options.megabytes * 1e6,
        max_samples=options.samples, classes=options.classes, captions=options.captions,
        segmentation=options.segmentation, depth=options.depth,
        seed=None if options.seed < 0 else options.seed,
    )
    with tqdm(unit="image") as bar:
        for _, total in progress:
            bar.total = total
            bar.update()
    shards = sorted(options.outdir.glob(f"{escape(options.name)}-*.tar"))
    size = sum(path.stat().st_size for path in shards) / 1e6
    print(f"{bar.n} images in {len(shards)} shards of {size:.0f} MB together: {options.outdir}")


if __name__ == "__main__":
    sys.exit(main())
