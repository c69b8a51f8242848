"""Show what a data set gives, as one sheet.

    taming preview -b ade20k_cond_stage --split validation -o sheet.png data.params.validation.params.size=256

A row is an item: the image, every condition as an image, and names. The items are chosen at random; crops and
flips are those of training. Overrides are written key.sub=value, as for training.
"""

import argparse
import random

from torch.utils.data import IterableDataset

from taming.cli.options import add_allow, add_outdir, png_file
from taming.config import find_config, instantiate_from_config, load_config
from taming.data.preview import preview_sheet
from taming.data.sampler import seeded
from taming.images import from_pil
from taming.inference.provenance import save_image
from taming.util import ProgressBar, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("-b", "--base", nargs="+", required=True, metavar="CONFIG", help="YAML files, or names that `taming "
        "configs` lists; later ones win")
    add_outdir(parser, "the PNG file to write, or a folder for preview.png", required=True, metavar="PATH")
    add("--split", default="train", help="train, validation, test or predict")
    add("-n", type=number(int, 1), default=8, help="items")
    add("--seed", type=int, default=0, help="of the choice, the crops and the flips")
    add("--cell", type=number(int, 32), default=192, metavar="PIXELS", help="height of a row")
    add_allow(parser)
    add("overrides", nargs="*", metavar="key.sub=value", help="change what the files say")


def run(options: argparse.Namespace) -> None:
    """Build the data set, load a few items, lay them out."""
    file = png_file(options.outdir, "preview")
    names = [word for word in options.base if "=" not in word]
    overrides = [word for word in options.base if "=" in word] + options.overrides
    splits = load_config(map(find_config, names), overrides).get("data", {}).get("params", {})
    if not splits.get(options.split):
        raise ValueError(f"{', '.join(names)}: there is no data.params.{options.split}")
    dataset = instantiate_from_config(splits[options.split])
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{type(dataset).__name__} has no single items that could be shown")
    chosen = sorted(random.Random(options.seed).sample(range(len(dataset)), min(options.n, len(dataset))))
    items = []
    for index in ProgressBar(chosen, unit="item"):
        with seeded(options.seed, 0, index):
            item = dataset[index]
        items.append(item[0] if isinstance(item, tuple) else item)  # (item, number of its data set)
    save_image(from_pil(preview_sheet(items, dataset, cell=options.cell)), file)
    print(f"{len(items)} of {len(dataset)} items in {file}")
