#!/usr/bin/env python
"""Draw pictures for the conditions of a data set: python scripts/make_samples.py -r logs/RUN -o out -n 16

Writes originals, reconstructions, conditions (where they can be drawn) and samples, one PNG of each per item.
The data set is that of the run; other YAML files (-b) and data.sub=value words are merged over it, and
--ignore_base_data leaves the run's out. Sample i of a seed is the same picture in any batch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.cli.options import Parser, add_data_options, add_options, sampling_options
from taming.cli.outputs import check_folder
from taming.data.sampler import SeededDataset
from taming.images import save_png
from taming.inference.conditions import (
    check_conditions,
    check_drawable,
    kept_codes,
)
from taming.inference.dataset import batch_of, build_dataset, condition_pictures, data_section
from taming.inference.decoding import decode
from taming.inference.distributed import TokenBar, is_drawn, is_whole, own_batches, say
from taming.inference.loading import load_transformer
from taming.inference.provenance import data_note, mask_note
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import image_generators
from taming.util import exit_status, number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_options(parser)
    add_data_options(parser)
    add = parser.add_argument
    add("-n", "--num_samples", type=int, help="how many items, from the first; default: all")
    add("--scale", type=number(float, 0, above=True), default=1.0, help="enlarge picture and condition by "
        "this factor; default: 1")
    add("--known", type=float, default=0.0, metavar="SHARE", help="share of the rows, from the top, that is "
        "taken from the original; the rest is completed; default: 0")
    add("--mask", type=Path, metavar="FILE", help="picture of the originals' shape: what is white in it is "
        "drawn anew in each of them, the rest is taken from the original")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load the model and its data, draw what is missing, save."""
    check_folder(options.outdir)
    model, config, note = load_transformer(
        options.resume, sampling_options(options), device=options.device, allow=options.allow
    )
    section = data_section(config, options)
    dataset = build_dataset(section, options)
    count = len(dataset) if options.num_samples is None else min(options.num_samples, len(dataset))
    if min(count, options.batch_size) < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    note |= {"scale": str(options.scale), "known": str(options.known), **mask_note(options.mask)}
    note |= data_note(section, options.split)
    samples = [options.outdir / "samples" / f"{i:06d}.png" for i in range(count)]
    batches = own_batches(count, options.batch_size, lambda i: is_drawn(samples[i], note))
    there = sum(map(is_whole, samples))
    say(f"{count} items of {options.split} in {options.outdir}, {there} of them there already")
    with TokenBar(sum(map(len, batches))) as bar:
        for numbers in batches:
            for kind, images in draw(model, dataset, numbers, options, bar).items():
                for i, image in zip(numbers, images, strict=True):
                    save_png(image, options.outdir / kind / f"{i:06d}.png", text=note)


@torch.no_grad()
def draw(
    model: Net2NetTransformer, dataset: SeededDataset, numbers: list[int], options: argparse.Namespace,
    bar: TokenBar,
) -> dict[str, Sequence[Tensor]]:
    """Pictures (C, H, W) of each kind for these items; samples last, which say that an item is done."""
    x, c = model.get_xc(batch_of(dataset, numbers))
    x, c = enlarged(model, x.to(model.device), [c] if torch.is_tensor(c) else c, options.scale)
    size = tuple(x.shape[2:])
    kept = kept_codes(model, size, options.known, options.mask)
    check_drawable(model, size, kept, f"items {numbers[0]}..{numbers[-1]} at --scale {options.scale:g}")
    check_conditions(model, c, size)
    _, z = model.encode_to_z(x)
    codes = model.permuter(z, reverse=True).view(-1, *model.latent_shape(*size))
    bar.next_batch(len(numbers), codes[0].numel() if kept is None else int((~kept).sum()))
    drawn = model.sample_codes(
        model.encode_conditions(c), size=size, known=None if kept is None else codes, mask=kept, callback=bar,
        generator=image_generators(options.seed, numbers), options=sampling_options(options),
    )
    pictures = {"originals": x.clamp(-1.0, 1.0).cpu(), "reconstructions": decode(model, codes)}
    for key, images in condition_pictures(model, dataset, c, x).items():
        pictures["conditions" if len(model.cond_keys) == 1 else f"conditions_{key}"] = images
    return pictures | {"samples": decode(model, drawn)}


def enlarged(
    model: Net2NetTransformer, x: Tensor, c: Sequence[Tensor], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Images (B, C, H, W) at another scale, to the nearest multiple of f, and their conditions.

    Labels and layouts keep their values.
    """
    c = [value.to(model.device) for value in c]
    if scale == 1.0:
        return x, c
    f = model.first_stage_model.factor
    size = tuple(max(1, round(side * scale / f)) * f for side in x.shape[2:])

    def beside(value: Tensor) -> tuple[int, int]:
        return tuple(n * new // old for n, new, old in zip(value.shape[2:], size, x.shape[2:], strict=True))

    pairs = zip(c, model.cond_stages, strict=True)
    larger = [value if value.ndim != 4 else stage.resize(value, beside(value)) for value, stage in pairs]
    return F.interpolate(x, size, mode="bicubic", antialias=True).clamp(-1.0, 1.0), larger


if __name__ == "__main__":
    sys.exit(main())
