#!/usr/bin/env python
"""Pass pictures through a first stage and measure what is lost: scripts/reconstruct.py -r RUN photos/ -o out/

Writes a PNG for each picture, comparison.png (pairs: picture, reconstruction) and metrics.csv: l1 is the mean
absolute difference in [-1, 1] (0 to 2), psnr is in dB, codes is how many different ones the picture uses.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from taming.checkpoint import find_checkpoint, load_model
from taming.cli.options import Parser, add_allow
from taming.cli.outputs import check_folder
from taming.config import allow_targets
from taming.data.base import image_batches
from taming.data.files.lists import find_images
from taming.images import image_grid, save_png
from taming.metrics import CodebookUsage, psnr, ssim
from taming.util import exit_status, number, pick_device

MEASURED = ("l1", "psnr", "ssim", "codes")
COLUMNS = ("file", "width", "height", *MEASURED, "usage_percent", "perplexity")  # the last two: over all
PRINTED, COMPARED = 20, 8  # pictures


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="picture files, and folders that are searched at any depth")
    add("-r", "--resume", required=True, help="run directory, checkpoint or exported folder of a VQGAN, "
        "or of a transformer, whose first stage is taken")
    add("-o", "--outdir", type=Path, required=True, help="folder for the results")
    add("--size", type=number(int, 1), help="resize the smaller side to so many pixels and crop the centre "
        "square; default: keep the size, but for a crop to a multiple of the downsampling factor")
    add("--batch_size", type=int, default=8, help="pictures at once, where sizes agree; default: 8")
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    add_allow(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(run, parse(argv))


def run(options: argparse.Namespace) -> None:
    """Load, reconstruct batch by batch, and write the results."""
    if options.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {options.batch_size}")
    check_folder(options.outdir)
    allow_targets(*options.allow)
    file, device = find_checkpoint(options.resume), pick_device(options.device)
    model = load_model(file, device=device)[0]
    model = getattr(model, "first_stage_model", model)
    if not hasattr(model, "decode_code"):
        raise ValueError(f"{file} is a {type(model).__name__}: give a VQGAN, or a transformer over one")
    if options.size is not None:
        model.check_size(options.size, options.size)
    names = output_names(options.images)
    usage, rows, pairs, bad = CodebookUsage(model.codebook_size), [], [], []
    batches = image_batches(list(names), options.size, model.factor, options.batch_size, bad)
    with tqdm(total=len(names), unit="image") as bar:
        for paths, images in batches:
            reconstructions, measured = reconstruct(model, images.to(device), usage)
            for path, *pair, numbers in zip(paths, images, reconstructions, measured, strict=True):
                save_png(pair[1], options.outdir / names[path])
                rows.append({"file": path, "width": images.shape[3], "height": images.shape[2]} | numbers)
                pairs += pair if len(rows) <= COMPARED else []
            bar.update(len(rows) + len(bad) - bar.n)
    for reason in bad:
        print(f"skipped: {reason}", file=sys.stderr)
    if not rows:
        raise ValueError(f"none of {len(names)} pictures could be read")
    report(rows, usage, len(bad), options.outdir / "metrics.csv")
    save_png(image_grid(padded(pairs), columns=4), options.outdir / "comparison.png")


def output_names(inputs: list[Path]) -> dict[str, Path]:
    """Each picture's path, and the name of its reconstruction, relative to the folder it was found in."""
    names: dict[str, Path] = {}
    for given in inputs:
        for path in find_images(given) if given.is_dir() else [str(given)]:
            name = Path(path).relative_to(given) if given.is_dir() else Path(given.name)
            taken = name.with_suffix(".png") in names.values()  # a.jpg beside a.png
            names.setdefault(path, name.with_name(name.name + ".png") if taken else name.with_suffix(".png"))
    return names


@torch.inference_mode()
def reconstruct(model: nn.Module, x: Tensor, usage: CodebookUsage) -> tuple[Tensor, list[dict[str, float]]]:
    """Images (B, C, H, W) to reconstructions on the CPU and what was measured of each; counts the codes."""
    indices = model.encode_codes(x)  # (B, h, w)
    reconstruction = model.decode_codes(indices).float().clamp(-1.0, 1.0)
    usage.update(indices)
    codes = [len(row.unique()) for row in indices.flatten(1)]
    l1 = (x - reconstruction).abs().flatten(1).mean(1)
    columns = l1.tolist(), psnr(x, reconstruction).tolist(), ssim(x, reconstruction).tolist(), codes
    return reconstruction.cpu(), [dict(zip(MEASURED, row, strict=True)) for row in zip(*columns, strict=True)]


def report(rows: list[dict], usage: CodebookUsage, bad: int, file: Path) -> None:
    """Write all rows and their mean to the CSV file, and print the first of them."""
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in MEASURED}
    mean |= {"file": f"mean of {len(rows)}"}
    used = usage.compute()
    mean |= {"usage_percent": 100.0 * used["usage"].item(), "perplexity": used["perplexity"].item()}
    with open(file, "w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, COLUMNS)
        writer.writeheader()
        writer.writerows([*rows, mean])
    for row in [*rows[:PRINTED], mean]:
        print("{file:40} l1 {l1:.4f}  psnr {psnr:5.2f} dB  ssim {ssim:.4f}  {codes:.0f} codes".format(**row))
    print("over all: {usage_percent:.1f} % of the codebook, perplexity {perplexity:.1f}".format(**mean))
    print(f"{len(rows)} pictures reconstructed, {bad} skipped; all rows in {file}")


def padded(images: list[Tensor]) -> Tensor:
    """Images (C, H, W) of any sizes on white of the largest: (B, C, H', W')."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    return torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]), value=1.0) for x in images])


if __name__ == "__main__":
    sys.exit(main())
