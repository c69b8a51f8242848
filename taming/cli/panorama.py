"""Generate one large image, or complete one.

    taming panorama -r logs/RUN --size 64x256 --seed 1
    taming panorama -r logs/RUN --complete photo.png --mask mask.png

For transformers without a condition, with classes, coordinates or label maps, and for several of these at
once; a condition that is not given is left out if the model was trained to do without. The image is generated
through a window of the training size. With --complete the pixels of an image stay where nothing is to be
generated. The same run, size and seed give the same image.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from taming.cli.options import add_outdir, add_sampling_options, path, png_file, sampling_options, size
from taming.data.base import ImagePaths
from taming.data.files.label_files import read_labels, resized_labels
from taming.inference.completion import check_size, count_codes, keep_pixels, kept_codes
from taming.inference.distributed import TokenBar, rank_and_world_size
from taming.inference.loading import decode, load_transformer
from taming.inference.provenance import save_image
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import Size, class_numbers, condition_shapes, conditions_of
from taming.sampling import image_generators


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_sampling_options(parser, "panorama")
    add_outdir(parser, "the PNG file to write, or a folder for it; default: panorama.png, or the next name "
               "that is free", metavar="PATH")
    add = parser.add_argument
    add("--size", type=size, metavar="HEIGHTxWIDTH", help="in pixels; files are resized to it; default: "
        "that of the label map or of the image to complete, else the training height, 4 times as wide")
    add("--classes", help="one class number; default: 0 where the model has classes and nothing else")
    add("--segmentation", type=path, metavar="FILE", help="label map: a PNG of one channel, whose pixels are "
        "label numbers, or an image in the model's palette")
    add("--complete", type=path, metavar="FILE", help="image whose upper part stays; the rest is generated")
    add("--known", type=float, metavar="SHARE", help="share of its rows that stays, 0 to 1; default: 0.5")
    add("--mask", type=path, metavar="FILE", help="image of its shape: what is white in it is generated, the "
        "rest stays")


def run(options: argparse.Namespace) -> None:
    """Load, generate, save: one image, by the first process."""
    if rank_and_world_size()[0] != 0:
        return
    file = png_file(options.outdir, "panorama", (options.segmentation, options.complete, options.mask))
    sampling = sampling_options(options)
    model, _, metadata = load_transformer(options.run, sampling, device=options.device)
    original, labels, size = inputs(model, options)
    default = 0.0 if options.mask else 0.5
    share = default if options.known is None else options.known
    kept = None if original is None else kept_codes(model, size, share, options.mask)
    height, width = size
    check_size(model, size, kept, f"--size {height}x{width}" if options.size else "the image")
    given = {"class": class_of(model, options.classes), "label_map": labels}
    parts = conditions_of(model, 1, size, given)
    known = None if original is None or kept is None else model.encode_codes(original)
    with TokenBar(1) as bar:
        bar.next_batch(1, count_codes(model, size, kept))
        codes = model.sample_codes(
            parts, sampling, size=size, known=known, mask=kept, callback=bar,
            generator=image_generators(options.seed, [0]),
        )
    image = decode(model, codes)
    if original is not None and kept is not None:
        image = keep_pixels(image, original.cpu(), kept, model.first_stage_model.factor)
    metadata |= {"label": str(options.classes), "size": f"{height}x{width}"}
    files = {name: getattr(options, name) for name in ("segmentation", "complete", "mask")}
    metadata |= {name: file.name for name, file in files.items() if file} | {"known": str(share)}
    save_image(image[0], file, metadata)
    print(f"{height}x{width} pixels (height x width): {file}")


def inputs(
    model: Net2NetTransformer, options: argparse.Namespace
) -> tuple[Tensor | None, Tensor | None, Size]:
    """Return the image to complete (1, 3, H, W) and the label map (h, w), None if not given, and (H, W)."""
    size = options.size
    side, width = model.first_stage_model.image_size
    original = labels = None
    if options.complete is not None:
        pixels = ImagePaths([options.complete], size).preprocess_image(options.complete)
        original = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(model.device)
    elif options.known is not None or options.mask is not None:
        raise ValueError("--known and --mask say what stays of an image: name it with --complete")
    if options.segmentation is not None:
        kinds = [stage.kind for stage in model.cond_stages]
        if "label_map" not in kinds:
            raise ValueError("--segmentation: the model is not conditioned on label maps; leave it out")
        number = kinds.index("label_map")
        stage: Any = model.cond_stages[number]
        labels = read_labels(options.segmentation, stage)
        if size is not None:
            labels = resized_labels(labels, condition_shapes(model, size)[number])
    if original is not None:
        size = original.shape[2], original.shape[3]
    elif labels is not None and size is None:
        own = model.cond_sizes[number]
        size = labels.shape[0] * side // own[0], labels.shape[1] * width // own[1]
    return original, labels, size or (side, 4 * width)


def class_of(model: Net2NetTransformer, label: str | None) -> list[int] | None:
    """Return the class of one image; None where it is left out beside other conditions."""
    if label is None and len(model.cond_stages) > 1:
        return None
    numbers = class_numbers(label, model, "--classes") or []
    if label is not None and len(numbers) != 1:
        raise ValueError(f"--classes {label}: give one class number")
    return numbers[:1] or None
