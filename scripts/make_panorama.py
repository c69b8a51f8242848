#!/usr/bin/env python
"""Draw one large picture: python scripts/make_panorama.py -r logs/RUN --size 64x256 --seed 1

For transformers without a condition, with classes, coordinates or label maps, and for several of these at
once: what is not given is left out where the model has learnt to do without. With --complete a picture is
completed. Drawn through a window of the training size; the same run, size and seed give the same picture.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from taming.cli.options import Parser, add_options, read_size, sampling_options
from taming.cli.outputs import check_png
from taming.data.base import ImagePaths
from taming.data.files.label_files import read_labels, resized_labels
from taming.images import save_png
from taming.inference.conditions import (
    Size,
    check_drawable,
    class_numbers,
    conditions_of,
    kept_codes,
)
from taming.inference.decoding import decode
from taming.inference.distributed import TokenBar, share
from taming.inference.loading import load_transformer
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import condition_shapes
from taming.sampling import image_generators
from taming.util import exit_status


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("panorama.png"), help="the PNG; default: panorama.png")
    add("--size", help="HEIGHTxWIDTH in pixels, to which files are resized; default: that of the label map "
        "or of the picture to complete, else the training height, 4 times as wide")
    add("--class", dest="label", help="class number; default: 0 where the model has classes and nothing else")
    add("--segmentation", type=Path, metavar="FILE", help="label map: a PNG of one channel, whose pixels are "
        "label numbers, or a picture in the model's palette")
    add("--complete", type=Path, metavar="FILE", help="picture whose upper part stays; the rest is drawn")
    add("--known", type=float, metavar="SHARE", help="share of its rows that stays; default: 0.5")
    add("--mask", type=Path, metavar="FILE", help="picture of its shape: what is white in it is drawn anew, "
        "the rest stays")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load, draw, save: one picture, by the first process."""
    if share()[0] != 0:
        return
    check_png(options.out, "--out")
    model, _, note = load_transformer(
        options.resume, sampling_options(options), device=options.device, allow=options.allow
    )
    picture, labels, size = inputs(model, options)
    usual = 0.0 if options.mask else 0.5
    share_known = usual if options.known is None else options.known
    kept = None if picture is None else kept_codes(model, size, share_known, options.mask)
    check_drawable(model, size, kept, f"--size {options.size}" if options.size else "the picture")
    parts = conditions_of(
        model, 1, size, {"class": class_of(model, options.label), "label_map": labels}
    )
    known = None if kept is None else model.encode_to_z(picture)[1].view(1, *model.latent_shape(*size))
    with TokenBar(1) as bar:
        bar.next_batch(1, math.prod(model.latent_shape(*size)) if kept is None else int((~kept).sum()))
        codes = model.sample_codes(
            parts, size=size, known=known, mask=kept, callback=bar, options=sampling_options(options),
            generator=image_generators(options.seed, [0]),
        )
    note |= {"label": str(options.label), "size": f"{size[0]}x{size[1]}"}
    files = {name: getattr(options, name) for name in ("segmentation", "complete", "mask")}
    note |= {name: file.name for name, file in files.items() if file} | {"known": str(share_known)}
    save_png(decode(model, codes)[0], options.out, text=note)
    print(f"{size[1]}x{size[0]} pixels: {options.out}")


def inputs(
    model: Net2NetTransformer, options: argparse.Namespace
) -> tuple[Tensor | None, Tensor | None, Size]:
    """The picture to complete (1, 3, H, W) and the label map (h, w), None where not given, and (H, W)."""
    size = read_size(options.size) if options.size else None
    side, width = model.first_stage_model.image_size
    picture = labels = None
    if options.complete is not None:
        pixels = ImagePaths([options.complete], size).preprocess_image(options.complete)
        picture = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.device)
    elif options.known is not None or options.mask is not None:
        raise ValueError("--known and --mask say what stays of a picture: name it with --complete")
    if options.segmentation is not None:
        kinds = [stage.kind for stage in model.cond_stages]
        number = kinds.index("label_map") if "label_map" in kinds else None
        if number is None:
            raise ValueError("--segmentation: the model is not conditioned on label maps; leave it out")
        labels = read_labels(options.segmentation, model.cond_stages[number])
        if size is not None:
            labels = resized_labels(labels, condition_shapes(model, size)[number])
    if picture is not None:
        size = tuple(picture.shape[2:])
    elif labels is not None and size is None:
        own = model.cond_sizes[number]
        size = labels.shape[0] * side // own[0], labels.shape[1] * width // own[1]
    return picture, labels, size or (side, 4 * width)


def class_of(model: Net2NetTransformer, label: str | None) -> list[int] | None:
    """The class of one picture; none where it is left out beside other conditions."""
    if label is None and len(model.cond_stages) > 1:
        return None
    numbers = class_numbers(label, model, "--class")
    if label is not None and len(numbers) != 1:
        raise ValueError(f"--class {label}: give one class number")
    return numbers and numbers[:1]


if __name__ == "__main__":
    sys.exit(main())
