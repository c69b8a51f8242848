"""Encode and decode images with a tokenizer or another autoencoder, and measure what is lost.

    taming reconstruct -r logs/RUN photos/ -o reconstructions/

Writes a PNG for each image, comparison.png (pairs of an image and its reconstruction) and metrics.csv: l1 is
the mean absolute difference in [-1, 1] (0 to 2), psnr is in dB, codes is how many different ones the image
uses, 0 where there are none (VAE, KL autoencoder).
"""

import argparse
import csv
import sys
from itertools import chain, count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.cli.options import add_allow, add_device, add_outdir, add_run, check_folder, path
from taming.data.base import image_batches
from taming.data.files.lists import find_images
from taming.images import image_grid
from taming.inference.provenance import check_replaceable, save_image
from taming.inference.tokenizer import load_first_stage
from taming.metrics import CodebookUsage, psnr, ssim
from taming.models.autoencoder import Autoencoder
from taming.models.tokenizer import Tokenizer, as_list
from taming.util import ProgressBar, number, pick_device

MEASURED = ("l1", "psnr", "ssim", "codes")
COLUMNS = ("file", "width", "height", *MEASURED, "usage_percent", "perplexity")  # the last two: over all
SHEET, TABLE = Path("comparison.png"), Path("metrics.csv")
PRINTED, COMPARED = 20, 8  # images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("images", nargs="+", type=path, help="image files, and folders with images at any depth")
    add_run(parser, "a tokenizer or autoencoder, or a transformer over one", required=True)
    add_outdir(parser, "folder for the results", required=True)
    add("--size", type=number(int, 1), metavar="PIXELS", help="resize the smaller side to this and crop the "
        "centre square; default: the own size, cropped to a multiple of the downsampling factor")
    add("--batch-size", type=number(int, 1), default=8, help="images at once, where sizes agree")
    add_device(parser)
    add_allow(parser)


def run(options: argparse.Namespace) -> None:
    """Load, reconstruct batch by batch, and write the results."""
    outdir = check_folder(options.outdir, options.images)
    names = output_names(options.images)
    check_outputs(outdir, names)
    device = pick_device(options.device)
    model = load_first_stage(options.run, device=options.device)[0]
    if options.size is not None:
        model.check_size(options.size, options.size)
    usage = CodebookUsage(model.codebook_size * model.levels) if isinstance(model, Tokenizer) else None
    rows: list[dict] = []
    pairs: list[Tensor] = []
    bad: list[str] = []
    batches = image_batches(list(names), options.size, model.factor, options.batch_size, bad)
    with ProgressBar(total=len(names), unit="image") as bar:
        for paths, images in batches:
            reconstructions, measured = reconstruct(model, images.to(device), usage)
            for name, *pair, numbers in zip(paths, images, reconstructions, measured, strict=True):
                save_image(pair[1], outdir / names[name])
                rows.append({"file": name, "width": images.shape[3], "height": images.shape[2]} | numbers)
                pairs += pair if len(rows) <= COMPARED else []
            bar.update(len(rows) + len(bad) - bar.n)
    for reason in bad:
        print(f"skipped: {reason}", file=sys.stderr)
    if not rows:
        raise ValueError(f"none of {len(names)} images could be read")
    report(rows, usage, len(bad), outdir / TABLE)
    save_image(image_grid(padded(pairs), columns=4), outdir / SHEET)


def output_names(inputs: list[Path]) -> dict[str, Path]:
    """Return the path of each image, with the name of its reconstruction in the output folder.

    The name is that of the image within the folder that was given. Where it is taken, by an image of another
    folder or ending or by the sheet, the ending or a number is added.
    """
    names: dict[str, Path] = {}
    taken = {str(SHEET)}  # in lower case, since not all file systems tell A from a
    for given in inputs:
        for found in find_images(given) if given.is_dir() else [str(given)]:
            if found in names:
                continue
            plain = Path(found).relative_to(given) if given.is_dir() else Path(given.name)
            stems = chain((plain.stem, plain.name), (f"{plain.stem}_{i}" for i in count(2)))
            free = (plain.with_name(f"{stem}.png") for stem in stems)
            names[found] = next(name for name in free if str(name).lower() not in taken)
            taken.add(str(names[found]).lower())
    return names


def check_outputs(outdir: Path, names: dict[str, Path]) -> None:
    """Raise ValueError if a file would be replaced that is an input, or was not written by this command."""
    inputs = {Path(name).resolve() for name in names}
    for name in (*names.values(), SHEET):
        if (outdir / name).resolve() in inputs:
            raise ValueError(f"--outdir {outdir}: {name} would replace an input: choose another folder")
        check_replaceable(outdir / name)
    table = outdir / TABLE
    if table.exists():
        with open(table, encoding="utf-8", errors="replace") as file:
            if file.readline().strip() != ",".join(COLUMNS):
                raise ValueError(f"{table} exists and is another table: choose another --outdir")


@torch.inference_mode()
def reconstruct(
    model: Tokenizer | Autoencoder, x: Tensor, usage: CodebookUsage | None
) -> tuple[Tensor, list[dict[str, float]]]:
    """Return reconstructions of images (B, C, H, W) on the CPU and what was measured; count the codes.

    Each level of a tokenizer has codes of its own. An autoencoder without codes has no `usage`.
    """
    if isinstance(model, Tokenizer):
        codes = model.encode_codes(x)  # (B, h, w), or a list of them
        reconstruction = model.decode_codes(codes)
        size = model.codebook_size
        levels = [grid.flatten(1) + level * size for level, grid in enumerate(as_list(codes))]
        rows = torch.cat(levels, dim=1)  # (B, N)
        assert usage is not None
        usage.update(rows)
        used = [len(row.unique()) for row in rows]
    else:
        reconstruction, used = model.reconstruct(x), [0] * len(x)
    reconstruction = reconstruction.float().clamp(-1.0, 1.0)
    l1 = (x - reconstruction).abs().flatten(1).mean(1)
    columns = l1.tolist(), psnr(x, reconstruction).tolist(), ssim(x, reconstruction).tolist(), used
    return reconstruction.cpu(), [dict(zip(MEASURED, row, strict=True)) for row in zip(*columns, strict=True)]


def report(rows: list[dict], usage: CodebookUsage | None, bad: int, file: Path) -> None:
    """Write all rows and their mean to the CSV file, and print the first of them."""
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in MEASURED}
    mean |= {"file": f"mean of {len(rows)}"}
    if usage is not None:
        used = usage.compute()
        mean |= {"usage_percent": 100.0 * used["usage"].item(), "perplexity": used["perplexity"].item()}
    with open(file, "w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, COLUMNS)
        writer.writeheader()
        writer.writerows([*rows, mean])
    for row in [*rows[:PRINTED], mean]:
        print("{file:40} l1 {l1:.4f}  psnr {psnr:5.2f} dB  ssim {ssim:.4f}  {codes:.0f} codes".format(**row))
    if usage is not None:
        print("over all: {usage_percent:.1f} % of the codebook, perplexity {perplexity:.1f}".format(**mean))
    print(f"{len(rows)} images reconstructed, {bad} skipped; all rows in {file}")


def padded(images: list[Tensor]) -> Tensor:
    """Place images (C, H, W) of any sizes on white of the largest: (B, C, H', W')."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    return torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]), value=1.0) for x in images])
