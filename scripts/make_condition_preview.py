#!/usr/bin/env python
"""Show what a data set gives, as one sheet: scripts/make_condition_preview.py -b configs/x.yaml -o sheet.png

One row an item: the picture, every condition as a picture, and names. The items are chosen at random; crops
and flips are drawn as in training. Overrides are written key.sub=value, as for main.py:
    scripts/make_condition_preview.py -b configs/ade20k_cond_stage.yaml --split validation -o sheet.png \\
        data.params.validation.params.size=256
"""

import argparse
import random
import sys
from pathlib import Path

from torch.utils.data import IterableDataset
from tqdm import tqdm

from taming.cli.outputs import check_png
from taming.config import allow_targets, instantiate_from_config, load_config
from taming.data.preview import preview_sheet
from taming.data.sampler import seeded
from taming.util import exit_status


def parse(argv: list[str] | None) -> argparse.Namespace:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    add = parser.add_argument
    add("-b", "--base", nargs="+", required=True, metavar="CONFIG", help="YAML files, the last one wins")
    add("-o", "--output", type=Path, required=True, help="the PNG file to write")
    add("--split", default="train", help="train, validation, test or predict; default: train")
    add("-n", type=int, default=8, help="items; default: 8")
    add("--seed", type=int, default=0, help="of the choice, the crops and the flips; default: 0")
    add("--cell", type=int, default=192, help="height of a row in pixels; default: 192")
    add("--allow", action="append", default=[], metavar="PACKAGE", help="a package that targets may name")
    add("overrides", nargs="*", metavar="key.sub=value", help="change what the files say")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Build the data set, load a few items, draw them."""
    if options.n < 1 or options.cell < 32:
        raise ValueError(f"-n must be at least 1 and --cell at least 32, not {options.n} and {options.cell}")
    check_png(options.output, "--output")
    files = [word for word in options.base if "=" not in word]
    overrides = [word for word in options.base if "=" in word] + options.overrides
    allow_targets(*options.allow)
    splits = load_config(files, overrides).get("data", {}).get("params", {})
    if not splits.get(options.split):
        raise ValueError(f"{', '.join(files)}: there is no data.params.{options.split}")
    dataset = instantiate_from_config(splits[options.split])
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{type(dataset).__name__} cannot be asked for single items")
    chosen = sorted(random.Random(options.seed).sample(range(len(dataset)), min(options.n, len(dataset))))
    items = []
    for index in tqdm(chosen, unit="item"):
        with seeded(options.seed, 0, index):
            item = dataset[index]
        items.append(item[0] if isinstance(item, tuple) else item)  # (item, number of its data set)
    sheet = preview_sheet(items, dataset, cell=options.cell)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output)
    print(f"{len(items)} of {len(dataset)} items in {options.output}")


if __name__ == "__main__":
    sys.exit(main())
