#!/usr/bin/env python
"""Draw pictures from a trained transformer: python scripts/sample_fast.py -r logs/RUN -n 64 --grid

Sample i of a seed is the same picture in any batch. What is in the folder already is not drawn again.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from taming.checkpoint import find_checkpoint
from taming.cli.options import Parser, add_options, sampling_options
from taming.cli.outputs import check_folder, check_png
from taming.data.files.images import read_image
from taming.images import from_uint8, image_grid, save_png
from taming.inference.conditions import class_numbers, conditions_of
from taming.inference.decoding import decode
from taming.inference.distributed import TokenBar, is_drawn, is_whole, own_batches, say, share, wait_for
from taming.inference.loading import load_transformer
from taming.sampling import image_generators
from taming.util import exit_status

MOST_ON_SHEET = 400  # samples; more would be too small to look at, and take gigabytes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument
    add("-o", "--outdir", type=Path, help="folder for the samples; default: RUN/samples/<settings>")
    add("-n", "--num_samples", type=int, default=64, help="how many, over all classes together; default: 64")
    add("--batch_size", type=int, default=25, help="how many at once; changes the speed alone; default: 25")
    add("--classes", default="imagenet", help="class numbers, 3,7,12 for instance, taken in turn by the "
        "samples; default: all of the model (which imagenet, the default of 2021, means as well)")
    add("--grid", nargs="?", const="", metavar="FILE", help="also write one sheet, the pictures of a class "
        "side by side; without a name OUTDIR/grid.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load, draw what is missing, save, and write the sheet."""
    if min(options.num_samples, options.batch_size) < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    how = sampling_options(options)
    model, _, note = load_transformer(options.resume, how, device=options.device, allow=options.allow)
    named = None if options.classes == "imagenet" else options.classes
    classes = class_numbers(named, model)
    conditions_of(model, len(classes or [0]), given={"class": classes})  # errors show before files are there
    folder = options.outdir or default_folder(options, note, named)
    check_folder(folder)
    grid = None if options.grid is None else Path(options.grid or folder / "grid.png")
    if grid is not None:
        check_png(grid, "--grid")
    labels = [{"class": str(number)} for number in classes or []] or [{}]
    notes = [note | labels[i % len(labels)] for i in range(options.num_samples)]
    paths = [folder / f"sample_{i:06d}.png" for i in range(options.num_samples)]
    batches = own_batches(len(paths), options.batch_size, lambda i: is_drawn(paths[i], notes[i]))
    say(f"{len(paths)} samples in {folder}, {sum(map(is_whole, paths))} of them there already")
    with TokenBar(sum(map(len, batches))) as bar:
        for numbers in batches:
            bar.next_batch(len(numbers), math.prod(model.latent_shape()))
            chosen = classes and [classes[i % len(classes)] for i in numbers]
            condition = conditions_of(model, len(numbers), given={"class": chosen})
            codes = model.sample_codes(
                condition, how, callback=bar, generator=image_generators(options.seed, numbers)
            )
            for i, image in zip(numbers, decode(model, codes), strict=True):
                save_png(image, paths[i], text=notes[i])
    if grid is not None and share()[0] == 0:
        wait_for(paths[:MOST_ON_SHEET])
        print(f"sheet: {write_sheet(paths[:MOST_ON_SHEET], len(labels), grid)}")


def default_folder(options: argparse.Namespace, note: dict[str, str], classes: str | None) -> Path:
    """RUN/samples/<settings>, one folder for each step of training, as in 2021."""
    file = find_checkpoint(options.resume)
    run = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    named = {name: note[name] for name in ("seed", "top_k", "top_p", "temperature")}
    unusual = {"min_p": "None", "guidance": "1.0", "precision": "32"}
    named |= {name: note[name] for name, usual in unusual.items() if note[name] != usual}
    named |= {"classes": classes.replace(",", "-")[:80]} if classes else {}
    return run / "samples" / "_".join(f"{key}_{value}" for key, value in named.items()) / note["step"]


def write_sheet(paths: list[Path], n_classes: int, file: Path) -> Path:
    """All samples on one sheet; where each class has equally many, those of a class stand side by side."""
    columns = None
    if 1 < n_classes < len(paths) and len(paths) % n_classes == 0:
        each = len(paths) // n_classes
        columns = each * max(1, round(math.sqrt(len(paths)) / each))  # whole classes, about as wide as high
        paths = [path for i in range(n_classes) for path in paths[i::n_classes]]
    images = torch.stack([torch.from_numpy(from_uint8(read_image(path))) for path in paths])
    return save_png(image_grid(images.permute(0, 3, 1, 2), columns), file)


if __name__ == "__main__":
    sys.exit(main())
