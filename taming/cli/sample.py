"""Generate images: with a transformer, of classes or without a condition; or of noise, with a VAE or a GAN.

    taming sample -r logs/RUN -n 64 --top-k 100 --grid

Sample i of a seed is the same image in any batch. Samples that are in the folder already are kept.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from taming.checkpoint import find_checkpoint
from taming.cli.options import (
    add_batch_size,
    add_outdir,
    add_sampling_options,
    check_folder,
    check_png,
    path,
    sampling_options,
)
from taming.images import image_grid, is_complete_png, load_png
from taming.inference import distributed
from taming.inference.completion import count_codes
from taming.inference.distributed import TokenBar, own_batches
from taming.inference.loading import decode, load_generator
from taming.inference.provenance import is_generated, run_directory, save_image
from taming.models.base import LatentGenerator
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import class_numbers, conditions_of
from taming.sampling import SamplingOptions, image_generators
from taming.training.console import rank_zero_print
from taming.util import number

MOST_ON_SHEET = 400  # samples; more would be too small to look at, and take gigabytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_sampling_options(parser, "sample")
    add_outdir(parser, "folder for the samples; default: RUN/samples/<settings>")
    add = parser.add_argument
    add("-n", "--num-samples", type=number(int, 1), default=64, help="how many, over all classes together")
    add_batch_size(parser, 25)
    add("--classes", help="class numbers, 3,7,12 for instance, that the samples take in turn; default: all "
        "classes of the model")
    add("--grid", nargs="?", const=True, type=path, metavar="FILE", help="also write one sheet, the images "
        "of a class side by side; without a name it is OUTDIR/grid.png")


def run(options: argparse.Namespace) -> None:
    """Load, generate what is missing, save, and write the sheet."""
    file, sampling = find_checkpoint(options.run), sampling_options(options)
    model, _, metadata = load_generator(file, sampling, device=options.device)
    named = None if options.classes == "imagenet" else options.classes  # the default of 2021
    classes = classes_of(model, named)
    folder = check_folder(options.outdir or default_folder(file, metadata, named))
    grid = folder / "grid.png" if options.grid is True else options.grid
    if grid is not None:
        check_png(grid, f"--grid {grid}")
    labels = [{"class": str(number)} for number in classes or []] or [{}]
    metadatas = [metadata | labels[i % len(labels)] for i in range(options.num_samples)]
    paths = [folder / f"sample_{i:06d}.png" for i in range(options.num_samples)]
    batches = own_batches(len(paths), options.batch_size, lambda i: is_generated(paths[i], metadatas[i]))
    there = sum(map(is_complete_png, paths))
    rank_zero_print(f"{len(paths)} samples in {folder}, {there} of them there already")
    with TokenBar(sum(map(len, batches))) as bar:
        for numbers in batches:
            chosen = classes and [classes[i % len(classes)] for i in numbers]
            images = generate(model, chosen, image_generators(options.seed, numbers), sampling, bar)
            for i, image in zip(numbers, images, strict=True):
                save_image(image, paths[i], metadatas[i])
    if grid is not None and distributed.rank_and_world_size()[0] == 0:
        distributed.wait_for(paths[:MOST_ON_SHEET])
        print(f"sheet: {write_sheet(paths[:MOST_ON_SHEET], len(labels), grid)}")


def classes_of(model: Net2NetTransformer | LatentGenerator, named: str | None) -> list[int] | None:
    """Return the classes that the samples take in turn, or None.

    Raises:
        ValueError: classes that the model does not have, or other conditions that it needs.
    """
    if isinstance(model, LatentGenerator):
        if named is not None:
            raise ValueError(f"--classes {named}: {type(model).__name__} has no condition; leave it out")
        return None
    classes = class_numbers(named, model)
    conditions_of(model, len(classes or [0]), given={"class": classes})
    return classes


def generate(
    model: Net2NetTransformer | LatentGenerator, classes: list[int] | None,
    generators: list[torch.Generator], sampling: SamplingOptions, bar: TokenBar,
) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1], on the CPU, each with a generator of its own."""
    count = len(generators)
    if isinstance(model, LatentGenerator):
        bar.next_batch(count, 1)
        samples = []
        for generator in generators:
            samples.append(model.sample(1, generator))
            bar.update(1)
        return torch.cat(samples).float().clamp(-1.0, 1.0).cpu()
    bar.next_batch(count, count_codes(model, model.first_stage_model.image_size))
    conditions = conditions_of(model, count, given={"class": classes})
    return decode(model, model.sample_codes(conditions, sampling, callback=bar, generator=generators))


def default_folder(file: Path, metadata: dict[str, str], classes: str | None) -> Path:
    """Return RUN/samples/<settings>/<step> of the run of a checkpoint, as in 2021."""
    usual = ("seed", "top_k", "top_p", "temperature")
    named: dict[str, str] = {name: metadata[name] for name in usual if name in metadata}
    defaults = {
        "min_p": "None", "guidance": "1.0", "guidance_schedule": "constant", "guidance_power": "4.0",
        "guidance_interval": "None", "precision": "32",
    }
    named |= {
        name: metadata[name] for name, default in defaults.items() if metadata.get(name, default) != default
    }
    named |= {"classes": classes.replace(",", "-")[:80]} if classes else {}
    settings = "_".join(f"{key}_{value.strip('()').replace(', ', '-')}" for key, value in named.items())
    return run_directory(file) / "samples" / settings / metadata["step"]


def write_sheet(paths: list[Path], n_classes: int, file: Path) -> Path:
    """Write all samples to one sheet; if each class has equally many, those of a class are side by side."""
    columns = None
    if 1 < n_classes < len(paths) and len(paths) % n_classes == 0:
        each = len(paths) // n_classes
        columns = each * max(1, round(math.sqrt(len(paths)) / each))  # whole classes, about as wide as high
        paths = [path for i in range(n_classes) for path in paths[i::n_classes]]
    return save_image(image_grid(torch.stack([load_png(path) for path in paths]), columns), file)
