"""Generate images for the conditions of a data set, or complete its images.

    taming sample-dataset -r logs/RUN -o out -n 16

Writes originals, reconstructions, conditions (where they have an appearance) and samples, one PNG of each for
every item. The data set is that of the run; other configurations (-b) and data.sub=value words are merged
over it, and --ignore-base-data leaves the run's out. Sample i of a seed is the same image in any batch.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.cli.dataset_options import add_data_options, load_dataset
from taming.cli.options import (
    add_sampling_options,
    check_folder,
    path,
    sampling_options,
)
from taming.data.sampler import SeededDataset
from taming.images import is_complete_png
from taming.inference.completion import (
    check_conditions,
    check_size,
    count_codes,
    keep_pixels,
    kept_codes,
    mask_metadata,
)
from taming.inference.dataset import batch_of, condition_images
from taming.inference.distributed import TokenBar, own_batches
from taming.inference.loading import decode, load_transformer
from taming.inference.provenance import is_generated, save_image
from taming.models.cond_transformer import Net2NetTransformer
from taming.sampling import image_generators
from taming.training.console import rank_zero_print
from taming.util import number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_sampling_options(parser, "sample-dataset")
    add_data_options(parser)
    add = parser.add_argument
    add("-n", "--num-samples", type=number(int, 1), help="items, from the first; default: all")
    add("--scale", type=number(float, 0, above=True), default=1.0, help="enlarge image and condition by this "
        "factor")
    add("--known", type=float, default=0.0, metavar="SHARE", help="share of the rows, 0 to 1, from the top, "
        "that is taken from the original; the rest is generated")
    add("--mask", type=path, metavar="FILE", help="image of the originals' shape: what is white in it is "
        "generated in each of them, the rest is taken from the original")


def run(options: argparse.Namespace) -> None:
    """Load the model and its data, generate what is missing, save."""
    outdir = check_folder(options.outdir)
    sampling = sampling_options(options)
    model, config, metadata = load_transformer(options.run, sampling, device=options.device)
    dataset, of_data = load_dataset(config, options)
    count = len(dataset) if options.num_samples is None else min(options.num_samples, len(dataset))
    metadata |= {"scale": str(options.scale), "known": str(options.known), **mask_metadata(options.mask)}
    metadata |= of_data
    paths = [outdir / "samples" / f"{i:06d}.png" for i in range(count)]
    batches = own_batches(count, options.batch_size, lambda i: is_generated(paths[i], metadata))
    there = sum(map(is_complete_png, paths))
    rank_zero_print(f"{count} items of {options.split} in {outdir}, {there} of them there already")
    with TokenBar(sum(map(len, batches))) as bar:
        for numbers in batches:
            for kind, images in generate(model, dataset, numbers, options, bar).items():
                for i, image in zip(numbers, images, strict=True):
                    save_image(image, outdir / kind / f"{i:06d}.png", metadata)


@torch.no_grad()
def generate(
    model: Net2NetTransformer, dataset: SeededDataset, numbers: list[int], options: argparse.Namespace,
    bar: TokenBar,
) -> dict[str, list[Tensor]]:
    """Return images (C, H, W) of each kind for these items; samples last, which say that an item is done."""
    x, c = model.get_xc(batch_of(dataset, numbers))
    x, c = enlarged(model, x.to(model.device), [c] if torch.is_tensor(c) else c, options.scale)
    size = x.shape[2], x.shape[3]
    kept = kept_codes(model, size, options.known, options.mask)
    check_size(model, size, kept, f"items {numbers[0]}..{numbers[-1]} at --scale {options.scale:g}")
    check_conditions(model, c, size)
    codes = model.encode_codes(x)  # (B, h, w), or a list of grids
    bar.next_batch(len(numbers), count_codes(model, size, kept))
    sampled = model.sample_codes(
        model.encode_conditions(c), sampling_options(options), size=size, mask=kept, callback=bar,
        known=None if kept is None else codes, generator=image_generators(options.seed, numbers),
    )
    originals, samples = x.clamp(-1.0, 1.0).cpu(), decode(model, sampled)
    if kept is not None:
        samples = keep_pixels(samples, originals, kept, model.first_stage_model.factor)
    images = {"originals": list(originals), "reconstructions": list(decode(model, codes))}
    for key, appearance in condition_images(model, dataset, c, x).items():
        images["conditions" if len(model.cond_keys) == 1 else f"conditions_{key}"] = appearance
    return images | {"samples": list(samples)}


def enlarged(
    model: Net2NetTransformer, x: Tensor, c: Sequence[Tensor], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Return images (B, C, H, W) at another scale, to the nearest multiple of f, and their conditions.

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
