"""Pack a folder of images into tar shards.

    taming shards photos/ -o shards/ --name train

A few large files are read faster than millions of small ones, above all from network disks. The images stay
as they are; their order is shuffled. In a configuration:

    train:
      target: taming.data.shards.TarShards
      params: {shards: shards/train-*.tar, size: 256, random_crop: true, flip: true}
"""

import argparse
from glob import escape

from taming.cli.options import add_outdir, path
from taming.data.shards.writer import pack
from taming.util import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("folder", type=path, help="images, at any depth")
    add_outdir(parser, "folder for the shards", required=True)
    add("--name", default="train", help="shards are called NAME-000000.tar, ...")
    add("--megabytes", type=float, default=500, help="size at which a shard is closed")
    add("--samples", type=int, help="number of images at which a shard is closed; default: no limit")
    add("--class-folders", action="store_true", help="the folders in FOLDER are the classes of the images")
    add("--captions", action="store_true", help="the text of an image is in the .txt file beside it")
    add("--segmentation", type=path, metavar="FOLDER", help="label PNGs, named and placed like the images")
    add("--depth", type=path, metavar="FOLDER", help="depth PNGs, likewise, of `taming extract-depth`")
    add("--seed", type=int, default=0, help="of the order; -1 sorts by name")


def run(options: argparse.Namespace) -> None:
    """Pack, and print what was written."""
    progress = pack(
        options.folder, options.outdir, name=options.name, max_bytes=options.megabytes * 1e6,
        max_samples=options.samples, classes=options.class_folders, captions=options.captions,
        segmentation=options.segmentation, depth=options.depth,
        seed=None if options.seed < 0 else options.seed,
    )
    with ProgressBar(unit="image") as bar:
        for _, total in progress:
            bar.total = total
            bar.update()
    shards = sorted(options.outdir.glob(f"{escape(options.name)}-*.tar"))
    size = sum(file.stat().st_size for file in shards) / 1e6
    print(f"{bar.n} images in {len(shards)} shards of {size:.0f} MB together: {options.outdir}")
