#!/usr/bin/env python
"""Draw one large picture: python scripts/make_panorama.py -r logs/RUN --size 64x256 --seed 1

For transformers without a condition, with classes or with coordinates. The picture is drawn through a window
of the training size; the same run, size and seed give the same picture.
"""

import argparse
import math
import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from scripts.sample_fast import class_numbers, condition
from taming.checkpoint import find_checkpoint, load_model
from taming.images import save_png
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.misc.coord import CoordStage, whole_picture
from taming.sampling import image_generators
from taming.util import exit_status, pick_device


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-r", "--resume", required=True, help="run directory, checkpoint or exported folder")
    add("-o", "--out", type=Path, default=Path("panorama.png"), help="the PNG; default: panorama.png")
    add("--size", help="HEIGHTxWIDTH in pixels; default: the training height, 4 times as wide")
    add("--class", dest="label", help="class number; default: 0 where the model has classes")
    add("--seed", type=int, default=0, help="another seed, another picture; default: 0")
    add("--stride", type=int, default=1, help="codes drawn before the window moves; more is faster")
    add("-k", "--top_k", type=int, help="draw among the k likeliest codes; default: all")
    add("-t", "--temperature", type=float, default=1.0, help="below 1 for likelier pictures; default: 1.0")
    add("-p", "--top_p", type=float, help="draw among the likeliest codes of total probability p; default: 1")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load, draw, save."""
    file = find_checkpoint(options.resume)
    model, _, step = load_model(file, device=pick_device(options.device))
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{file} is a {type(model).__name__}: give a run of stage 2, a transformer")
    side = model.first_stage_model.resolution
    size = read_size(options.size) if options.size else (side, 4 * side)
    c = condition_for(model, options.label, size)
    with tqdm(total=math.prod(model.latent_shape(*size)), unit="token", unit_scale=True) as bar:
        image = model.generate(
            c, size=size, stride=options.stride, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, generator=image_generators(options.seed, [0]),
            callback=lambda *_: bar.update(),
        )[0]
    names = ("seed", "label", "stride", "top_k", "top_p", "temperature")
    note = {name: str(getattr(options, name)) for name in names}
    save_png(image, options.out, text=note | {"checkpoint": file.name, "step": str(step)})
    print(f"{size[1]}x{size[0]} pixels: {options.out}")


def read_size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH, in pixels."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--size {text}: give HEIGHTxWIDTH in pixels, 64x256 for instance")
    return int(parts[0]), int(parts[1])


def condition_for(model: Net2NetTransformer, label: str | None, size: tuple[int, int]) -> Tensor:
    """Condition of one picture of that size: tokens (1, M), or codes (1, h, w) of its coordinates."""
    if isinstance(model.cond_stage_model, CoordStage):
        tokens = model.encode_to_c(whole_picture(*size).to(model.device))[1]
        return tokens.view(1, -1, size[1] // model.cond_stage_model.down_factor)
    classes = class_numbers("imagenet" if label is None else label, model)
    return condition(model, classes, [0])


if __name__ == "__main__":
    sys.exit(main())
