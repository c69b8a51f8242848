#!/usr/bin/env python
"""Draw pictures of the layouts of a data set: python scripts/make_scene_samples.py -r logs/RUN -o out -n 8

Writes a picture of each layout, of boxes, points or joints, and samples, at any resolution. The data set
is that of the run; other YAML files (-b) and data.sub=value words are merged over it, and --ignore_base_data
leaves the run's out. Sample j of layout i is the same picture in any batch.

Pictures larger than in training are drawn through a window of the training size. As in 2021, what the window
reads is the layout of what it shows: objects outside of it are left out, and boxes are moved and cut; or,
where the layout of the whole picture says which part is shown (encode_crop), that part becomes the window.
With --layout whole each window reads the whole layout instead.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from taming.cli.options import Parser, add_data_options, add_options, read_size, sampling_options
from taming.cli.outputs import check_folder
from taming.data.files.images import read_image
from taming.images import from_uint8, image_grid, save_png
from taming.inference.conditions import check_drawable
from taming.inference.dataset import batch_of, build_dataset, data_section, layout_builders, unwrapped
from taming.inference.decoding import decode
from taming.inference.distributed import TokenBar, is_drawn, is_whole, own_batches, say, share, wait_for
from taming.inference.layouts import sample_layouts
from taming.inference.loading import load_transformer
from taming.inference.provenance import data_note
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import image_generators
from taming.util import exit_status

SAMPLE_BITS = 24  # of a picture's number: the layout's; above them, the sample's


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_options(parser)
    add_data_options(parser)
    add = parser.add_argument
    add("-n", "--num_layouts", type=int, help="how many layouts, from the first item; default: all")
    add("-N", "--n_samples_per_layout", type=int, default=4, help="pictures of each; default: 4")
    add("-R", "--resolution", metavar="HxW", help="HEIGHTxWIDTH or HEIGHT,WIDTH in pixels; default: the "
        "training size")
    add("-C", "--conditional", metavar="KEY", help="the layout's key, as in 2021; default: the model's")
    add("--layout", choices=["window", "whole"], default="window", help="what a window reads of it; default: "
        "window")
    add("--sheets", action="store_true", help="also write one sheet for each layout, with all its samples")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load the model and its layouts, draw what is missing, save."""
    check_folder(options.outdir)
    model, config, note = load_transformer(
        options.resume, sampling_options(options), device=options.device, allow=options.allow
    )
    key = layout_key(model, options.conditional)
    trained = model.first_stage_model.image_size
    size = read_size(options.resolution, "--resolution") if options.resolution else trained
    check_drawable(model, size, None, f"--resolution {options.resolution}")
    section = data_section(config, options)
    dataset = build_dataset(section, options)
    if key not in layout_builders(dataset):
        known = ", ".join(layout_builders(dataset)) or "none"
        raise ValueError(f"the data set makes no layouts {key} (it makes {known}): name another, data=...")
    each = options.n_samples_per_layout
    count = len(dataset) if options.num_layouts is None else min(options.num_layouts, len(dataset))
    if min(count, options.batch_size, each) < 1:
        raise ValueError("--num_layouts, --n_samples_per_layout and --batch_size must be at least 1")
    note |= {"resolution": f"{size[0]}x{size[1]}", "layout": options.layout}
    note |= data_note(section, options.split)
    paths = [options.outdir / "samples" / f"{i:06d}_{j:03d}.png" for i in range(count) for j in range(each)]
    batches = own_batches(len(paths), options.batch_size, lambda p: is_drawn(paths[p], note))
    there = sum(map(is_whole, paths))
    say(f"{each} samples of {count} layouts in {options.outdir}, {there} of {len(paths)} there already")
    with TokenBar(sum(map(len, batches))) as bar:
        for numbers in batches:
            layouts, images = draw(model, dataset, key, numbers, size, options, bar)
            for p, layout, image in zip(numbers, layouts, images, strict=True):
                if p % each == 0:
                    save_png(layout, options.outdir / "layouts" / f"{p // each:06d}.png", text=note)
                save_png(image, paths[p], text=note)
    if options.sheets and share()[0] == 0:
        wait_for(paths)
        for i in range(count):
            write_sheet(options.outdir, f"{i:06d}", paths[i * each : (i + 1) * each])


def layout_key(model: Net2NetTransformer, wanted: str | None) -> str:
    """The entry of the batch that holds the layout."""
    if len(model.cond_keys) != 1 or wanted not in (None, *model.cond_keys):
        raise ValueError(
            f"the model is conditioned on {', '.join(model.cond_keys)}, not on {wanted or 'a layout alone'}: "
            "scripts/make_samples.py draws for any conditions"
        )
    return model.cond_keys[0]


@torch.no_grad()
def draw(
    model: Net2NetTransformer, dataset: torch.utils.data.Dataset, key: str, numbers: list[int],
    size: tuple[int, int], options: argparse.Namespace, bar: TokenBar,
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) of layouts and samples; number p is sample p % N of layout p // N."""
    each = options.n_samples_per_layout
    items, samples = [p // each for p in numbers], [p % each for p in numbers]
    layouts = model.get_input(batch_of(dataset, items), key).to(model.device)  # (B, M)
    shape = model.latent_shape(*size)
    bar.next_batch(len(numbers), shape[0] * shape[1])
    keys = [i | j << SAMPLE_BITS for i, j in zip(items, samples, strict=True)]
    how = {"options": sampling_options(options), "callback": bar}
    how["generator"] = image_generators(options.seed, keys)
    if shape != model.latent_shape() and options.layout == "window":
        codes = sample_layouts(model, layout_builders(dataset)[key], layouts, size, **how)
    else:
        codes = model.sample_codes(model.encode_conditions(layouts), size=size, **how)
    pictures = unwrapped(dataset).plot_conditionals(key, layouts.cpu(), size[::-1])
    return pictures, decode(model, codes)


def write_sheet(folder: Path, name: str, samples: list[Path]) -> None:
    """A layout and its samples, side by side."""
    files = [folder / "layouts" / f"{name}.png", *samples]
    pictures = torch.stack([torch.from_numpy(from_uint8(read_image(file))) for file in files])
    save_png(image_grid(pictures.permute(0, 3, 1, 2), len(files)), folder / "sheets" / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
