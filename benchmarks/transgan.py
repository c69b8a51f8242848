#!/usr/bin/env python
"""Ablations of TransGAN at toy scale, on the built-in landscapes of 32 pixels.

    python -m benchmarks.transgan --steps 1000                       all rows
    python -m benchmarks.transgan vit_vit full --steps 40 -n 64      two rows, to see that it runs

The rows are those of tables 1 to 3 of Jiang, Chang and Wang 2021 (arXiv 2102.07074): convolutions or
transformers as generator G and discriminator D, of about as many parameters; then augmentation, co-training
with super-resolution, and growing windows, one after the other. All see the same batches. A second start goes
on where the first was stopped, also within a row.
"""

import logging
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import runs
from taming.checkpoint import find_checkpoint, load_model, read_checkpoint
from taming.images import image_grid
from taming.inference.provenance import save_image
from taming.sampling import image_generators

CONFIG = "transgan/transgan_landscapes"
SHOWN = 12  # samples of each row on the sheet
EPOCH = 250  # batches, of 4,000 images
CONVOLUTIONAL = "taming.modules.transgan.convolutional"
CONV_G = (f"generator_config.target={CONVOLUTIONAL}.ConvGenerator", "generator_config.params.channels=256")
CONV_D = (f"discriminator_config.target={CONVOLUTIONAL}.ConvDiscriminator",
          "discriminator_config.params.channels=24")
NO_AUGMENT, NO_WINDOWS = ("augment=null",), ("locality=null",)
NO_SR = ("sr_weight=0", "generator.entry_stage=null")
BARE = (*NO_SR, *NO_WINDOWS)


@dataclass(frozen=True)
class Row:
    """What is changed of the configuration, in model.params."""

    title: str
    changes: tuple[str, ...] = ()


ROWS = {
    "conv_conv": Row("G convolutions, D convolutions", (*CONV_G, *CONV_D, *NO_AUGMENT, *BARE)),
    "vit_conv": Row("G transformer, D convolutions", (*CONV_D, *NO_AUGMENT, *BARE)),
    "conv_vit": Row("G convolutions, D transformer", (*CONV_G, *NO_AUGMENT, *BARE)),
    "vit_vit": Row("G transformer, D transformer", (*NO_AUGMENT, *BARE)),
    "conv_conv_aug": Row("convolutions + DiffAugment", (*CONV_G, *CONV_D, *BARE)),
    "aug": Row("transformers + DiffAugment", BARE),
    "aug_sr": Row("+ super-resolution", NO_WINDOWS),
    "full": Row("+ growing windows: the full recipe"),
    "full_no_aug": Row("the full recipe without DiffAugment", NO_AUGMENT),
}


def main(argv: list[str] | None = None) -> int:
    """Train and evaluate the rows; print a table, and write it, the numbers and a sheet of samples."""
    argv = sys.argv[1:] if argv is None else argv
    rows = f"any of {', '.join(ROWS)}; default: all"
    parser = runs.options_parser("transgan", __doc__, rows, "samples, and images to compare with")
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="batches of 16, each a step of D, every second one of G")
    add("--seeds", type=int, default=1, help="runs of each row; the table has their mean and range")
    options = runs.read_options(parser, argv, ROWS)
    folder = options.folder or Path("logs") / f"transgan_{options.steps}"
    runs.check_folder(folder, {
        "steps": options.steps, "threads": options.threads, "num_images": options.num_images,
    })
    found: dict[str, list[dict[str, Any]]] = {}
    for name in options.rows or ROWS:
        for seed in range(options.seeds):
            print(f"\n## {ROWS[name].title}, seed {seed}", flush=True)
            file = folder / f"{name}_seed{seed}.json"
            steps, count = options.steps, options.num_images
            measured = runs.kept(file, partial(measure, name, seed, folder, steps, count))
            if measured is None:
                return 130  # stopped by Ctrl-C: the run is saved
            found.setdefault(name, []).append(measured)
    runs.write(
        "transgan", options.out, argv, {"rows": found}, partial(markdown, found=found),
        partial(save_sheet, found),
    )
    return 0


