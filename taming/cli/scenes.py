"""Generate images for layouts of objects or joints, at any resolution.

    taming scenes -r logs/RUN -o out -n 8 -N 4 --resolution 64x256

Writes an image of each layout, of boxes, points or joints, and samples. The data set is that of the run;
other configurations (-b) and data.sub=value words are merged over it, and --ignore-base-data leaves the run's
out. Sample j of layout i is the same image in any batch.

Images larger than in training are generated through a window of the training size. As in 2021, the layout
that the window is given is that of what it shows: objects outside of it are left out, and boxes are moved and
cut; or, where the layout of the whole image says which part is shown (encode_crop), that part becomes the
window. With --layout whole the window is always given the whole layout.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from taming.cli.dataset_options import add_data_options, load_dataset
from taming.cli.options import (
    add_sampling_options,
    check_folder,
    one_of,
    sampling_options,
    size,
)
from taming.data.sampler import SeededDataset
from taming.images import image_grid, is_complete_png, load_png
from taming.inference import distributed
from taming.inference.completion import check_size, count_codes
from taming.inference.dataset import batch_of, layout_builders, unwrapped
from taming.inference.distributed import TokenBar, own_batches
from taming.inference.layouts import sample_layouts
from taming.inference.loading import decode, load_transformer
from taming.inference.provenance import is_generated, save_image
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import image_generators
from taming.training.console import rank_zero_print
from taming.util import number

SAMPLE_BITS = 24  # of an image's number: the layout's; above them, the sample's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_sampling_options(parser, "scenes")
    add_data_options(parser)
    add = parser.add_argument
    add("-n", "--num-layouts", type=number(int, 1), help="layouts, from the first item; default: all")
    add("-N", "--n-samples-per-layout", type=number(int, 1), default=4, help="images of each")
    add("-R", "--resolution", type=size, metavar="HEIGHTxWIDTH", help="in pixels; default: the training size")
    add("-C", "--conditional", metavar="KEY", help="the layout's key, as in 2021; default: the model's")
    add("--layout", default="window", help="what the window is given: its part of the layout, or the whole",
        **one_of("window", "whole"))
    add("--sheets", action="store_true", help="also write one sheet for each layout, with all its samples")


def run(options: argparse.Namespace) -> None:
    """Load the model and its layouts, generate what is missing, save."""
    outdir = check_folder(options.outdir)
    sampling = sampling_options(options)
    model, config, metadata = load_transformer(options.run, sampling, device=options.device)
    key = layout_key(model, options.conditional)
    size = options.resolution or model.first_stage_model.image_size
    resolution = f"{size[0]}x{size[1]}"
    check_size(model, size, None, f"--resolution {resolution}")
    dataset, of_data = load_dataset(config, options)
    if key not in layout_builders(dataset):
        known = ", ".join(layout_builders(dataset)) or "none"
        raise ValueError(f"the data set makes no layouts {key} (it makes {known}): name another, data=...")
    each = options.n_samples_per_layout
    count = len(dataset) if options.num_layouts is None else min(options.num_layouts, len(dataset))
    metadata |= {"resolution": resolution, "layout": options.layout, **of_data}
    paths = [outdir / "samples" / f"{i:06d}_{j:03d}.png" for i in range(count) for j in range(each)]
    batches = own_batches(len(paths), options.batch_size, lambda p: is_generated(paths[p], metadata))
    there = sum(map(is_complete_png, paths))
    rank_zero_print(f"{each} samples of {count} layouts in {outdir}, {there} of {len(paths)} there already")
    with TokenBar(sum(map(len, batches))) as bar:
        for numbers in batches:
            layouts, images = generate(model, dataset, key, numbers, size, options, bar)
            for p, layout, image in zip(numbers, layouts, images, strict=True):
                if p % each == 0:
                    save_image(layout, outdir / "layouts" / f"{p // each:06d}.png", metadata)
                save_image(image, paths[p], metadata)
    if options.sheets and distributed.rank_and_world_size()[0] == 0:
        distributed.wait_for(paths)
        for i in range(count):
            write_sheet(outdir, f"{i:06d}", paths[i * each : (i + 1) * each])


def layout_key(model: Net2NetTransformer, wanted: str | None) -> str:
    """Return the entry of the batch that holds the layout."""
    if len(model.cond_keys) != 1 or wanted not in (None, *model.cond_keys):
        raise ValueError(
            f"the model is conditioned on {', '.join(model.cond_keys)}, not on {wanted or 'a layout alone'}: "
            "`taming sample-dataset` generates images for any conditions"
        )
    return model.cond_keys[0]


@torch.no_grad()
def generate(
    model: Net2NetTransformer, dataset: SeededDataset, key: str, numbers: list[int],
    size: tuple[int, int], options: argparse.Namespace, bar: TokenBar,
) -> tuple[Tensor, Tensor]:
    """Return images (B, 3, H, W) of layouts and samples; number p is sample p % N of layout p // N."""
    each = options.n_samples_per_layout
    items, samples = [p // each for p in numbers], [p % each for p in numbers]
    layouts = model.get_input(batch_of(dataset, items), key).to(model.device)  # (B, M)
    shape = model.latent_shape(*size)
    bar.next_batch(len(numbers), count_codes(model, size))
    keys = [i | j << SAMPLE_BITS for i, j in zip(items, samples, strict=True)]
    how, generators = sampling_options(options), image_generators(options.seed, keys)
    if shape != model.latent_shape() and options.layout == "window":
        builder = layout_builders(dataset)[key]
        codes = sample_layouts(model, builder, layouts, size, how, generator=generators, callback=bar)
    else:
        c = model.encode_conditions(layouts)
        codes = model.sample_codes(c, how, size=size, generator=generators, callback=bar)
    return unwrapped(dataset).plot_conditionals(key, layouts.cpu(), size[::-1]), decode(model, codes)


def write_sheet(folder: Path, name: str, samples: list[Path]) -> None:
    """Write a layout and its samples, side by side."""
    images = torch.stack([load_png(file) for file in (folder / "layouts" / f"{name}.png", *samples)])
    save_image(image_grid(images, len(images)), folder / "sheets" / f"{name}.png")
