#!/usr/bin/env python
"""Draw pictures from a trained transformer: python scripts/sample_fast.py -r logs/RUN -n 64 --grid

Sample i of a seed is the same picture in any batch. What is in the folder already is not drawn again.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from taming.checkpoint import find_checkpoint, load_model
from taming.data.base import read_image
from taming.images import from_uint8, image_grid, save_png
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.misc.coord import CoordStage, whole_picture
from taming.modules.util import Labelator
from taming.sampling import image_generators
from taming.util import exit_status, pick_device

MOST_ON_SHEET = 400  # samples; more would be too small to look at, and take gigabytes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-r", "--resume", required=True, help="run directory, checkpoint or exported folder of a transformer")
    add("-o", "--outdir", type=Path, help="folder for the samples; default: RUN/samples/<settings>")
    add("-n", "--num_samples", type=int, default=64, help="how many, over all classes together; default: 64")
    add("--batch_size", type=int, default=25, help="how many at once; changes the speed alone; default: 25")
    add("-k", "--top_k", type=int, help="draw among the k likeliest codes; default: all (in 2021: 250)")
    add("-t", "--temperature", type=float, default=1.0, help="below 1 for likelier pictures; default: 1.0")
    add("-p", "--top_p", type=float, help="draw among the likeliest codes of total probability p; default: 1")
    add("--classes", default="imagenet", help="class numbers, 3,7,12 for instance, taken in turn by the "
        "samples; default: all of the model (which imagenet, the default of 2021, means as well)")
    add("--seed", type=int, default=0, help="another seed, other pictures; default: 0")
    add("--grid", nargs="?", const="", metavar="FILE", help="also write one sheet, the pictures of a class "
        "side by side; without a name OUTDIR/grid.png")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load, draw what is missing, save, and write the sheet."""
    if min(options.num_samples, options.batch_size) < 1:
        raise ValueError("--num_samples and --batch_size must be at least 1")
    file = find_checkpoint(options.resume)
    model, _, step = load_model(file, device=pick_device(options.device))
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"{file} is a {type(model).__name__}: give a run of stage 2, a transformer")
    classes = class_numbers(options.classes, model)
    condition(model, classes, range(len(classes or [0])))  # wrong classes show before anything is written
    note = {name: str(getattr(options, name)) for name in ("seed", "top_k", "top_p", "temperature")}
    folder = options.outdir or default_folder(file, step, note, options.classes)
    note |= {"checkpoint": file.name, "step": str(step)}
    labels = [{"class": str(number)} for number in classes or []] or [{}]
    notes = [note | labels[i % len(labels)] for i in range(options.num_samples)]
    paths = [folder / f"sample_{i:06d}.png" for i in range(options.num_samples)]
    todo = [i for i, path in enumerate(paths) if not is_drawn(path, notes[i])]
    print(f"{len(paths)} samples in {folder}, {len(paths) - len(todo)} of them there already")
    with tqdm(total=len(todo) * math.prod(model.latent_shape()), unit="token", unit_scale=True) as bar:
        for start in range(0, len(todo), options.batch_size):
            numbers = todo[start:start + options.batch_size]
            images = model.generate(
                condition(model, classes, numbers), temperature=options.temperature, top_k=options.top_k,
                top_p=options.top_p, generator=image_generators(options.seed, numbers),
                callback=lambda _, codes: bar.update(len(codes)),
            )
            for i, image in zip(numbers, images, strict=True):
                save_png(image, paths[i], text=notes[i])
    if options.grid is not None:
        sheet = write_sheet(paths[:MOST_ON_SHEET], len(labels), Path(options.grid or folder / "grid.png"))
        print(f"sheet: {sheet}")


def class_numbers(text: str, model: Net2NetTransformer) -> list[int] | None:
    """The classes to go through; None where the model has none."""
    conditional = isinstance(model.cond_stage_model, Labelator)
    if text == "imagenet":
        return list(range(model.cond_stage_model.n_classes)) if conditional else None
    if not conditional:
        raise ValueError(f"--classes {text}: the model is not conditioned on classes; leave it out")
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"--classes {text}: give class numbers with commas between them, 3,7,12")
    return [int(part) for part in text.split(",")]


def condition(model: Net2NetTransformer, classes: list[int] | None, numbers: list[int] | range) -> Tensor:
    """Condition tokens (B, M) of the samples with these numbers."""
    if model.be_unconditional:
        c = torch.zeros(len(numbers), 1)  # only its length matters
    elif classes:
        c = torch.tensor([classes[i % len(classes)] for i in numbers])
    elif isinstance(model.cond_stage_model, CoordStage):
        c = whole_picture(*[model.first_stage_model.resolution] * 2).repeat(len(numbers), 1, 1, 1)
    else:
        raise ValueError(f"the model is conditioned on {model.cond_stage_key}, which is not to be had here: "
                         "this command samples without a condition, with classes or with coordinates")
    return model.encode_to_c(c.to(model.device))[1]


def default_folder(file: Path, step: int, settings: dict[str, str], classes: str) -> Path:
    """RUN/samples/<settings>, one folder for each step of training, as in 2021."""
    run = file.parent.parent if file.parent.name == "checkpoints" else file.parent
    settings = settings | ({"classes": classes.replace(",", "-")[:80]} if classes != "imagenet" else {})
    return run / "samples" / "_".join(f"{key}_{value}" for key, value in settings.items()) / str(step)


def is_drawn(path: Path, note: dict[str, str]) -> bool:
    """Whether that very sample is there; another one in its place is an error, not overwritten."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        other = [f"{k} {image.info.get(k)}" for k in (*note, "class") if image.info.get(k) != note.get(k)]
    if other:
        raise ValueError(f"{path} was drawn with {', '.join(other)}: delete it, or choose another --outdir")
    return True


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