def measure(name: str, seed: int, folder: Path, steps: int, count: int) -> dict[str, Any] | None:
    """Train and evaluate a row, or what is left of that; None where it was stopped by a signal."""
    label = f"{name}_seed{seed}"
    run = runs.trained(label, folder, start_words(name, seed, label, folder, steps))
    if run is None:
        return None
    checkpoint = read_checkpoint(find_checkpoint(run), tensors=())
    model, _, _ = load_model(find_checkpoint(run))
    return {
        "name": name, "seed": seed, "run": str(run), "cpu_minutes": runs.cpu_minutes(checkpoint),
        "parameters": {
            part: sum(p.numel() for p in getattr(model, part).parameters())
            for part in ("generator", "discriminator")
        },
        "evaluation": runs.evaluated(run, "-n", str(count), runs.unseen(count))[0],
    }


def start_words(name: str, seed: int, label: str, folder: Path, steps: int) -> list[str]:
    """Return the words of the training command for a new run; windows grow over the run's epochs."""
    budget = "lightning.callbacks.budget"
    per_epoch = min(EPOCH, max(1, steps // 4))
    quarter = max(1, round(steps / 4 / per_epoch))  # of the run, in epochs
    return [
        "--base", CONFIG, "-t", "-n", label, "--logdir", str(folder), "--seed", str(seed), "--gpus", "0",
        "--max_steps", "-1", "--limit_train_batches", str(per_epoch), "--limit_val_batches", "0",
        "--enable_progress_bar", "False", "--enable_model_summary", "False",
        "lightning.callbacks.image_logger=null", f"{budget}.target=taming.training.callbacks.Budget",
        f"model.params.locality=[[{quarter},4],[{2 * quarter},8]]",
        f"{budget}.params.planned_batches={steps}", f"{budget}.params.batches={steps}",
        *(f"model.params.{change}" for change in ROWS[name].changes),
    ]


# ---- what is written


def save_sheet(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write a sheet with samples of the first seed of each row."""
    samples = []
    for rows in found.values():
        model, _, _ = load_model(find_checkpoint(rows[0]["run"]))
        samples += [model.eval().sample(1, each)[0] for each in image_generators(0, range(SHOWN))]
    grid = image_grid(torch.stack(samples).clamp(-1, 1), SHOWN)
    save_image(grid.repeat_interleave(2, 1).repeat_interleave(2, 2), path)


def markdown(command: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table: means over the seeds, and the range where there are several."""
    metrics = list(dict.fromkeys(
        metric for rows in found.values() for metric in rows[0]["evaluation"]["metrics"]
    ))
    heads = ["", "G", "D", *metrics, "minutes"]
    lines = [f"    {command}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, rows in found.items():
        sizes = [f"{rows[0]['parameters'][part] / 1e6:.2f}M" for part in ("generator", "discriminator")]
        cells = [ROWS[name].title, *sizes]
        for metric in metrics:
            values = [row["evaluation"]["metrics"].get(metric) for row in rows]
            known = [value for value in values if value is not None]
            mean = f"{sum(known) / len(known):.4g}" if known else "-"
            cells.append(mean + (f" ({min(known):.4g} to {max(known):.4g})" if len(known) > 1 else ""))
        cells.append(f"{sum(row['cpu_minutes'] for row in rows) / len(rows):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    protocol = next(iter(found.values()))[0]["evaluation"]["protocol"]
    network = protocol.get("network") or {}
    judge = f"{network.get('name')} ({str(network.get('sha256'))[:12]})"
    lines += ["", f"{protocol.get('count')} samples; {judge}. The rows of the sheet are those of the table."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.getLogger("taming.checkpoint").setLevel(logging.WARNING)
    sys.exit(main())
